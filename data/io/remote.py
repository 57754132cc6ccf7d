"""One GET of a remote folder, and what its failure means: that it may pass, that it will not, or that the object is another.

Nothing is tried again here: who asks decides, counts and verifies.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from mikoshi.data.errors import PASSING_4XX, DataError, of_storage

SCHEMES = ("s3", "gs", "az", "http", "https", "file")
_CHUNK = 1 << 20  # bytes at a time, at least
_WHOLE_REQUEST = timedelta(hours=1)  # silence ends a request much sooner; this ends one that trickles

T = TypeVar("T")


class Passing(Exception):
    """A request failed for a reason that may be gone the next time: 5xx, a cut connection, a timeout."""


class Unlike(Exception):
    """Something arrived, and not what was asked for."""


_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


@dataclass(frozen=True)
class Remote:
    """A folder in a store: its address, fit to be shown, obstore's handle, and what obstore still has in hand."""

    url: str
    handle: Any
    pending: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, compare=False)


def open_remote(url: str, timeout: float, options: Mapping[str, str]) -> Remote:
    """Requests nothing yet. `timeout`: seconds of silence after which a request has failed. Raises DataError for an
    address or option that cannot be used."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise DataError(f"{_shown(url)}: not an address of a store: give one with {', '.join(s + '://' for s in SCHEMES)}")
    # obstore takes these from the environment too, but not the leave to use plain http once it is given client options.
    told = (os.environ.get(name, "") for name in _ENDPOINTS)
    plain = any(value.startswith("http://") for value in (url, *options.values(), *told))
    client = {"read_timeout": timedelta(seconds=timeout), "timeout": _WHOLE_REQUEST, "allow_http": plain}
    settings: dict[str, Any] = {"config": dict(options)} if options else {}
    if scheme != "file":
        settings |= {"client_options": client, "retry_config": {"max_retries": 0, "retry_timeout": _WHOLE_REQUEST}}
    try:
        return Remote(_shown(url).rstrip("/"), from_url(url, **settings))
    except OSError as error:
        raise of_storage(error, f"{_shown(url)}: cannot be opened: {_first_line(error)}") from None
    except (BaseError, ValueError, TypeError) as error:
        raise DataError(f"{_shown(url)}: cannot be opened: {_first_line(error)}") from None


async def chunks(remote: Remote, name: str, size: int | None) -> AsyncGenerator[bytes, None]:
    """The body of the object, in pieces of about a MiB. Raises Passing; DataError where a second request would fail as
    well; Unlike, before the first byte, where the object has another `size`."""
    try:
        answer = await _answer(remote, obstore.get_async(remote.handle, name))
        if size is not None and answer.meta["size"] != size:
            raise Unlike(f"it has {answer.meta['size']} bytes, the index lists {size}")
        stream = answer.stream(min_chunk_size=_CHUNK)
        with suppress(StopAsyncIteration):
            while True:
                yield await _answer(remote, stream.__anext__())
    except (BaseError, OSError) as error:
        raise _meaning(f"{remote.url}/{name}", error) from None


async def settled(remote: Remote, seconds: float = 2.0) -> None:
    """Wait until obstore's threads have let go of what was asked and cancelled, or that long: they would look for the
    interpreter after its end, and say so on stderr."""
    deadline = time.monotonic() + seconds
    while remote.pending and time.monotonic() < deadline:
        repr(remote.handle)  # any call of obstore's gives back the references its threads could not
        await asyncio.sleep(0.001)


async def _answer(remote: Remote, asked: Awaitable[T]) -> T:
    remote.pending.add(asked)
    try:
        return await asked
    finally:
        del asked  # an error's traceback must not keep it


def _meaning(address: str, error: Exception) -> Exception:
    line = _first_line(error)
    if isinstance(error, FileNotFoundError):
        return DataError(f"{address}: not there; check the address, or upload the dataset again")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return DataError(f"{address}: access refused; check the credentials and the bucket's policy ({line})")
    status = re.search(r"status code: (4\d\d)", line)
    if "redirect without LOCATION" in line or (status and int(status[1]) not in PASSING_4XX):
        return DataError(f"{address}: the store refuses the request; check address and region ({line})")
    return Passing(line)


def _first_line(error: Exception) -> str:
    return _shown((str(error) or type(error).__name__).splitlines()[0])


def _shown(text: str) -> str:
    """Without what a URL may hold of secrets: a user's name and password, a signature."""
    return re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S*", "", text))
