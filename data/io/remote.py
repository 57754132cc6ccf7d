"""One GET from a remote folder, with failures classified: transient, lasting, or another object than expected.

Nothing is retried here; callers retry, count and verify.
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

from mikoshi.data.errors import RETRYABLE_4XX, DataError, storage_error

SCHEMES = ("s3", "gs", "az", "http", "https", "file")
_CHUNK = 1 << 20  # bytes at a time, at least
_WHOLE_REQUEST = timedelta(hours=1)  # silence ends a request much sooner; this ends one that trickles

T = TypeVar("T")


class TransientError(Exception):
    """A request failed for a reason that may be gone the next time: 5xx, a lost connection, a timeout."""


class MismatchError(Exception):
    """The object that arrived is not the one expected."""


_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


@dataclass(frozen=True)
class Remote:
    """A folder in a store: its address without secrets, obstore's handle, and obstore's pending requests."""

    url: str
    handle: Any
    pending: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, compare=False)


def open_remote(url: str, timeout: float, options: Mapping[str, str]) -> Remote:
    """Open a folder in a store. Requests nothing yet.

    timeout: seconds of silence after which a request has failed.
    options: passed to obstore.

    Raises DataError for an address or option that cannot be used.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise DataError(f"{_redacted(url)}: not an address of a store: give one with {', '.join(s + '://' for s in SCHEMES)}")
    # obstore takes these from the environment too, but not the leave to use plain http once it is given client options.
    endpoints = (os.environ.get(name, "") for name in _ENDPOINTS)
    allow_http = any(value.startswith("http://") for value in (url, *options.values(), *endpoints))
    client = {"read_timeout": timedelta(seconds=timeout), "timeout": _WHOLE_REQUEST, "allow_http": allow_http}
    settings: dict[str, Any] = {"config": dict(options)} if options else {}
    if scheme != "file":
        settings |= {"client_options": client, "retry_config": {"max_retries": 0, "retry_timeout": _WHOLE_REQUEST}}
    try:
        return Remote(_redacted(url).rstrip("/"), from_url(url, **settings))
    except OSError as error:
        raise storage_error(error, f"{_redacted(url)}: cannot be opened: {_first_line(error)}") from None
    except (BaseError, ValueError, TypeError) as error:
        raise DataError(f"{_redacted(url)}: cannot be opened: {_first_line(error)}") from None


async def chunks(remote: Remote, name: str, size: int | None) -> AsyncGenerator[bytes, None]:
    """The body of an object, in chunks of about a MiB.

    Raises TransientError; DataError if another request would fail as well; MismatchError, before the first byte, if the object
    does not have `size` bytes.
    """
    try:
        answer = await _tracked(remote, obstore.get_async(remote.handle, name))
        if size is not None and answer.meta["size"] != size:
            raise MismatchError(f"it has {answer.meta['size']} bytes, the index lists {size}")
        stream = answer.stream(min_chunk_size=_CHUNK)
        with suppress(StopAsyncIteration):
            while True:
                yield await _tracked(remote, stream.__anext__())
    except (BaseError, OSError) as error:
        raise _classify(f"{remote.url}/{name}", error) from None


async def drain_pending(remote: Remote, seconds: float = 2.0) -> None:
    """Wait until obstore's threads have released cancelled requests, or for so many seconds. Threads that outlive the
    interpreter print errors."""
    deadline = time.monotonic() + seconds
    while remote.pending and time.monotonic() < deadline:
        repr(remote.handle)  # any call of obstore's gives back the references its threads could not
        await asyncio.sleep(0.001)


async def _tracked(remote: Remote, request: Awaitable[T]) -> T:
    remote.pending.add(request)
    try:
        return await request
    finally:
        del request  # an error's traceback must not keep it


def _classify(address: str, error: Exception) -> Exception:
    line = _first_line(error)
    if isinstance(error, FileNotFoundError):
        return DataError(f"{address}: not there; check the address, or upload the dataset again")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return DataError(f"{address}: access refused; check the credentials and the bucket's policy ({line})")
    status = re.search(r"status code: (4\d\d)", line)
    if "redirect without LOCATION" in line or (status and int(status[1]) not in RETRYABLE_4XX):
        return DataError(f"{address}: the store refuses the request; check address and region ({line})")
    return TransientError(line)


def _first_line(error: Exception) -> str:
    return _redacted((str(error) or type(error).__name__).splitlines()[0])


def _redacted(text: str) -> str:
    """`text` without the secrets that an URL may hold: user name, password and signature."""
    return re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S*", "", text))
