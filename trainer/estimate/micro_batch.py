"""Finds the largest micro-batch that fits in memory by running real steps of the run's engine on its data.

Sizes go down from all rows of a rank, over those that divide them, by accelerate's find_executable_batch_size, which also
says which errors are for want of memory. Every attempt has processes of its own: what one leaves behind no other finds, and a
rank that has no room ends it for all.
"""

from __future__ import annotations

import contextlib
import re
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from mikoshi.parallel.errors import LayoutError
from mikoshi.parallel.process.process_group import World, join, leave, pick_device, wait_for_all
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.errors import ConfigError, LaunchError
from mikoshi.trainer.feed.feed import open_feed
from mikoshi.trainer.record.metrics import memory_bytes

STEPS = 2
"""Of an attempt: optimizer state is made in the first, and in the second it is there from the beginning."""

_MEMORY = ("std::bad_alloc", "CUDA_ERROR_OUT_OF_MEMORY")
"""Ways to say so that accelerate does not know."""
_ALLOCATION = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class MicroBatchAttempt:
    """One micro-batch size that was tried.

    peak: most bytes that a rank used, if it fits. why: what ran out, if it does not. needed: lower bound of the bytes that a
    rank needs, 0 if unknown.
    """

    micro_batch: int
    fits: bool
    peak: int
    seconds: float
    why: str = ""
    needed: int = 0


@dataclass(frozen=True)
class AttemptResult:
    """How the ranks of an attempt ended.

    peak: most bytes that a rank used. error: message of the rank that failed, empty if none did. trace: its stack trace.
    needed: as in MicroBatchAttempt.
    """

    peak: int = 0
    error: str = ""
    trace: str = ""
    needed: int = 0


def micro_batch_sizes(config: RunConfig, ranks: int) -> list[int]:
    """Micro-batch sizes that the run can use, largest first. Raises LayoutError where there is none."""
    largest = _with(config, None)
    try:
        layout = layout_of(largest, ranks)
    except LayoutError:
        layout = layout_of(config, ranks)
    rows = -(-config.train.global_batch // layout.data_ranks)
    found = []
    for size in range(rows, 0, -1):
        if rows % size == 0:
            with contextlib.suppress(LayoutError):
                found.append(layout_of(_with(config, size), ranks).micro_rows)
    return list(dict.fromkeys(found))


def _with(config: RunConfig, size: int | None) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})


def find_micro_batch(
    config: RunConfig,
    ranks: int,
    memory: int | None,
    run_attempt: Callable[[RunConfig], AttemptResult],
    on_attempt: Callable[[MicroBatchAttempt], None],
) -> tuple[int, list[MicroBatchAttempt]]:
    """The largest micro-batch that fits, and all attempts.

    memory: bytes that a rank may use, None for no limit. run_attempt: runs a few steps of a config. on_attempt: called with
    every finished attempt. Raises ConfigError where even the smallest size does not fit or accelerate is not installed, and
    LaunchError where an attempt failed for another reason than memory.
    """
    try:
        from accelerate.utils import find_executable_batch_size
        from accelerate.utils.memory import should_reduce_batch_size
    except ImportError:
        raise ConfigError(
            'accelerate is not installed, which goes through the sizes: pip install "mikoshi[accelerate]"'
        ) from None
    left, tried = micro_batch_sizes(config, ranks), list[MicroBatchAttempt]()

    def smaller() -> int:
        return left[len(tried)] if len(tried) < len(left) else 0

    def attempt(batch_size: int) -> int:
        began = time.monotonic()
        result = run_attempt(_with(config, batch_size))
        refused = should_reduce_batch_size(RuntimeError(result.error))
        if result.error and not refused:
            raise LaunchError(f"train.micro_batch={batch_size}: {result.error[:300]}\n{result.trace}".rstrip())
        why = shortage(result.error, memory) if refused else ""
        tried.append(
            MicroBatchAttempt(batch_size, not refused, result.peak, round(time.monotonic() - began, 2), why, result.needed)
        )
        on_attempt(tried[-1])
        if refused:
            raise RuntimeError(result.error)
        return batch_size

    try:
        search: Any = find_executable_batch_size(attempt, left[0], smaller)
        return int(search()), tried
    except RuntimeError as error:  # it has come to 0
        raise ConfigError(_nothing_fits(config, ranks, memory, tried[-1])) from error


def _nothing_fits(config: RunConfig, ranks: int, memory: int | None, last: MicroBatchAttempt) -> str:
    rows = "one row" if last.micro_batch == 1 else f"{last.micro_batch} rows"
    within = f"within --memory {memory / 2**30:g}" if memory else f"({last.why})"
    needed = f": it needs {format_bytes(last.needed)} at least" if last.needed else f" ({last.why})" if memory else ""
    ways = "; ".join(_helps(config, ranks, memory))
    return f"train.micro_batch={last.micro_batch}: even {rows} a rank does not fit {within}{needed}: what helps: {ways}"


def _helps(config: RunConfig, ranks: int, memory: int | None) -> list[str]:
    """What makes a rank hold less, of that which is not so already."""
    parallel, shared = config.parallel, layout_of(config, ranks).data_ranks > 1
    sharded = parallel.zero == 3 or (config.engine.kind == "deepspeed" and parallel.pp > 1)  # its pipeline has no ZeRO 3
    cuts = [] if sharded else ["parallel.zero=3"]
    cuts.append("a larger parallel.tp or parallel.pp")
    on_gpu = config.engine.device != "cpu" and torch.cuda.is_available()
    return [
        *(["a larger --memory"] if memory else []),
        *(cuts if shared else [f"more --ranks, with {' or '.join(cuts)}"]),
        *(["engine.recompute=full"] if config.engine.recompute != "full" else []),
        *(["parallel.offload=optimizer"] if on_gpu and parallel.offload == "none" else []),
        "a smaller train.context",
    ]


def shortage(error: str, memory: int | None) -> str:
    """What an allocator's error comes to: how much was asked for, and the limit."""
    limit = f" at the limit of {memory / 2**30:g} GiB (--memory)" if memory else ""
    if "SIGKILL" in error:
        return error.rstrip(".")
    more = f": {format_bytes(count)} more were asked for" if (count := requested_bytes(error)) else ""
    return f"out of memory{limit}{more}"


def requested_bytes(error: str) -> int:
    """Bytes of the allocation that failed, 0 if the message does not say."""
    found = _ALLOCATION.search(error)
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def format_bytes(count: int) -> str:
    """A number of bytes in GiB, MiB or bytes."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def try_steps(config: RunConfig, world: World, memory: int | None) -> AttemptResult:
    """Run this rank's part of an attempt: build the engine and take the run's first steps. Collective.

    memory: bytes that the rank may use from its first step on. Raises whatever ends the attempt.
    """
    device = pick_device(config.engine.device, world)
    join(world, device, timedelta(seconds=config.recovery.patience))
    layout = layout_of(config, world.size)
    feed = open_feed(config)
    loader = feed.loader(layout, layout.coordinates(world.rank), feed.continued(None))
    engine = build_engine(config, layout, device)
    with contextlib.closing(engine), contextlib.closing(loader.stream(0, STEPS, ahead=config.data.prefetch)) as batches:
        for number, rows in enumerate(batches):
            if memory is not None and not number:
                _allow(memory, device)
            engine.step(rows, config.optim.lr)
    wait_for_all()
    leave()
    return AttemptResult(memory_bytes(device))


def _allow(memory: int, device: torch.device) -> None:
    """Have the allocator refuse more than so many bytes: the GPU's, or all data of this process. Threads want memory for
    their stacks, and libraries that get none abort or hang: those of torch are there before."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
        return
    torch.ones(1 << 20).add_(1)  # on all its threads
    resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def failed_attempt(error: BaseException) -> AttemptResult:
    """The result of an attempt that `error` ended.

    Its message joins the chain of causes, from which accelerate decides whether memory ran out. Lifts the memory limit first,
    because reporting needs memory too.
    """
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    messages: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split()) or type(seen).__name__
        short = isinstance(seen, MemoryError) or any(word in text for word in _MEMORY)
        messages.append(f"{text}: out of memory." if short else text)
        seen = seen.__cause__ or seen.__context__
    message = " <- ".join(messages)
    return AttemptResult(
        error=message, trace="".join(traceback.format_exception(error)), needed=memory_in_use() + requested_bytes(message)
    )


def memory_in_use() -> int:
    """Bytes in use that count against the limit: those of the CUDA allocator, else all data of this process. 0 if unknown."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"^VmData:\s*(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
