"""Checkpoints in an object store: one is there from the moment its manifest is, which is uploaded when all else is whole.

    PLACE/step-00000030/
        rank-00000.safetensors ...  uploaded as they are written, in parts that the store puts together at the end
        manifest.json               the last; without it the rest is a partial, which the next save clears
        damaged-manifest.json       in its place, the checkpoint was refused and set aside, until the step is saved again

There is no rename and no lock here: that a run has one attempt at a time is for the lock of its folder to see to. Should
there be two all the same, one of them commits a step, and the other is told so. The parts that a killed process has left
unfinished are seen by nobody but the bill: give the bucket a rule that ends incomplete uploads after a day. A process that
has made a request must not fork: the client's threads stay behind, and the child's first request would wait for them.
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
from mikoshi.data.io.atomic import alone_in, replacing
from mikoshi.data.io.remote import open_remote
from mikoshi.trainer.checkpoint.storage.base import DAMAGED, LARGEST_MANIFEST, MANIFEST, checked, step_name, step_of
from mikoshi.trainer.errors import CheckpointError

WRITABLE = ("s3", "gs", "az")
_SILENCE = 120.0  # seconds without a byte after which a request has failed
_AT_ONCE = 4  # parts of a file on their way
_CHUNK = 4 << 20
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 15.0

T = TypeVar("T")


def open_remote_store(
    url: str, scratch: Path, options: Mapping[str, str], part: int = 64 << 20, retries: int = 8
) -> RemoteStore:
    """`part`: bytes of a part of an upload, of which a file has 10,000 at most. `retries`: of a request that failed in
    passing. Requests nothing yet. Raises CheckpointError for an address or option that cannot be used."""
    if url.partition("://")[0] not in WRITABLE:
        schemes = ", ".join(f"{scheme}://" for scheme in ("file", *WRITABLE))
        raise CheckpointError(f"checkpoint.folder = {url!r}: give a folder, or a URL with {schemes}")
    backoff = {"init_backoff": timedelta(seconds=_FIRST_BACKOFF), "max_backoff": timedelta(seconds=_LONGEST_BACKOFF), "base": 2}
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(minutes=4), "backoff": backoff}
    try:
        remote = open_remote(url, _SILENCE, options)
        settings: dict[str, Any] = {"config": dict(options)} if options else {}
        handle = from_url(url, client_options=remote.handle.client_options, retry_config=retry, **settings)
    except (DataError, BaseError) as error:
        raise CheckpointError(f"checkpoint.folder: {error}") from None
    except StorageError as error:
        raise OSError(f"checkpoint.folder: {error}") from None
    return RemoteStore(remote.url, handle, scratch, part, retries)


class RemoteStore:
    """The Store at a URL. Thread-safe, but for begin, commit and abandon, which rank 0 calls one after another."""

    def __init__(self, url: str, handle: Any, scratch: Path, part: int, retries: int) -> None:
        self._url, self._handle, self._part, self._retries = url, handle, part, retries
        self._scratch = scratch / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._begun: int | None = None
        self._kept: int | None = None
        self._keeping = threading.Lock()

    @property
    def place(self) -> str:
        return self._url

    def steps(self) -> list[int]:
        return sorted((step for step, names in self._listed().items() if MANIFEST in names), reverse=True)

    def others(self) -> list[str]:
        found = []
        for step, names in sorted(self._listed().items()):
            if MANIFEST not in names:
                aside = f"{step_name(step)}/{DAMAGED}{MANIFEST}"
                found.append(aside if f"{DAMAGED}{MANIFEST}" in names else step_name(step))
        return found

    def begin(self, step: int) -> None:
        self._begun = None
        listed = self._listed()
        if MANIFEST in listed.get(step, {}):
            raise CheckpointError(f"{self.describe(step)} exists already; a checkpoint is never written over another")
        for other, names in listed.items():
            if other == step or not {MANIFEST, f"{DAMAGED}{MANIFEST}"} & names.keys():
                self._delete(other, names)
        self._begun = step

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[BinaryIO]:
        key = self._key(step, checked(self.describe(step), name))
        with self._told(key):
            upload = obstore.open_writer(self._handle, key, buffer_size=self._part, max_concurrency=_AT_ONCE)
            try:
                yield cast(BinaryIO, _Upload(upload, self._part))
                upload.close()
            except BaseException as error:
                with suppress(BaseError, OSError):  # closed already, or the store is out of reach: see the module's words
                    upload.__exit__(type(error), error, None)
                raise

    def commit(self, step: int, manifest: bytes) -> None:
        key = self._key(step, MANIFEST)
        try:
            self._again(key, lambda: obstore.put(self._handle, key, manifest, mode="create"))
        except AlreadyExistsError:  # by an attempt of ours whose answer was lost, or by another process
            if self.manifest(step) != manifest:
                self._begun = None
                raise CheckpointError(
                    f"{self.describe(step)} was committed by another process: are there two attempts of this run?"
                ) from None
        except NotSupportedError:
            self._again(key, lambda: obstore.put(self._handle, key, manifest))
        self._begun = None

    def abandon(self, step: int) -> None:
        if step != self._begun:  # committed, or never ours
            return
        with suppress(OSError):
            self._delete(step, self._listed(step).get(step, {}))  # a commit whose answer was lost is taken back too
            self._begun = None

    def manifest(self, step: int) -> bytes:
        key = self._key(step, MANIFEST)

        def read() -> bytes:
            answer = obstore.get(self._handle, key)
            if answer.meta["size"] > LARGEST_MANIFEST:
                raise CheckpointError(f"{self._url}/{key}: damaged: {answer.meta['size']} bytes are more than any manifest has")
            return bytes(answer.bytes())

        return self._again(key, read)

    def written(self, step: int) -> float:
        key = self._key(step, MANIFEST)
        return float(self._again(key, lambda: obstore.head(self._handle, key))["last_modified"].timestamp())

    def sizes(self, step: int) -> dict[str, int]:
        names = self._listed(step).get(step)
        if names is None:
            raise FileNotFoundError(self.describe(step))
        return {name: size for name, size in names.items() if name != MANIFEST}

    def local(self, step: int, name: str, sha256: str | None = None) -> Path:
        key = self._key(step, checked(self.describe(step), name))
        try:
            meta = self._again(key, lambda: obstore.head(self._handle, key))
            which = hashlib.sha256(f"{key} {meta['e_tag']} {meta['version']} {meta['size']}".encode()).hexdigest()[:16]
            target = self._room(step) / which / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with alone_in(target.parent):  # the ranks of a node, and the threads of each
                # The network's fault, not the store's, if it is whole the second time.
                if not target.exists() and not any(self._fetch(key, target, meta["size"], sha256) for _ in range(2)):
                    raise CheckpointError(f"{self._url}/{key}: altered: its bytes do not match the manifest's SHA-256")
        except FileNotFoundError:
            raise CheckpointError(f"{self._url}/{key}: missing") from None
        return target

    def release(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def remove(self, step: int) -> None:
        names = self._listed(step).get(step, {})
        self._delete(step, {MANIFEST: 0})
        with suppress(OSError):  # what stays is a partial, which goes before the next save
            self._delete(step, names)

    def set_aside(self, step: int) -> str:
        key, aside = self._key(step, MANIFEST), self._key(step, f"{DAMAGED}{MANIFEST}")
        self._again(key, lambda: obstore.copy(self._handle, key, aside))
        self._delete(step, {MANIFEST: 0})
        return aside

    def describe(self, step: int) -> str:
        return f"{self._url}/{step_name(step)}"

    def _key(self, step: int, name: str) -> str:
        return f"{step_name(step)}/{name}"

    def _listed(self, step: int | None = None) -> dict[int, dict[str, int]]:
        """Names and sizes of the objects of every step, or of one; of a name with a slash in it what is before it, and -1."""
        prefix = None if step is None else step_name(step)

        found: dict[int, dict[str, int]] = {}
        for path, size in self._within(prefix):
            folder, _, name = path.partition("/")
            first, slash, _ = name.partition("/")
            if (number := step_of(folder)) is not None and first:
                found.setdefault(number, {})[first] = -1 if slash else size
        return found

    def _within(self, prefix: str | None) -> list[tuple[str, int]]:
        """Keys and sizes of all objects there."""

        def read() -> list[tuple[str, int]]:
            return [(meta["path"], meta["size"]) for batch in obstore.list(self._handle, prefix=prefix) for meta in batch]

        return self._again(prefix or "", read)

    def _delete(self, step: int, names: Mapping[str, int]) -> None:
        """The manifest first. A folder among the names goes with all that is in it."""
        keys = [self._key(step, name) for name, size in names.items() if size >= 0 and name != MANIFEST]
        for key in (self._key(step, name) for name, size in names.items() if size < 0):
            keys += [path for path, _ in self._within(key)]
        if MANIFEST in names:
            self._drop([self._key(step, MANIFEST)])
        self._drop(keys)

    def _drop(self, keys: list[str]) -> None:
        with suppress(FileNotFoundError):
            if keys:
                self._again(keys[0], lambda: obstore.delete(self._handle, keys))

    def _room(self, step: int) -> Path:
        """Where files of a step are fetched to; those of other steps go, as only one is looked at at a time."""
        mine = self._scratch / step_name(step)
        with self._keeping:
            if self._kept != step:
                for other in self._scratch.glob("step-*"):
                    if other != mine:
                        shutil.rmtree(other, ignore_errors=True)
                self._kept = step
        return mine

    def _fetch(self, key: str, target: Path, size: int, sha256: str | None) -> bool:
        """Have the object at `target`, whole; False, and it is not there, if its bytes are not those of `sha256`."""

        def attempt() -> bool:
            digest = hashlib.sha256()
            try:
                with replacing(target) as file:
                    for chunk in obstore.get(self._handle, key).stream(min_chunk_size=_CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                    if file.tell() != size:
                        raise _Passing(f"{self._url}/{key}", f"{file.tell()} of {size} bytes arrived")
                    if sha256 is not None and digest.hexdigest() != sha256:
                        raise _Unlike
                return True
            except _Unlike:
                return False
            except OSError as error:
                if error.errno is None:  # the store's, not the disk's
                    raise
                raise OSError(error.errno, error.strerror, str(target)) from None

        return self._again(key, attempt)

    def _again(self, key: str, action: Callable[[], T]) -> T:
        """Attempts with growing, jittered pauses between them while the failure may pass, for what obstore does not try
        again itself: a body that ends early, what must not be done twice unasked.
        Raises FileNotFoundError, AlreadyExistsError, NotSupportedError, CheckpointError as they are; else OSError."""
        failures = 0
        while True:
            try:
                with self._told(key):
                    return action()
            except _Passing as error:
                failures += 1
                if failures > min(3, self._retries):
                    raise OSError(f"{self._url}/{key}: failed {failures} times, the last time with: {error.why}") from None
            pause = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**failures)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # a run's random state is not touched

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """What obstore raises as an OSError with the address and the cause; _Passing if it may be gone the next time."""
        address = f"{self._url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise (error if error.errno else FileNotFoundError(f"{address}: not there; check the address")) from None
        except (AlreadyExistsError, NotSupportedError):
            raise
        except (BaseError, OSError) as error:
            if isinstance(error, _Passing) or (isinstance(error, OSError) and error.errno is not None):
                raise
            line = _line(error)
            status = re.search(r"status code: (4\d\d)", line)
            if isinstance(error, PermissionDeniedError | UnauthenticatedError) or (status and status[1] in ("401", "403")):
                told = f"{address}: access refused; check the credentials and the bucket's policy ({line})"
                raise OSError(told) from None
            if status and status[1] not in ("408", "425", "429"):
                raise OSError(f"{address}: the store refuses the request; check address and region ({line})") from None
            if self._retries and f"after {self._retries} retries" in line:
                raise OSError(f"{address}: failed {self._retries + 1} times, the last time with: {line}") from None
            raise _Passing(address, line) from None


class _Passing(OSError):
    """A request failed for a reason that may be gone the next time."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"{address}: {why}")
        self.why = why


class _Unlike(Exception):
    """What arrived is whole and not what was written."""


class _Upload(io.RawIOBase):
    """A file being uploaded, as something to write to. A buffer is read where it lies: it must stay as it is until the
    file is closed."""

    def __init__(self, upload: Any, part: int) -> None:
        self._upload, self._size = upload, part

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not view.nbytes:  # nothing can be cast that has no bytes
            return 0
        view = view.cast("B")
        for start in range(0, len(view), self._size):  # a larger one would be sent in all its parts at once
            self._upload.write(view[start : start + self._size])
        return len(view)


def _line(error: Exception) -> str:
    """The first line of an error, without what a URL may hold of secrets."""
    return re.sub(r"\?\S*", "", (str(error) or type(error).__name__).splitlines()[0])[:500]
