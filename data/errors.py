"""What is wrong with the data, in one line that a person can act on, apart from what is wrong with the storage just now."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

PASSING_4XX = (408, 425, 429)

_LASTING_CLASSES = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError)
_LASTING = frozenset({
    errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.ENODEV,
    errno.ENOTEMPTY, errno.EXDEV, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS,
})  # fmt: skip
_REFUSALS = frozenset({
    "NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "NotSupportedError",
    "UnknownConfigurationKeyError", "EntryNotFoundError", "OfflineModeIsEnabled", "UnsupportedProtocol", "InvalidURL",
})  # fmt: skip
"""Of the clients of stores far away, which have no base in common."""


class DataError(ValueError):
    """The user's data or data settings cannot be used; the message names the file or key and the way out."""


class StorageError(RuntimeError):
    """Where the data is kept does not answer now; the same read may work later, and there is nothing in it to mend."""


def passes(error: Exception) -> bool:
    """Whether what a disk or a store said may be gone the next time: all but missing, no file, no leave, no room, and an
    address that cannot be."""
    if isinstance(error, _LASTING_CLASSES) or (isinstance(error, OSError) and error.errno in _LASTING):
        return False
    if _REFUSALS & {kind.__name__ for kind in type(error).__mro__} or "redirect without LOCATION" in str(error):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and (found := re.search(r"status code: (\d{3})", str(error))):
        status = int(found[1])
    return status is None or status in PASSING_4XX or not 400 <= status < 500


def of_storage(error: Exception, told: str, way: str = "") -> DataError | StorageError:
    """What such an error comes out as, in the words `told`: a DataError with the `way` out, or a StorageError."""
    if passes(error):
        return StorageError(f"{told}; try again when the storage answers")
    return DataError(f"{told}; {way}" if way else told)


@contextmanager
def reading(what: object, way: str = "", how: str = "cannot be read") -> Iterator[None]:
    """An OSError in the block comes out as `of_storage` has it, naming what was read."""
    try:
        yield
    except OSError as error:
        raise of_storage(error, f"{what}: {how}: {error.strerror or error}", way) from None
