"""Triggers each planned fault inside a rank, once per run, at its exact step and phase.

Every fault is on record in chaos.jsonl of the run folder, and safe on disk there, before it strikes: however often the run
is started again, none strikes twice. All faults of one plan, of all ranks, stand in that file in the order they struck.
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mikoshi.data.io.json import dumps
from mikoshi.parallel.process import heartbeat
from mikoshi.parallel.sharding import local
from mikoshi.trainer.chaos.plan import SLOW_STEPS, Fault, FaultPlan
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl

LOG = "chaos.jsonl"
SUPERVISOR = "MIKOSHI_SUPERVISOR"
"""Environment variable with the process id of what started the ranks, as it tells them."""

_ROOM = 4096
"""Bytes that a file may have while a disk counts as full."""

_PASSED_ON = 5.0
"""Seconds within which a supervisor passes a signal on; one that does not is left to the verdict."""


class InjectedError(RuntimeError):
    """The error of a fault "raise"."""


def inject(plan: FaultPlan, rank: int, folder: RunFolder, parameters: Callable[[], Sequence[nn.Parameter]]) -> None:
    """Inject this rank's faults of the plan, from its next heartbeat on. `parameters` returns the live parameters."""
    supervisor = int(os.environ[SUPERVISOR]) if SUPERVISOR in os.environ else None
    heartbeat.set_listener(Injector(plan, rank, folder.path / LOG, folder.checkpoints, parameters, supervisor))


def fired(log: Path) -> dict[int, dict[str, Any]]:
    """What is on record of the faults that struck so far, by their number in the plan: `time` (unix seconds) and, of a
    damaged checkpoint, `step_damaged` and, where there is one before it that none of these faults has damaged, `step_older`."""
    return {record["number"]: record for record in read_jsonl(log)}


class Injector:
    """A listener of the heartbeat that makes the faults of one rank happen."""

    def __init__(
        self, plan: FaultPlan, rank: int, log: Path, checkpoints: Path, parameters: Callable[[], Sequence[nn.Parameter]],
        supervisor: int | None,
    ) -> None:  # fmt: skip
        self.log, self.checkpoints, self.parameters, self.supervisor = log, checkpoints, parameters, supervisor
        done = fired(log)
        self.waiting = {
            (fault.step, fault.phase): (number, fault)
            for number, fault in reversed(list(enumerate(plan.faults)))  # of two for one moment the first
            if fault.rank == rank and number not in done
        }
        self.slow_until, self.worked = 0, 0.0
        self.room: tuple[int, int] | None = None
        self.full_in = 0

    def __call__(self, step: int, phase: str) -> None:
        if phase == "save" and self.room is not None and step > self.full_in:  # the save that found no room has failed by now
            resource.setrlimit(resource.RLIMIT_FSIZE, self.room)
            self.room = None
        if step < self.slow_until:
            now = time.thread_time()
            until = now + now - self.worked
            while time.thread_time() < until:
                pass
        found = self.waiting.pop((step, phase), None)
        if found is not None:
            number, fault = found
            target = newest_file(self.checkpoints, number) if fault.kind == "corrupt" else None
            self._record(number, fault, target)
            self._trigger(number, fault, target)
        self.worked = time.thread_time()

    def _record(self, number: int, fault: Fault, target: Path | None) -> None:
        damaged = {} if target is None else _of_checkpoints(target.parent, fired(self.log))
        line = dumps({"number": number, "time": time.time(), **asdict(fault), **damaged}) + "\n"
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def _trigger(self, number: int, fault: Fault, target: Path | None) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "slow":
                self.slow_until = fault.step + SLOW_STEPS
            case "nan":
                spoil_gradient(self.parameters())
            case "flip":
                flip_bit(self.parameters())
            case "fill":
                self.room, self.full_in = resource.getrlimit(resource.RLIMIT_FSIZE), fault.step
                resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, self.room[1]))
            case "corrupt":
                if target is not None:
                    corrupt(target, number)
                os.kill(os.getpid(), signal.SIGKILL)
            case "launcher" | "node" | "preempt":
                self._trigger_supervisor(fault)
            case "raise":
                where = f"in step {fault.step}, in {fault.phase}"
                raise InjectedError(f"fault {number + 1} of the plan: an error on purpose {where}")

    def _trigger_supervisor(self, fault: Fault) -> None:
        if self.supervisor is None:
            raise RuntimeError(f"a fault {fault.kind!r} needs ranks that `mikoshi` itself has started")
        if fault.kind == "preempt":
            _ask(self.supervisor, signal.Signals[fault.signal])
            return
        os.kill(self.supervisor, signal.SIGKILL)
        if fault.kind == "node":
            os.kill(os.getpid(), signal.SIGKILL)


def _ask(supervisor: int, number: signal.Signals) -> None:
    """Ask the supervisor to stop, and wait until it has passed that on to here: the fault's step is the one the request comes
    in, however short a step is beside the time a signal takes through two processes on a busy machine."""
    handler = signal.getsignal(number)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        os.kill(supervisor, number)
        return
    came: list[int] = []

    def arrive(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler(number, frame)

    signal.signal(number, arrive)
    try:
        os.kill(supervisor, number)
        until = time.monotonic() + _PASSED_ON
        while not came and time.monotonic() < until:
            time.sleep(0.001)
    finally:
        signal.signal(number, handler)


def spoil_gradient(parameters: Sequence[nn.Parameter]) -> None:
    """Write a NaN into one element of the gradient that this rank holds."""
    for p in parameters:
        if p.grad is not None and local(p.grad).numel():
            _first(local(p.grad)).fill_(math.nan)
            return
    raise RuntimeError("this rank holds no gradient to put a NaN into: let another rank have the fault")


def flip_bit(parameters: Sequence[nn.Parameter]) -> None:
    """Flip a bit in the middle of one weight's mantissa, on this rank only, where another rank holds the same weight."""
    candidates = [p for p in parameters if local(p).numel()]
    _flip(local(max(candidates, key=_copies)))


def _copies(p: Tensor) -> float:
    """Ranks that hold the same piece, this one among them; a plain tensor is with all of them."""
    if not isinstance(p, DTensor):
        return math.inf
    mesh = p.device_mesh
    return math.prod(mesh.size(n) for n, placement in enumerate(p.placements) if isinstance(placement, Replicate))


def _flip(weights: Tensor) -> None:
    size = weights.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bit = {1: 1, 2: 3, 4: 12, 8: 30}[size]
    _first(weights).view(integers).bitwise_xor_(1 << bit)


def _first(tensor: Tensor) -> Tensor:
    """Its first element, in place, whatever its strides."""
    return tensor.detach()[(0,) * tensor.ndim]


def newest_file(checkpoints: Path, seed: int) -> Path | None:
    """A file of the newest checkpoint, drawn from the seed; None where there is no checkpoint."""
    steps = sorted(checkpoints.glob("step-????????"))
    files = sorted(path for path in steps[-1].iterdir() if path.is_file() and path.stat().st_size) if steps else []
    return random.Random(seed).choice(files) if files else None


def _of_checkpoints(newest: Path, done: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
    """The step of a checkpoint that is about to be damaged, and of the newest before it that is sound, as far as what is
    `done` goes: one that was damaged has another time if it has been made again since."""
    damaged = {record["step_damaged"]: record["time"] for record in done.values() if "step_damaged" in record}
    steps = {_step(path): path.stat().st_mtime for path in newest.parent.glob("step-????????")}
    older = [step for step, made in steps.items() if step < _step(newest) and made > damaged.get(step, 0.0)]
    return {"step_damaged": _step(newest), **({"step_older": max(older)} if older else {})}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def corrupt(path: Path, seed: int) -> None:
    """Flip one bit of a file, drawn from the seed."""
    rng = random.Random(seed)
    with path.open("r+b") as file:
        offset = file.seek(rng.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes((byte ^ 1 << rng.randrange(8),)))
