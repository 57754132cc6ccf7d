"""Files of a remote dataset on the local disk: each is fetched whole, verified, once per node, within a size limit.

Every file handed out has the size and digest that the index lists, whatever the network, the store or a dying process did.
Transient failures (5xx, a lost connection, a timeout) are retried; lasting ones (refused, not found) are raised at once. A
request slower than the 95th percentile of its size is hedged by a second one, within a budget (Dean and Barroso 2013, "The Tail
at Scale").
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from mikoshi.data.errors import DataError, StorageError, storage_error
from mikoshi.data.io.cache import BYTES_KEY, FOLDER_KEY, Cache, IndexedFile, PartialFile
from mikoshi.data.io.remote import MismatchError, Remote, TransientError, chunks, drain_pending, open_remote

_POLL, _LONGEST_POLL = 0.02, 0.5  # seconds between looks at what another process is fetching
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 15.0

T = TypeVar("T")


@dataclass(frozen=True)
class CacheLimits:
    """Limits of a cache folder and of requests.

    bytes: size of the folder, for all runs that share it.
    retries: of a request that failed transiently.
    timeout: seconds without a byte until a request is given up; after twice that without progress, another process is no longer
        waited for.
    parallel: files prefetched at once.
    hedge: second requests per request, at most (0: none).
    user: the run's name, as other runs on the folder see it.
    private: the folder's parent is in a place where all may write, and must belong to this user alone.
    """

    folder: Path
    bytes: int = 64 << 30
    retries: int = 5
    timeout: float = 60.0
    parallel: int = 4
    hedge: float = 0.1
    user: str = ""
    private: bool = False


@dataclass(frozen=True)
class Stats:
    """Counts since the store was opened.

    hits: fetches that found the file in the cache.
    fetched: bytes received, including lost races and failed attempts.
    waited: seconds for which fetches blocked their callers.
    """

    hits: int = 0
    misses: int = 0
    requests: int = 0
    fetched: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    evictions: int = 0
    waited: float = 0.0


class _LatencyTracker:
    """Durations of recent whole requests, by size class (powers of two)."""

    _ENOUGH = 20

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def record(self, size: int, seconds: float) -> None:
        """Add a request of `size` bytes that took so many seconds."""
        self._seen.setdefault(size.bit_length(), deque(maxlen=200)).append(seconds)

    def p95(self, size: int) -> float | None:
        """95th percentile in seconds; None while there are too few requests."""
        seen = sorted(self._seen.get(size.bit_length(), ()))
        return seen[int(0.95 * len(seen))] if len(seen) >= self._ENOUGH else None


@dataclass
class _StallTimer:
    """Tells whether a value has not changed for more than `seconds`."""

    seconds: float
    last: object = None
    since: float = field(default_factory=time.monotonic)

    def stalled(self, snapshot: object) -> bool:
        """Whether `snapshot` has been the same for too long."""
        if snapshot != self.last:
            self.last, self.since = snapshot, time.monotonic()
        return time.monotonic() - self.since > self.seconds


class Store:
    """A remote folder and its local cache. Use one per process and URL. Thread-safe; must not be used across a fork."""

    def __init__(self, remote: Remote, limits: CacheLimits) -> None:
        self.url, self.limits = remote.url, limits
        self._remote, self._cache = remote, Cache(limits.folder, limits.bytes, limits.user, limits.timeout, limits.private)
        self._pace, self._random = _LatencyTracker(), random.Random()  # its own: a run's random state is not touched
        self._stats, self._counting = Stats(), threading.Lock()
        self._fetching: dict[str, asyncio.Task[None]] = {}  # these three belong to the loop's thread
        self._ahead: deque[IndexedFile] = deque()
        self._runners: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name=f"store {self.url}", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _shut_down, self._loop, self._thread, self._cache, remote)

    def close(self) -> None:
        """Stop fetching. Cached files stay; partial ones are removed."""
        self._end()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> bytes:
        """The bytes of a small file, which is not cached. Raises DataError or StorageError, as `fetch` does."""
        return self._run_in_loop(self._retry(name, lambda: self._read_whole(name)))

    @contextmanager
    def fetch(self, entry: IndexedFile) -> Iterator[Path]:
        """Yield the path of the verified local copy, which is not evicted before the block ends.

        Open or map the file inside the block: a mapping stays valid after eviction (its disk space is freed once the mapping is
        gone).

        Raises DataError if the file is larger than the limit, missing, refused, twice not the file listed, or if the disk is
        full with nothing left to evict. Raises StorageError if it fails more than `retries` times, or if the disk fails.
        """
        if entry.size > self.limits.bytes:
            reason = f"{self.limits.bytes} is less than {entry.name} alone ({entry.size} bytes)"
            raise DataError(f"{BYTES_KEY}: {reason}: give it room for several such files")
        began, stall = time.monotonic(), _StallTimer(self.limits.timeout)
        handle = self._open_cached(entry)
        self._count(hits=handle is not None, misses=handle is None)
        while handle is None:
            self._run_in_loop(self._ensure(entry))
            handle = self._open_cached(entry)
            if handle is None and stall.stalled(None):  # evicted again and again before it could be opened
                raise self._limit_error(entry)
        self._count(waited=time.monotonic() - began)
        try:
            yield self._cache.path(entry)
        finally:
            os.close(handle)

    def _open_cached(self, entry: IndexedFile) -> int | None:
        try:
            return self._cache.open_shared(entry)
        except OSError as error:
            raise self._folder_error(error) from None

    def prefetch(self, entries: Iterable[IndexedFile]) -> None:
        """Fetch these files in the background, in order. Replaces what earlier calls requested and has not begun.

        Only as many as fit in half the limit are fetched, since more would evict each other. Errors are raised by the `fetch`
        of that file.
        """
        room, fit = self.limits.bytes // 2, deque[IndexedFile]()
        for one in entries:
            room -= one.size
            if room < 0:
                break
            fit.append(one)
        self._loop.call_soon_threadsafe(self._start_prefetch, fit)

    def stats(self) -> Stats:
        """Counts since the store was opened."""
        with self._counting:
            return replace(self._stats, evictions=self._cache.evicted)

    def other_users(self) -> list[str]:
        """The other runs that have this cache folder open: name, process, host and limit of each."""
        return self._cache.other_users()

    def _run_in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _count(self, **more: float) -> None:
        with self._counting:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    def _start_prefetch(self, entries: deque[IndexedFile]) -> None:
        self._ahead = entries
        for _ in range(min(len(entries), self.limits.parallel - len(self._runners))):
            runner = self._loop.create_task(self._prefetch_worker())
            self._runners.add(runner)
            runner.add_done_callback(self._runner_ended)

    def _runner_ended(self, runner: asyncio.Task[None]) -> None:
        self._runners.discard(runner)
        _consume_exception(runner)

    async def _prefetch_worker(self) -> None:
        while self._ahead:
            with suppress(DataError, StorageError, OSError):
                await self._ensure(self._ahead.popleft())

    async def _ensure(self, entry: IndexedFile) -> None:
        """Have the file in the cache. All callers in this process that want it wait for one task."""
        task = self._fetching.get(entry.sha256)
        if task is None:
            task = self._fetching[entry.sha256] = self._loop.create_task(self._obtain(entry))
            task.add_done_callback(lambda done: self._fetch_ended(entry, done))
        await asyncio.shield(task)

    def _fetch_ended(self, entry: IndexedFile, task: asyncio.Task[None]) -> None:
        del self._fetching[entry.sha256]
        _consume_exception(task)

    async def _obtain(self, entry: IndexedFile) -> None:
        """Have the file in the cache, evicting others if the disk is full. Raises DataError if that does not help; other
        disk errors as they are."""
        failures = 0
        while True:
            try:
                return await self._fetch_once_per_node(entry)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise self._folder_error(error) from error
                failures += not self._cache.make_room(entry.size)
                if failures > 2:  # not at once: what others were writing may be whole by now, and room to be made
                    reason = f"the disk of {self.limits.folder} is full, with nothing of the cache left to evict"
                    remedy = f"{entry.name} needs {entry.size} bytes: free some or give another folder"
                    raise DataError(f"{FOLDER_KEY}: {reason}; {remedy}") from None
                await self._pause(failures)

    async def _fetch_once_per_node(self, entry: IndexedFile) -> None:
        """Fetch the file, or wait for another process that is fetching it, as long as that one makes progress."""
        if self._cache.has(entry):
            return
        stall = _StallTimer(2 * self.limits.timeout)  # another's silent request ends sooner, and the next one begins
        pause = _POLL
        with self._cache.claim(entry) as claimed:
            while not claimed() and not stall.stalled(self._cache.write_progress(entry)):
                await asyncio.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_POLL)
                if self._cache.has(entry):
                    return
            if not self._cache.has(entry):
                await self._retry(entry.name, lambda: self._hedged_request(entry))

    async def _retry(self, name: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run `attempt` until it succeeds or raises DataError or StorageError, with growing, jittered pauses."""
        failures, mismatches = 0, 0
        while True:
            try:
                return await attempt()
            except MismatchError as error:
                mismatches += 1
                if mismatches > 1:
                    reason = f"{self.url}/{name}: changed under us: {error}"
                    raise DataError(f"{reason}, twice; restore it or prepare the data again") from None
            except TransientError as error:
                failures += 1
                if failures > self.limits.retries:
                    reason = f"{self.url}/{name}: failed {failures} times, the last time with: {error}"
                    raise StorageError(f"{reason}; try again when the store answers") from None
            self._count(retries=1)
            await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        await asyncio.sleep(min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**failures) * self._random.uniform(0.5, 1))

    async def _read_whole(self, name: str) -> bytes:
        self._count(requests=1)
        async with aclosing(chunks(self._remote, name, None)) as body:
            return b"".join([chunk async for chunk in body])

    async def _hedged_request(self, entry: IndexedFile) -> None:
        """Request the file, and a second time if the first request is late. The first to complete wins; the other is
        cancelled."""
        parts = [await self._reserve(entry)]
        first = self._loop.create_task(self._request(entry, parts[0]))
        started, running, error = time.monotonic(), {first}, None
        try:
            late = self._pace.p95(entry.size)
            done, _ = await asyncio.wait(running, timeout=self.limits.timeout if late is None else late)
            if not done and (part := self._hedge(entry)) is not None:
                parts.append(part)
                running.add(self._loop.create_task(self._request(entry, part)))
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (failed := task.exception()) is None:
                        self._count(hedges_won=task is not first)
                        self._pace.record(entry.size, time.monotonic() - started)  # of a lost first: at least this
                        return
                    error = error or failed
            assert error is not None
            raise error
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for part in parts:
                part.end(None)

    def _hedge(self, entry: IndexedFile) -> PartialFile | None:
        stats = self.stats()
        if self.limits.hedge <= 0 or stats.hedges >= self.limits.hedge * stats.requests:
            return None
        with suppress(OSError):  # a disk with no room for both parts
            if (part := self._cache.reserve(entry)) is not None:
                self._count(hedges=1)
                return part
        return None

    async def _reserve(self, entry: IndexedFile) -> PartialFile:
        stall, pause = _StallTimer(2 * self.limits.timeout), _POLL
        while (part := self._cache.reserve(entry)) is None:
            if stall.stalled(self._cache.write_progress()):
                raise self._limit_error(entry)
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL)
        return part

    async def _request(self, entry: IndexedFile, part: PartialFile) -> None:
        """Fill `part`, verify it and put it in the cache."""
        self._count(requests=1)
        async with aclosing(chunks(self._remote, entry.name, entry.size)) as body:
            async for chunk in body:
                self._count(fetched=len(chunk))
                await asyncio.to_thread(part.write, chunk)
        if part.written != entry.size:
            raise TransientError(f"{part.written} of {entry.size} bytes arrived")
        if part.sha256 != entry.sha256:
            raise MismatchError(f"its digest is {part.sha256}, the index lists {entry.sha256}")
        if entry.check is not None:
            try:
                entry.check(part.path)
            except DataError as error:
                raise MismatchError(str(error)) from None
        await asyncio.to_thread(self._cache.commit, part, entry)

    def _folder_error(self, error: OSError) -> DataError | StorageError:
        return storage_error(error, f"{FOLDER_KEY}: cannot use {self.limits.folder}: {error.strerror or error}")

    def _limit_error(self, entry: IndexedFile) -> DataError:
        reason = f"{self.limits.bytes} has no room for {entry.name} ({entry.size} bytes) beside the files in use"
        return DataError(f"{BYTES_KEY}: {reason} by {self.other_users() or 'this run'}: raise it")


def open_store(url: str, limits: CacheLimits, options: Mapping[str, str] | None = None) -> Store:
    """The remote folder at `url` (s3:// gs:// az:// http:// https:// file://). Requests nothing yet.

    options: passed to the store unchanged: endpoint, region, skip_signature = "true" for a public bucket, ... Credentials come
        from the environment or the machine's role.

    Raises DataError for an address, option or folder that cannot be used.
    """
    return Store(open_remote(url, limits.timeout, options or {}), limits)


def _consume_exception(task: asyncio.Task[None]) -> None:
    """Mark a task's exception as seen: whoever awaits the task raises it."""
    if not task.cancelled():
        task.exception()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, thread: threading.Thread, cache: Cache, remote: Remote) -> None:
    """End the loop's tasks, the loop, its thread and the cache. Also runs when the interpreter exits."""

    async def stop() -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await drain_pending(remote)
        loop.stop()

    if threading.current_thread() is thread:  # the last task let go of the store
        loop.create_task(stop())
    else:
        asyncio.run_coroutine_threadsafe(stop(), loop)
        thread.join()
    cache.close()
