"""Saver: a save is a copy of the state and then somebody else's work, until all ranks know that it is whole, or that it failed.

    begin     the copy: all that training waits for
    (thread)  each rank writes and digests its files
    advance   when all have: the stamps are gathered, rank 0 commits in its thread; when it has: the Outcome

No collective is called off the main thread. What fails anywhere, fails everywhere: the partial goes, the next save works.
The main threads wait in slices (checkpoint.waiting): a store may be slower than a process group is patient.
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
from mikoshi.trainer.checkpoint.agree import cause, of_all_ranks, place, to_first_rank
from mikoshi.trainer.checkpoint.manifest import FileEntry, Manifest, encode, provenance
from mikoshi.trainer.checkpoint.pieces import bytes_of, write
from mikoshi.trainer.checkpoint.plan import Share, Written, plan_save
from mikoshi.trainer.checkpoint.retention import Keep, prune
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import step_folder
from mikoshi.trainer.checkpoint.waiting import Task, on_first_rank_in_time, wait_for_all
from mikoshi.trainer.errors import CheckpointError

_WRITERS = 2  # one waits for the disk while the other digests


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks but for the seconds. `error`: why it failed; then nothing of it is left.
    `stall_seconds`: for how long training stood still; `seconds`: from `begin` to now."""

    step: int
    path: str
    error: str | None
    stall_seconds: float
    seconds: float


@dataclass
class _Save:
    """The one under way. `task`: what this rank's thread does or has done, first writing, then, on rank 0, committing."""

    step: int
    record: dict[str, Any]
    begun: float
    task: Task
    stop: threading.Event
    prune: bool
    stall: float = 0.0
    committing: bool = False


class Saver:
    """One run's saves, one at a time. The layout and the names of the state must not change from save to save."""

    def __init__(self, store: Store, keep: Keep, background: bool = True) -> None:
        self.store, self.keep, self.background = store, keep, background
        self._share: Share | None = None
        self._staged: list[_Staged] = []
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._save is not None

    def begin(self, step: int, state: dict[str, Tensor], record: dict[str, Any], prune: bool = True) -> None:
        """Take a copy of the state and have it written; without `background`, write it, from where it is. Collective.
        Without `prune`, all the older ones stay when it is committed.

        What cannot be written is told by the Outcome. Raises CheckpointError if `step` is there already, or for a state
        that no checkpoint can hold, and RuntimeError while another save is under way.
        """
        if self._save is not None:
            raise RuntimeError(f"the save of step {self._save.step} is under way: conclude it before the next")
        begun, stop = time.perf_counter(), threading.Event()
        try:
            on_first_rank_in_time(lambda: self.store.begin(step))
            self._share = self._share or plan_save(state)
            task = self._written(step, self._share, state, stop)
        except OSError as error:  # of the first rank's store, told to all
            task = Task.over(error) if place()[0] == 0 else Task.over(None)
        except CheckpointError:
            if self._share is None:
                on_first_rank_in_time(lambda: self.store.abandon(step))
            raise
        self._save = _Save(step, {**record, "step": step}, begun, task, stop, prune)
        if not self.background:
            wait_for_all(task, stop)
        self._save.stall = time.perf_counter() - begun

    def flags(self) -> tuple[bool, bool]:
        """(failed here, pending here), for all ranks to agree on (any, any) before `advance`."""
        return (False, False) if self._save is None else self._save.task.flags

    def advance(self, failed: bool, pending: bool) -> Outcome | None:
        """Go on with what the ranks agreed on: has any failed, is any still at it. Collective. The Outcome comes once."""
        save = self._save
        if save is None:
            return None
        if failed:
            save.stop.set()  # what others still write is not needed any more
        if pending:
            return None
        if failed:
            return self._failed(save)
        if save.committing:
            return self._ended(save, None)
        stamps = _gathered(save.task.result)
        save.committing = True
        if stamps is not None:
            assert self._share is not None
            manifest = Manifest(save.record, stamps, self._share.tensors, provenance(save.record, place()[1]))
            save.task = Task(lambda: self._commit(save.step, manifest, save.prune))
        else:
            save.task = Task.over(None)
        return None

    def conclude(self) -> Outcome | None:
        """Wait for the save under way, if there is one, to be safe or to have failed. Collective."""
        outcome = None
        while self._save is not None:
            failed = wait_for_all(self._save.task, self._save.stop)
            outcome = self.advance(failed, pending=False)
        return outcome

    def _written(self, step: int, share: Share, state: dict[str, Tensor], stop: threading.Event) -> Task:
        """This rank's files on their way. A failure here, as for want of memory, is this rank's word in the agreement."""
        try:
            parts: list[Callable[[], Iterable[Tensor]]]
            if self.background:
                self._staged = self._staged or [_Staged.room_for(file, state) for file in share.files]
                _copy(self._staged, state)
                parts = [staged.parts for staged in self._staged]
            else:
                parts = [_in_place(file, state) for file in share.files]
            work = [_Work(file, part) for file, part in zip(share.files, parts, strict=True)]
            return Task(lambda: _write_all(self.store, step, work, stop, yielding=self.background))
        except (OSError, RuntimeError, MemoryError) as error:
            return Task.over(error)

    def _commit(self, step: int, manifest: Manifest, pruning: bool) -> None:
        self.store.commit(step, encode(manifest))
        if not pruning:
            return
        with suppress(OSError, CheckpointError):  # the save is safe; what could not be removed is tried again by the next
            prune(self.store, self.keep, {step}, step)

    def _failed(self, save: _Save) -> Outcome:
        error = save.task.error
        told = of_all_ranks(None if error is None else cause(error))
        rank, why = next((rank, why) for rank, why in enumerate(told) if why is not None)
        on_first_rank_in_time(lambda: self.store.abandon(save.step))
        return self._ended(save, f"rank {rank}: {why}")

    def _ended(self, save: _Save, error: str | None) -> Outcome:
        self._save = None
        seconds = time.perf_counter() - save.begun
        return Outcome(save.step, self.store.describe(save.step), error, save.stall, seconds)


def save(folder: Path, step: int, state: dict[str, Tensor], record: dict[str, Any], keep: int | Keep) -> Path:
    """Write a checkpoint into a folder and remove those that `keep` does not ask for. Collective.

    Raises CheckpointError on every rank if any rank could not write; nothing half-written is left.
    """
    saver = Saver(LocalStore(folder), keep if isinstance(keep, Keep) else Keep(keep), background=False)
    saver.begin(step, state, record)
    outcome = saver.conclude()
    target = step_folder(folder, step)
    if outcome is None or outcome.error is not None:
        why = None if outcome is None else outcome.error
        raise CheckpointError(f"{target}: the checkpoint could not be written: {why}; nothing was left behind")
    return target


@dataclass(frozen=True)
class _Staged:
    """Room in the host's memory for a file's bytes as they will stand in it, kept from save to save."""

    names: tuple[str, ...]
    bytes: Tensor
    views: tuple[Tensor, ...]

    @classmethod
    def room_for(cls, file: Written, state: dict[str, Tensor]) -> _Staged:
        names = tuple(box.name for box in file.boxes)
        pinned = any(local(state[name]).is_cuda for name in names)
        room = torch.empty(file.contents.bytes, dtype=torch.uint8, pin_memory=pinned)
        views = [room[p.start : p.end].view(p.dtype).view(p.shape) for p in file.contents.pieces]
        return cls(names, room, tuple(views))

    def parts(self) -> list[Tensor]:
        return [self.bytes]


def _copy(staged: list[_Staged], state: dict[str, Tensor]) -> None:
    """Only what this rank is going to write is copied. Returns when all of it is there."""
    devices = set()
    for one in staged:
        sources = [local(state[name]).detach() for name in one.names]
        devices |= {source.device for source in sources if source.is_cuda}
        for name, source, view in zip(one.names, sources, one.views, strict=True):
            _check_same(name, source, view.shape, view.dtype)
            view.copy_(source, non_blocking=True)
    for device in devices:
        torch.cuda.synchronize(device)


def _in_place(file: Written, state: dict[str, Tensor]) -> Callable[[], Iterator[Tensor]]:
    """The bytes of a file from where the tensors are, one after another."""
    sources = [local(state[box.name]).detach() for box in file.boxes]
    for box, source in zip(file.boxes, sources, strict=True):
        _check_same(box.name, source, box.shape, box.dtype)
    return lambda: (bytes_of(source) for source in sources)


def _check_same(name: str, source: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(source.shape) != tuple(shape) or source.dtype != dtype:
        told = f"{source.dtype} of {tuple(source.shape)}, at the first save {dtype} of {tuple(shape)}"
        raise RuntimeError(f"{name} is {told}: the layout must not change")


@dataclass(frozen=True)
class _Work:
    file: Written
    parts: Callable[[], Iterable[Tensor]]


def _write_all(
    store: Store, step: int, work: list[_Work], stop: threading.Event, yielding: bool
) -> list[tuple[str, FileEntry]]:
    """Write and digest the files, a few at once. Raises the first error of any, when all have ended."""
    left = iter(work)
    stamps: list[tuple[str, FileEntry]] = []
    taking = threading.Lock()

    def some() -> None:
        if yielding:
            _yield_to_training()
        while True:
            with taking:
                one = next(left, None)
            if one is None:
                return
            contents = one.file.contents
            try:
                with store.create(step, contents.name) as out:
                    digests = write(out, contents.header, one.parts(), stop)
            except BaseException:
                stop.set()
                raise
            stamps.append((contents.name, {"size": len(contents.header) + contents.bytes, **digests}))

    tasks = [Task(some) for _ in work[:_WRITERS]]
    for task in tasks:
        task.wait()
    errors = [task.error for task in tasks if task.error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, InterruptedError)):
        raise error
    return sorted(stamps, key=lambda stamp: stamp[0])


def _yield_to_training() -> None:
    if sys.platform == "linux":  # where a thread has a niceness of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _gathered(mine: list[tuple[str, FileEntry]]) -> dict[str, FileEntry] | None:
    """All ranks' stamps by file, on rank 0. Collective."""
    everyone = to_first_rank(mine)
    return None if everyone is None else {name: entry for stamps in everyone for name, entry in stamps}
