"""Checkpoints in an object store: one exists from the moment its manifest does, which is uploaded after all other files.

    PLACE/step-00000030/
        rank-00000.safetensors ...  uploaded as they are written, in parts that the store joins at the end
        manifest.json               uploaded last; without it the rest is a partial, which the next save clears
        damaged-manifest.json       in its place: the checkpoint was refused and set aside, until the step is saved again

An object store has no rename and no lock; the lock of the run's folder ensures one attempt at a time. If there are two all
the same, one commits a step and the other gets an error. Unfinished parts of a killed process are invisible but cost money:
give the bucket a rule that ends incomplete uploads after a day. A process that has made a request must not fork: the client's
threads do not survive, and the child's first request would wait for them.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from mikoshi.data.errors import DataError, StorageError
from mikoshi.data.io.atomic import folder_lock, replaced_file
from mikoshi.data.io.remote import open_remote
from mikoshi.trainer.checkpoint.storage.base import DAMAGED, LARGEST_MANIFEST, MANIFEST, checked_name, step_name, step_of
from mikoshi.trainer.errors import CheckpointError

WRITABLE = ("s3", "gs", "az")
_TIMEOUT = 120.0  # seconds without a byte after which a request has failed
_CONCURRENT_PARTS = 4  # parts of a file on their way
_CHUNK = 4 << 20
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 15.0

T = TypeVar("T")


def open_remote_store(
    url: str, scratch: Path, options: Mapping[str, str], part: int = 64 << 20, retries: int = 8
) -> RemoteStore:
    """Returns the store at a URL. Makes no request yet.

    Raises CheckpointError for an address or option that cannot be used.

    scratch: local folder for fetched files.
    options: settings of the client, such as endpoint and region.
    part: bytes of a part of an upload, of which a file has at most 10,000.
    retries: how often a request that failed is tried again.
    """
    if url.partition("://")[0] not in WRITABLE:
        schemes = ", ".join(f"{scheme}://" for scheme in ("file", *WRITABLE))
        raise CheckpointError(f"checkpoint.folder = {url!r}: give a folder, or a URL with {schemes}")
    backoff = {"init_backoff": timedelta(seconds=_FIRST_BACKOFF), "max_backoff": timedelta(seconds=_LONGEST_BACKOFF), "base": 2}
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(minutes=4), "backoff": backoff}
    try:
        remote = open_remote(url, _TIMEOUT, options)
        settings: dict[str, Any] = {"config": dict(options)} if options else {}
        handle = from_url(url, client_options=remote.handle.client_options, retry_config=retry, **settings)
    except (DataError, BaseError) as error:
        raise CheckpointError(f"checkpoint.folder: {error}") from None
    except StorageError as error:
        raise OSError(f"checkpoint.folder: {error}") from None
    return RemoteStore(remote.url, handle, scratch, part, retries)


class RemoteStore:
    """`Store` at a URL. Thread-safe except for begin, commit and abandon, which rank 0 calls one after another."""

    def __init__(self, url: str, handle: Any, scratch: Path, part: int, retries: int) -> None:
        self._url, self._handle, self._part, self._retries = url, handle, part, retries
        self._scratch = scratch / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._open_step: int | None = None
        self._fetched_step: int | None = None
        self._fetch_lock = threading.Lock()

    @property
    def address(self) -> str:
        """See `Store.address`."""
        return self._url

    def steps(self) -> list[int]:
        """See `Store.steps`."""
        return sorted((step for step, names in self._listed().items() if MANIFEST in names), reverse=True)

    def leftovers(self) -> list[str]:
        """See `Store.leftovers`."""
        found = []
        for step, names in sorted(self._listed().items()):
            if MANIFEST not in names:
                aside = f"{step_name(step)}/{DAMAGED}{MANIFEST}"
                found.append(aside if f"{DAMAGED}{MANIFEST}" in names else step_name(step))
        return found

    def begin(self, step: int) -> None:
        """See `Store.begin`."""
        self._open_step = None
        listed = self._listed()
        if MANIFEST in listed.get(step, {}):
            raise CheckpointError(f"{self.describe(step)} exists already; a checkpoint is never written over another")
        for other, names in listed.items():
            if other == step or not {MANIFEST, f"{DAMAGED}{MANIFEST}"} & names.keys():
                self._delete(other, names)
        self._open_step = step

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[BinaryIO]:
        """See `Store.create`."""
        key = self._key(step, checked_name(self.describe(step), name))
        with self._translated_errors(key):
            upload = obstore.open_writer(self._handle, key, buffer_size=self._part, max_concurrency=_CONCURRENT_PARTS)
            try:
                yield cast(BinaryIO, _Upload(upload, self._part))
                upload.close()
            except BaseException as error:
                with suppress(BaseError, OSError):  # closed already, or the store is out of reach; see the module's docstring
                    upload.__exit__(type(error), error, None)
                raise

    def commit(self, step: int, manifest: bytes) -> None:
        """See `Store.commit`."""
        key = self._key(step, MANIFEST)
        try:
            self._retry(key, lambda: obstore.put(self._handle, key, manifest, mode="create"))
        except AlreadyExistsError:  # by our own request whose response was lost, or by another process
            if self.manifest(step) != manifest:
                self._open_step = None
                raise CheckpointError(
                    f"{self.describe(step)} was committed by another process: are there two attempts of this run?"
                ) from None
        except NotSupportedError:
            self._retry(key, lambda: obstore.put(self._handle, key, manifest))
        self._open_step = None

    def abandon(self, step: int) -> None:
        """See `Store.abandon`."""
        if step != self._open_step:  # committed, or never ours
            return
        with suppress(OSError):
            self._delete(step, self._listed(step).get(step, {}))  # also undoes a commit whose response was lost
            self._open_step = None

    def manifest(self, step: int) -> bytes:
        """See `Store.manifest`."""
        key = self._key(step, MANIFEST)

        def read() -> bytes:
            answer = obstore.get(self._handle, key)
            if answer.meta["size"] > LARGEST_MANIFEST:
                raise CheckpointError(f"{self._url}/{key}: damaged: {answer.meta['size']} bytes are more than any manifest has")
            return bytes(answer.bytes())

        return self._retry(key, read)

    def written_at(self, step: int) -> float:
        """See `Store.written_at`."""
        key = self._key(step, MANIFEST)
        return float(self._retry(key, lambda: obstore.head(self._handle, key))["last_modified"].timestamp())

    def sizes(self, step: int) -> dict[str, int]:
        """See `Store.sizes`."""
        names = self._listed(step).get(step)
        if names is None:
            raise FileNotFoundError(self.describe(step))
        return {name: size for name, size in names.items() if name != MANIFEST}

    def local(self, step: int, name: str, sha256: str | None = None) -> Path:
        """See `Store.local`."""
        key = self._key(step, checked_name(self.describe(step), name))
        try:
            meta = self._retry(key, lambda: obstore.head(self._handle, key))
            which = hashlib.sha256(f"{key} {meta['e_tag']} {meta['version']} {meta['size']}".encode()).hexdigest()[:16]
            target = self._step_scratch(step) / which / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with folder_lock(target.parent):  # the ranks of a node, and the threads of each
                # If the second fetch matches, the network was at fault and not the store.
                if not target.exists() and not any(self._fetch(key, target, meta["size"], sha256) for _ in range(2)):
                    raise CheckpointError(f"{self._url}/{key}: altered: its bytes do not match the manifest's SHA-256")
        except FileNotFoundError:
            raise CheckpointError(f"{self._url}/{key}: missing") from None
        return target

    def release(self) -> None:
        """See `Store.release`."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def remove(self, step: int) -> None:
        """See `Store.remove`."""
        names = self._listed(step).get(step, {})
        self._delete(step, {MANIFEST: 0})
        with suppress(OSError):  # what remains is a partial, which the next save clears
            self._delete(step, names)

    def set_aside(self, step: int) -> str:
        """See `Store.set_aside`."""
        key, aside = self._key(step, MANIFEST), self._key(step, f"{DAMAGED}{MANIFEST}")
        self._retry(key, lambda: obstore.copy(self._handle, key, aside))
        self._delete(step, {MANIFEST: 0})
        return aside

    def describe(self, step: int) -> str:
        """See `Store.describe`."""
        return f"{self._url}/{step_name(step)}"

    def _key(self, step: int, name: str) -> str:
        return f"{step_name(step)}/{name}"

    def _listed(self, step: int | None = None) -> dict[int, dict[str, int]]:
        """Returns names and sizes of the objects of every step, or of one.

        For a name with a slash this is the part before it, with size -1.
        """
        prefix = None if step is None else step_name(step)

        found: dict[int, dict[str, int]] = {}
        for path, size in self._list_objects(prefix):
            folder, _, name = path.partition("/")
            first, slash, _ = name.partition("/")
            if (number := step_of(folder)) is not None and first:
                found.setdefault(number, {})[first] = -1 if slash else size
        return found

    def _list_objects(self, prefix: str | None) -> list[tuple[str, int]]:
        """Returns keys and sizes of all objects below a prefix."""

        def read() -> list[tuple[str, int]]:
            return [(meta["path"], meta["size"]) for batch in obstore.list(self._handle, prefix=prefix) for meta in batch]

        return self._retry(prefix or "", read)

    def _delete(self, step: int, names: Mapping[str, int]) -> None:
        """Delete objects, the manifest first. A folder among the names is deleted with all that is in it."""
        keys = [self._key(step, name) for name, size in names.items() if size >= 0 and name != MANIFEST]
        for key in (self._key(step, name) for name, size in names.items() if size < 0):
            keys += [path for path, _ in self._list_objects(key)]
        if MANIFEST in names:
            self._drop([self._key(step, MANIFEST)])
        self._drop(keys)

    def _drop(self, keys: list[str]) -> None:
        with suppress(FileNotFoundError):
            if keys:
                self._retry(keys[0], lambda: obstore.delete(self._handle, keys))

    def _step_scratch(self, step: int) -> Path:
        """Returns the folder that files of a step are fetched to. Those of other steps are removed, as one is read at a
        time.
        """
        scratch = self._scratch / step_name(step)
        with self._fetch_lock:
            if self._fetched_step != step:
                for other in self._scratch.glob("step-*"):
                    if other != scratch:
                        shutil.rmtree(other, ignore_errors=True)
                self._fetched_step = step
        return scratch

    def _fetch(self, key: str, target: Path, size: int, sha256: str | None) -> bool:
        """Fetch the object to `target`, whole; returns False, and leaves no file, if its bytes do not match `sha256`."""

        def attempt() -> bool:
            digest = hashlib.sha256()
            try:
                with replaced_file(target) as file:
                    for chunk in obstore.get(self._handle, key).stream(min_chunk_size=_CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                    if file.tell() != size:
                        raise _TransientError(f"{self._url}/{key}", f"{file.tell()} of {size} bytes arrived")
                    if sha256 is not None and digest.hexdigest() != sha256:
                        raise _DigestMismatch
                return True
            except _DigestMismatch:
                return False
            except OSError as error:
                if error.errno is None:  # an error of the store, not of the disk
                    raise
                raise OSError(error.errno, error.strerror, str(target)) from None

        return self._retry(key, attempt)

    def _retry(self, key: str, action: Callable[[], T]) -> T:
        """Returns the result of `action`, tried again with growing, jittered pauses while the failure may be transient.

        obstore does not retry a body that ends early, or a request that must not be repeated blindly. Raises
        FileNotFoundError, AlreadyExistsError, NotSupportedError and CheckpointError as they are, and OSError for all else.
        """
        failures = 0
        while True:
            try:
                with self._translated_errors(key):
                    return action()
            except _TransientError as error:
                failures += 1
                if failures > min(3, self._retries):
                    raise OSError(f"{self._url}/{key}: failed {failures} times, the last time with: {error.why}") from None
            pause = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**failures)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # leaves the run's random state alone

    @contextmanager
    def _translated_errors(self, key: str) -> Iterator[None]:
        """Turn obstore's errors into OSErrors with the address and the cause, transient ones into _TransientError."""
        address = f"{self._url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise (error if error.errno else FileNotFoundError(f"{address}: not there; check the address")) from None
        except (AlreadyExistsError, NotSupportedError):
            raise
        except (BaseError, OSError) as error:
            if isinstance(error, _TransientError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            line = _line(error)
            status = re.search(r"status code: (4\d\d)", line)
            if isinstance(error, PermissionDeniedError | UnauthenticatedError) or (status and status[1] in ("401", "403")):
                message = f"{address}: access refused; check the credentials and the bucket's policy ({line})"
                raise OSError(message) from None
            if status and status[1] not in ("408", "425", "429"):
                raise OSError(f"{address}: the store refuses the request; check address and region ({line})") from None
            if self._retries and f"after {self._retries} retries" in line:
                raise OSError(f"{address}: failed {self._retries + 1} times, the last time with: {line}") from None
            raise _TransientError(address, line) from None


class _TransientError(OSError):
    """A request failed for a reason that may be gone the next time."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"{address}: {why}")
        self.why = why


class _DigestMismatch(Exception):
    """The object arrived whole but is not what was written."""


class _Upload(io.RawIOBase):
    """A file object for an upload.

    Buffers are read in place and must not change until the file is closed.
    """

    def __init__(self, upload: Any, part: int) -> None:
        self._upload, self._size = upload, part

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not view.nbytes:  # an empty view cannot be cast
            return 0
        view = view.cast("B")
        for start in range(0, len(view), self._size):  # a larger one would be sent in all its parts at once
            self._upload.write(view[start : start + self._size])
        return len(view)


def _line(error: Exception) -> str:
    """Returns the first line of an error, without the query of a URL, which may hold secrets."""
    return re.sub(r"\?\S*", "", (str(error) or type(error).__name__).splitlines()[0])[:500]
