"""Errors of data and of storage: every message names the file or key and says what to do, and tells lasting problems from
transient ones."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

RETRYABLE_4XX = (408, 425, 429)

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
    """The user's data or data settings cannot be used. The message names the file or key and the remedy."""


class StorageError(RuntimeError):
    """The storage does not answer now. Nothing is wrong with the data, and the same read may succeed later."""


def is_transient(error: Exception) -> bool:
    """Whether an error of a disk or store may be gone at the next attempt.

    Missing files, wrong permissions, a full disk, an invalid address and HTTP 4xx (but 408, 425 and 429) are lasting;
    everything else is transient.
    """
    if isinstance(error, _LASTING_CLASSES) or (isinstance(error, OSError) and error.errno in _LASTING):
        return False
    if _REFUSALS & {kind.__name__ for kind in type(error).__mro__} or "redirect without LOCATION" in str(error):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and (found := re.search(r"status code: (\d{3})", str(error))):
        status = int(found[1])
    return status is None or status in RETRYABLE_4XX or not 400 <= status < 500


def storage_error(error: Exception, message: str, remedy: str = "") -> DataError | StorageError:
    """The error to raise for a failed read or write: StorageError if `error` is transient, else DataError.

    message: what failed, with the name of the file.
    remedy: what the user can do about a lasting error.
    """
    if is_transient(error):
        return StorageError(f"{message}; try again when the storage answers")
    return DataError(f"{message}; {remedy}" if remedy else message)


@contextmanager
def os_errors_named(name: object, remedy: str = "", failure: str = "cannot be read") -> Iterator[None]:
    """Turn an OSError in the block into the error that `storage_error` returns, with the name of what was read.

    name: the file or folder, which begins the message.
    remedy: what the user can do about a lasting error.
    failure: what went wrong, as the message says it.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, f"{name}: {failure}: {error.strerror or error}", remedy) from None
