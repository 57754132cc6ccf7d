"""Saver: a save copies the state, then writes in the background until all ranks know that it is whole or that it failed.

    begin     the copy: all that training waits for
    (thread)  each rank writes and digests its files
    advance   when all have: the files' digests are gathered and rank 0 commits in its thread; then it returns the Outcome

No collective runs outside of the main thread. A failure on one rank fails the save on all: the partial checkpoint is removed,
and the next save works. The main threads wait in slices (checkpoint.waiting), as a store may be slower than the timeout of a
process group.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mikoshi.parallel.sharding import local
from mikoshi.trainer.checkpoint.agree import all_gather_json, cause, gather_json, rank_and_world
from mikoshi.trainer.checkpoint.manifest import FileEntry, Manifest, encode, provenance
from mikoshi.trainer.checkpoint.pieces import bytes_of, write
from mikoshi.trainer.checkpoint.plan import PlannedFile, RankFiles, plan_save
from mikoshi.trainer.checkpoint.retention import Keep, prune
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import step_folder
from mikoshi.trainer.checkpoint.waiting import Task, on_first_rank_unhurried, wait_for_all
from mikoshi.trainer.errors import CheckpointError

_WRITERS = 2  # one waits for the disk while the other digests


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks except for the seconds.

    error: why it failed; then nothing of it is left.
    stall_seconds: for how long training stood still.
    seconds: from `begin` to the end.
    """

    step: int
    path: str
    error: str | None
    stall_seconds: float
    seconds: float


@dataclass
class _PendingSave:
    """The save that is running.

    task: this rank's thread, which first writes files and then, on rank 0, commits.
    """

    step: int
    record: dict[str, Any]
    begun: float
    task: Task
    stop: threading.Event
    prune: bool
    stall: float = 0.0
    committing: bool = False


class Saver:
    """The saves of one run, one at a time. The layout and the names of the state must not change between saves."""

    def __init__(self, store: Store, keep: Keep, background: bool = True) -> None:
        self.store, self.keep, self.background = store, keep, background
        self._rank_files: RankFiles | None = None
        self._staged: list[_Staged] = []
        self._pending: _PendingSave | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is running; the same on all ranks."""
        return self._pending is not None

    def begin(self, step: int, state: dict[str, Tensor], record: dict[str, Any], prune: bool = True) -> None:
        """Copy the state and start writing it; without `background`, write it from where it is. Collective.

        Failures to write are in the Outcome. Raises CheckpointError if `step` exists already or the state cannot be saved,
        and RuntimeError while another save is running.

        record: what the run needs to resume, plain JSON.
        prune: False keeps all older checkpoints when this one is committed.
        """
        if self._pending is not None:
            raise RuntimeError(f"the save of step {self._pending.step} is under way: conclude it before the next")
        begun, stop = time.perf_counter(), threading.Event()
        try:
            on_first_rank_unhurried(lambda: self.store.begin(step))
            self._rank_files = self._rank_files or plan_save(state)
            task = self._start_writing(step, self._rank_files, state, stop)
        except OSError as error:  # of rank 0's store, raised on all ranks
            task = Task.finished(error) if rank_and_world()[0] == 0 else Task.finished(None)
        except CheckpointError:
            if self._rank_files is None:
                on_first_rank_unhurried(lambda: self.store.abandon(step))
            raise
        self._pending = _PendingSave(step, {**record, "step": step}, begun, task, stop, prune)
        if not self.background:
            wait_for_all(task, stop)
        self._pending.stall = time.perf_counter() - begun

    def flags(self) -> tuple[bool, bool]:
        """Returns (failed, pending) of this rank, of which all ranks agree on (any, any) before they call `advance`."""
        return (False, False) if self._pending is None else self._pending.task.flags

    def advance(self, failed: bool, pending: bool) -> Outcome | None:
        """Continue with what the ranks agreed on; returns the Outcome once the save has ended. Collective.

        failed: whether any rank has failed.
        pending: whether any rank is still writing.
        """
        save = self._pending
        if save is None:
            return None
        if failed:
            save.stop.set()  # stop writing what is no longer needed
        if pending:
            return None
        if failed:
            return self._fail(save)
        if save.committing:
            return self._finish(save, None)
        stamps = _gather_stamps(save.task.result)
        save.committing = True
        if stamps is not None:
            assert self._rank_files is not None
            manifest = Manifest(save.record, stamps, self._rank_files.tensors, provenance(save.record, rank_and_world()[1]))
            save.task = Task(lambda: self._commit(save.step, manifest, save.prune))
        else:
            save.task = Task.finished(None)
        return None

    def conclude(self) -> Outcome | None:
        """Wait until the running save is committed or has failed; returns its Outcome, or None if there is none. Collective."""
        outcome = None
        while self._pending is not None:
            failed = wait_for_all(self._pending.task, self._pending.stop)
            outcome = self.advance(failed, pending=False)
        return outcome

    def _start_writing(self, step: int, rank_files: RankFiles, state: dict[str, Tensor], stop: threading.Event) -> Task:
        """Start writing this rank's files. A failure here, as for lack of memory, becomes this rank's error."""
        try:
            parts: list[Callable[[], Iterable[Tensor]]]
            if self.background:
                self._staged = self._staged or [_Staged.allocate(file, state) for file in rank_files.files]
                _copy(self._staged, state)
                parts = [staged.parts for staged in self._staged]
            else:
                parts = [_parts_in_place(file, state) for file in rank_files.files]
            writes = [_FileWrite(file, part) for file, part in zip(rank_files.files, parts, strict=True)]
            return Task(lambda: _write_all(self.store, step, writes, stop, low_priority=self.background))
        except (OSError, RuntimeError, MemoryError) as error:
            return Task.finished(error)

    def _commit(self, step: int, manifest: Manifest, prune_older: bool) -> None:
        self.store.commit(step, encode(manifest))
        if not prune_older:
            return
        with suppress(OSError, CheckpointError):  # the save is committed; the next save tries the removal again
            prune(self.store, self.keep, {step}, step)

    def _fail(self, save: _PendingSave) -> Outcome:
        error = save.task.error
        errors = all_gather_json(None if error is None else cause(error))
        rank, why = next((rank, why) for rank, why in enumerate(errors) if why is not None)
        on_first_rank_unhurried(lambda: self.store.abandon(save.step))
        return self._finish(save, f"rank {rank}: {why}")

    def _finish(self, save: _PendingSave, error: str | None) -> Outcome:
        self._pending = None
        seconds = time.perf_counter() - save.begun
        return Outcome(save.step, self.store.describe(save.step), error, save.stall, seconds)


def save(folder: Path, step: int, state: dict[str, Tensor], record: dict[str, Any], keep: int | Keep) -> Path:
    """Write a checkpoint into a folder and remove those that `keep` does not keep; returns its folder. Collective.

    Raises CheckpointError on every rank if any rank could not write; nothing half-written is left.
    """
    saver = Saver(LocalStore(folder), keep if isinstance(keep, Keep) else Keep(keep), background=False)
    saver.begin(step, state, record)
    outcome = saver.conclude()
    target = step_folder(folder, step)
    if outcome is None or outcome.error is not None:
        reason = None if outcome is None else outcome.error
        raise CheckpointError(f"{target}: the checkpoint could not be written: {reason}; nothing was left behind")
    return target


@dataclass(frozen=True)
class _Staged:
    """A buffer in host memory for a file's bytes in their final order, reused from save to save."""

    names: tuple[str, ...]
    bytes: Tensor
    views: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, file: PlannedFile, state: dict[str, Tensor]) -> _Staged:
        names = tuple(box.name for box in file.boxes)
        pinned = any(local(state[name]).is_cuda for name in names)
        buffer = torch.empty(file.contents.bytes, dtype=torch.uint8, pin_memory=pinned)
        views = [buffer[p.start : p.end].view(p.dtype).view(p.shape) for p in file.contents.pieces]
        return cls(names, buffer, tuple(views))

    def parts(self) -> list[Tensor]:
        return [self.bytes]


def _copy(staged: list[_Staged], state: dict[str, Tensor]) -> None:
    """Copy what this rank will write. Returns when the copies are complete."""
    devices = set()
    for file in staged:
        sources = [local(state[name]).detach() for name in file.names]
        devices |= {source.device for source in sources if source.is_cuda}
        for name, source, view in zip(file.names, sources, file.views, strict=True):
            _check_same(name, source, view.shape, view.dtype)
            view.copy_(source, non_blocking=True)
    for device in devices:
        torch.cuda.synchronize(device)


def _parts_in_place(file: PlannedFile, state: dict[str, Tensor]) -> Callable[[], Iterator[Tensor]]:
    """Returns a function that yields the bytes of a file from the tensors themselves, one after another."""
    sources = [local(state[box.name]).detach() for box in file.boxes]
    for box, source in zip(file.boxes, sources, strict=True):
        _check_same(box.name, source, box.shape, box.dtype)
    return lambda: (bytes_of(source) for source in sources)


def _check_same(name: str, source: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(source.shape) != tuple(shape) or source.dtype != dtype:
        change = f"{source.dtype} of {tuple(source.shape)}, at the first save {dtype} of {tuple(shape)}"
        raise RuntimeError(f"{name} is {change}: the layout must not change")


@dataclass(frozen=True)
class _FileWrite:
    file: PlannedFile
    parts: Callable[[], Iterable[Tensor]]


def _write_all(
    store: Store, step: int, writes: list[_FileWrite], stop: threading.Event, low_priority: bool
) -> list[tuple[str, FileEntry]]:
    """Write and digest the files, a few at once. Raises the first error after all threads have ended."""
    remaining = iter(writes)
    stamps: list[tuple[str, FileEntry]] = []
    lock = threading.Lock()

    def write_files() -> None:
        if low_priority:
            _yield_to_training()
        while True:
            with lock:
                file_write = next(remaining, None)
            if file_write is None:
                return
            contents = file_write.file.contents
            try:
                with store.create(step, contents.name) as out:
                    digests = write(out, contents.header, file_write.parts(), stop)
            except BaseException:
                stop.set()
                raise
            stamps.append((contents.name, {"size": len(contents.header) + contents.bytes, **digests}))

    threads = [Task(write_files) for _ in writes[:_WRITERS]]
    for thread in threads:
        thread.wait()
    errors = [thread.error for thread in threads if thread.error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, InterruptedError)):
        raise error
    return sorted(stamps, key=lambda stamp: stamp[0])


def _yield_to_training() -> None:
    if sys.platform == "linux":  # where threads have their own niceness
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _gather_stamps(own: list[tuple[str, FileEntry]]) -> dict[str, FileEntry] | None:
    """Returns all ranks' sizes and digests by file on rank 0, and None elsewhere. Collective."""
    gathered = gather_json(own)
    return None if gathered is None else {name: entry for stamps in gathered for name, entry in stamps}
