"""Files of a remote dataset on the local disk: each fetched whole, verified, once a node, kept within a bound.

A file that is handed out has the size and digest that the index lists, whatever the network, the store or a dying
process did meanwhile. What passes (5xx, a cut connection, a timeout) is tried again; what does not (refused, not there)
is told at once. A request that takes longer than 95 of 100 of its size did is raced by a second one, within a budget
(Dean and Barroso, The Tail at Scale, 2013).
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

from mikoshi.data.errors import DataError, StorageError, of_storage
from mikoshi.data.io.cache import BYTES_KEY, FOLDER_KEY, Cache, Part, Wanted
from mikoshi.data.io.remote import Passing, Remote, Unlike, chunks, open_remote, settled

_POLL, _LONGEST_POLL = 0.02, 0.5  # seconds between looks at what another process is fetching
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.1, 15.0

T = TypeVar("T")


@dataclass(frozen=True)
class CacheLimits:
    """`bytes`: of the folder, all runs that share it together. `retries`: of a request that failed in passing.
    `timeout`: seconds without a byte from the store until a request is given up; twice that without progress of another
    process, until it is no longer waited for.
    `parallel`: files fetched ahead at once. `hedge`: second requests per request, at most (0: none). `user`: the run's
    name, as other runs on the folder will be told it. `private`: the folder's parent stands where all may write, and must be
    this user's alone."""

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
    """Counts since the store was opened. `hits`: fetches that found the file; `fetched`: bytes received, those of lost
    races and failed attempts included; `waited`: seconds that fetches kept their callers waiting."""

    hits: int = 0
    misses: int = 0
    requests: int = 0
    fetched: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    evictions: int = 0
    waited: float = 0.0


class _Pace:
    """How long whole requests took lately, by size class (a factor of two)."""

    _ENOUGH = 20

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def saw(self, size: int, seconds: float) -> None:
        self._seen.setdefault(size.bit_length(), deque(maxlen=200)).append(seconds)

    def p95(self, size: int) -> float | None:
        """Seconds; None while too few were seen."""
        seen = sorted(self._seen.get(size.bit_length(), ()))
        return seen[int(0.95 * len(seen))] if len(seen) >= self._ENOUGH else None


@dataclass
class _Patience:
    """Has what is looked at stayed the same for `seconds`?"""

    seconds: float
    last: object = None
    since: float = field(default_factory=time.monotonic)

    def over(self, sight: object) -> bool:
        if sight != self.last:
            self.last, self.since = sight, time.monotonic()
        return time.monotonic() - self.since > self.seconds


class Store:
    """A remote folder and its cache. One per process and URL; thread-safe; not to be used across a fork."""

    def __init__(self, remote: Remote, limits: CacheLimits) -> None:
        self.url, self.limits = remote.url, limits
        self._remote, self._cache = remote, Cache(limits.folder, limits.bytes, limits.user, limits.timeout, limits.private)
        self._pace, self._random = _Pace(), random.Random()  # its own: a run's random state is not touched
        self._stats, self._counting = Stats(), threading.Lock()
        self._fetching: dict[str, asyncio.Task[None]] = {}  # these three belong to the loop's thread
        self._ahead: deque[Wanted] = deque()
        self._runners: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name=f"store {self.url}", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _shut_down, self._loop, self._thread, self._cache, remote)

    def close(self) -> None:
        """Stop fetching; files in the folder stay. What was half-fetched is removed."""
        self._end()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> bytes:
        """The bytes of a small file, not kept. Raises DataError or StorageError, as `fetch` does."""
        return self._wait(self._again(name, lambda: self._whole(name)))

    @contextmanager
    def fetch(self, wanted: Wanted) -> Iterator[Path]:
        """The path of the verified local copy, which stays there until the block ends. Map or open it inside the block:
        a map outlives the file's eviction (its disk space is then free once the map is gone).

        Raises DataError where it is larger than the limit, not there, refused, not the file listed (twice), or where the
        disk is full with nothing left to evict; StorageError where it fails more than `retries` times, or the disk does.
        """
        if wanted.size > self.limits.bytes:
            told = f"{self.limits.bytes} is less than {wanted.name} alone ({wanted.size} bytes)"
            raise DataError(f"{BYTES_KEY}: {told}: give it room for several such files")
        began, patience = time.monotonic(), _Patience(self.limits.timeout)
        held = self._hold(wanted)
        self._count(hits=held is not None, misses=held is None)
        while held is None:
            self._wait(self._ensure(wanted))
            held = self._hold(wanted)
            if held is None and patience.over(None):  # evicted again and again before it could be opened
                raise self._too_small(wanted)
        self._count(waited=time.monotonic() - began)
        try:
            yield self._cache.path(wanted)
        finally:
            os.close(held)

    def _hold(self, wanted: Wanted) -> int | None:
        try:
            return self._cache.hold(wanted)
        except OSError as error:
            raise self._unusable(error) from None

    def ahead(self, wanted: Iterable[Wanted]) -> None:
        """Fetch these in the background, in this order, in place of what earlier calls asked for and has not begun. Only
        as many as fit in half the limit: more would push each other out. An error is kept for the `fetch` that meets it."""
        room, fit = self.limits.bytes // 2, deque[Wanted]()
        for one in wanted:
            room -= one.size
            if room < 0:
                break
            fit.append(one)
        self._loop.call_soon_threadsafe(self._look_ahead, fit)

    def stats(self) -> Stats:
        with self._counting:
            return replace(self._stats, evictions=self._cache.evicted)

    def others(self) -> list[str]:
        """The other runs that have this cache folder open, by name, process, host and limit: for the run's log."""
        return self._cache.others()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _count(self, **more: float) -> None:
        with self._counting:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    def _look_ahead(self, wanted: deque[Wanted]) -> None:
        self._ahead = wanted
        for _ in range(min(len(wanted), self.limits.parallel - len(self._runners))):
            runner = self._loop.create_task(self._run_ahead())
            self._runners.add(runner)
            runner.add_done_callback(self._runner_ended)

    def _runner_ended(self, runner: asyncio.Task[None]) -> None:
        self._runners.discard(runner)
        _seen(runner)

    async def _run_ahead(self) -> None:
        while self._ahead:
            with suppress(DataError, StorageError, OSError):
                await self._ensure(self._ahead.popleft())

    async def _ensure(self, wanted: Wanted) -> None:
        """Have the file in the folder; all who want it in this process wait for one task."""
        task = self._fetching.get(wanted.sha256)
        if task is None:
            task = self._fetching[wanted.sha256] = self._loop.create_task(self._obtain(wanted))
            task.add_done_callback(lambda done: self._fetch_ended(wanted, done))
        await asyncio.shield(task)

    def _fetch_ended(self, wanted: Wanted, task: asyncio.Task[None]) -> None:
        del self._fetching[wanted.sha256]
        _seen(task)

    async def _obtain(self, wanted: Wanted) -> None:
        """Evicts where the disk is full. Raises DataError where that does not help, and what the disk says otherwise."""
        full = 0
        while True:
            try:
                return await self._fetched_by_someone(wanted)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise self._unusable(error) from error
                full += not self._cache.make_room(wanted.size)
                if full > 2:  # not at once: what others were writing may be whole by now, and room to be made
                    told = f"the disk of {self.limits.folder} is full, with nothing of the cache left to evict"
                    way = f"{wanted.name} needs {wanted.size} bytes: free some or give another folder"
                    raise DataError(f"{FOLDER_KEY}: {told}; {way}") from None
                await self._pause(full)

    async def _fetched_by_someone(self, wanted: Wanted) -> None:
        """By this process, or by another that is at it already, as long as that one gets on."""
        if self._cache.has(wanted):
            return
        patience = _Patience(2 * self.limits.timeout)  # another's silent request ends sooner, and the next one begins
        pause = _POLL
        with self._cache.claim(wanted) as claimed:
            while not claimed() and not patience.over(self._cache.sight(wanted)):
                await asyncio.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_POLL)
                if self._cache.has(wanted):
                    return
            if not self._cache.has(wanted):
                await self._again(wanted.name, lambda: self._race(wanted))

    async def _again(self, name: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Attempts with growing, jittered pauses between them, until one succeeds, DataError or StorageError."""
        failures, unlike = 0, 0
        while True:
            try:
                return await attempt()
            except Unlike as error:
                unlike += 1
                if unlike > 1:
                    told = f"{self.url}/{name}: changed under us: {error}"
                    raise DataError(f"{told}, twice; restore it or prepare the data again") from None
            except Passing as error:
                failures += 1
                if failures > self.limits.retries:
                    told = f"{self.url}/{name}: failed {failures} times, the last time with: {error}"
                    raise StorageError(f"{told}; try again when the store answers") from None
            self._count(retries=1)
            await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        await asyncio.sleep(min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**failures) * self._random.uniform(0.5, 1))

    async def _whole(self, name: str) -> bytes:
        self._count(requests=1)
        async with aclosing(chunks(self._remote, name, None)) as body:
            return b"".join([chunk async for chunk in body])

    async def _race(self, wanted: Wanted) -> None:
        """One request and, where it is late, a second one: the first to be whole is the file, the other is dropped."""
        parts = [await self._reserved(wanted)]
        first = self._loop.create_task(self._request(wanted, parts[0]))
        began, running, error = time.monotonic(), {first}, None
        try:
            late = self._pace.p95(wanted.size)
            done, _ = await asyncio.wait(running, timeout=self.limits.timeout if late is None else late)
            if not done and (part := self._hedge(wanted)) is not None:
                parts.append(part)
                running.add(self._loop.create_task(self._request(wanted, part)))
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (failed := task.exception()) is None:
                        self._count(hedges_won=task is not first)
                        self._pace.saw(wanted.size, time.monotonic() - began)  # of a lost first: at least this
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

    def _hedge(self, wanted: Wanted) -> Part | None:
        stats = self.stats()
        if self.limits.hedge <= 0 or stats.hedges >= self.limits.hedge * stats.requests:
            return None
        with suppress(OSError):  # a disk with no room for both parts
            if (part := self._cache.reserve(wanted)) is not None:
                self._count(hedges=1)
                return part
        return None

    async def _reserved(self, wanted: Wanted) -> Part:
        patience, pause = _Patience(2 * self.limits.timeout), _POLL
        while (part := self._cache.reserve(wanted)) is None:
            if patience.over(self._cache.sight()):
                raise self._too_small(wanted)
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL)
        return part

    async def _request(self, wanted: Wanted, part: Part) -> None:
        """Have `part` filled, verified and put in the folder."""
        self._count(requests=1)
        async with aclosing(chunks(self._remote, wanted.name, wanted.size)) as body:
            async for chunk in body:
                self._count(fetched=len(chunk))
                await asyncio.to_thread(part.write, chunk)
        if part.written != wanted.size:
            raise Passing(f"{part.written} of {wanted.size} bytes arrived")
        if part.sha256 != wanted.sha256:
            raise Unlike(f"its digest is {part.sha256}, the index lists {wanted.sha256}")
        if wanted.check is not None:
            try:
                wanted.check(part.path)
            except DataError as error:
                raise Unlike(str(error)) from None
        await asyncio.to_thread(self._cache.commit, part, wanted)

    def _unusable(self, error: OSError) -> DataError | StorageError:
        return of_storage(error, f"{FOLDER_KEY}: cannot use {self.limits.folder}: {error.strerror or error}")

    def _too_small(self, wanted: Wanted) -> DataError:
        told = f"{self.limits.bytes} has no room for {wanted.name} ({wanted.size} bytes) beside the files in use"
        return DataError(f"{BYTES_KEY}: {told} by {self.others() or 'this run'}: raise it")


def open_store(url: str, limits: CacheLimits, options: Mapping[str, str] | None = None) -> Store:
    """The remote folder at `url` (s3:// gs:// az:// http:// https:// file://). `options` go to the store as they are:
    endpoint, region, skip_signature = "true" for a public bucket, ...; credentials come from the environment or the
    machine's role. Nothing is requested yet. Raises DataError for an address, option or folder that cannot be used."""
    return Store(open_remote(url, limits.timeout, options or {}), limits)


def _seen(task: asyncio.Task[None]) -> None:
    """Its error, if any, is told by who waits for it, and nowhere else."""
    if not task.cancelled():
        task.exception()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, thread: threading.Thread, cache: Cache, remote: Remote) -> None:
    """End the loop's tasks, then the loop, its thread and the cache. Also run when the interpreter exits."""

    async def stop() -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await settled(remote)
        loop.stop()

    if threading.current_thread() is thread:  # the last task let go of the store
        loop.create_task(stop())
    else:
        asyncio.run_coroutine_threadsafe(stop(), loop)
        thread.join()
    cache.close()
