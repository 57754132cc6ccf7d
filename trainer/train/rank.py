"""Runs one rank of a command and returns its exit code: the user sees the reason once, and no peer waits for this rank."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from mikoshi.data.errors import StorageError
from mikoshi.trainer.errors import USER_ERRORS, DivergedError, SpoiledError
from mikoshi.trainer.exit_codes import DIVERGED, DONE, FAULT, LOST_PEER, PREEMPTED, USER_ERROR

if TYPE_CHECKING:
    import torch

    from mikoshi.parallel.process.process_group import World
    from mikoshi.trainer.chaos.plan import FaultPlan
    from mikoshi.trainer.config.run import RunConfig
    from mikoshi.trainer.generation.generate import Sampling
    from mikoshi.trainer.record.run_folder import RunFolder

# Of these the user is told in one line: the disk is full, read-only, over quota, or not ours to write.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)


def launched_world(ranks: int | None = None) -> World | None:
    """This process's rank and world, as set by a launcher; None if this process is to start `ranks` ranks itself.

    Raises LayoutError for an invalid rank, and ConfigError where --ranks disagrees with the launcher.
    """
    from mikoshi.parallel.process.process_group import world_from
    from mikoshi.trainer.errors import ConfigError

    world = world_from(os.environ)
    if world is not None and world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        # A container that sets RANK and WORLD_SIZE for itself, and mpirun or srun in it: each rank would be a run of its own.
        other = world_from({name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")})
        if other is not None and other.size > 1:
            raise ConfigError(
                f"{world.source}, but {other.source}: two launchers: unset `RANK` and `WORLD_SIZE`, or the others"
            )
    if world is not None and ranks not in (None, world.size):
        names = " and ".join(f"`{word.partition('=')[0]}`" for word in world.source.split())
        raise ConfigError(
            f"--ranks {ranks}: {world.source} say that a launcher started this process as rank {world.rank} of {world.size}: "
            f"leave out --ranks, or unset {names} to have {ranks} rank{'s' * (ranks != 1)} started here"
        )
    return world


def refuse_several(verb: str) -> None:
    """Refuse to run under a launcher that started several processes: each would start its own ranks and write to one folder.

    Raises ConfigError and LayoutError.
    """
    world = launched_world()
    if world is not None and world.size > 1:
        from mikoshi.trainer.errors import ConfigError

        raise ConfigError(
            f"{world.source}: `mikoshi {verb}` starts its ranks itself: run it once, with --ranks, without torchrun, srun or "
            "mpirun"
        )


def train_rank(run: RunConfig, world: World) -> int:
    """Train as one rank of a launcher other than ours, or as the only rank. Returns the exit code."""
    from mikoshi.parallel.process.parent_death import die_with_parent
    from mikoshi.parallel.process.process_group import join, leave, pick_device

    if world.master is None:
        device = pick_device(run.engine.device, world)
        join(world, device)
        try:
            return _fit(run, world, device)
        finally:
            leave()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        from mikoshi.trainer.train.preflight import preflight

        preflight(run, world.size)  # a launcher of another make has checked nothing
        exit_now(_train(run, world, None))
    except Exception as error:
        _abort(error, world.rank)


def train_supervised(run: RunConfig, plan: FaultPlan | None = None) -> int:
    """Train as one rank of our supervisor, which sets the environment. Returns the exit code.

    plan: faults to inject.
    """
    from mikoshi.parallel.process.process_group import world_from
    from mikoshi.trainer.signals import exit_on_stop_signal

    world = world_from(os.environ)
    assert world is not None, "a supervisor says which rank this is"
    with exit_on_stop_signal():
        return _train(run, world, plan)


def _train(run: RunConfig, world: World, plan: FaultPlan | None) -> int:
    from mikoshi.parallel.process.process_group import join, leave, pick_device, wait_for_all
    from mikoshi.trainer.signals import STOP_SIGNALS

    try:
        device = pick_device(run.engine.device, world)
        # A rank that is silent for longer is ended by its supervisor, which knows whose fault it is; this is for the rest.
        join(world, device, timedelta(seconds=run.recovery.patience + 60))
        code = _fit(run, world, device, plan)
        # All is saved: a signal that a peer's earlier end sets off must not end this rank.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        wait_for_all()
        leave()
        return code
    except Exception as error:
        return report_error(error, world.rank)


def _fit(run: RunConfig, world: World, device: torch.device, plan: FaultPlan | None = None) -> int:
    from mikoshi.trainer.train.loop import fit

    return DONE if fit(run, world, device, plan) else PREEMPTED


def generate_rank(
    folder: RunFolder, device: str, prompt: str, chat: bool, special: bool | None, tokens: int, sampling: Sampling,
    degrees: dict[str, int],
) -> int:  # fmt: skip
    """The part of a generation of the rank that the environment says; rank 0 writes the text. Its exit code."""
    from mikoshi.parallel.process.process_group import join, leave, pick_device, world_from
    from mikoshi.trainer.generation.generate import generate_together, known_ids, load_engine, text_stream
    from mikoshi.trainer.generation.prompt import encode_prompt
    from mikoshi.trainer.signals import agree
    from mikoshi.trainer.streams import reader_has_gone

    world = world_from(os.environ)
    assert world is not None, "a launcher says which rank this is"
    try:
        local_device = pick_device(device, world)
        join(world, local_device)
        engine, tokenizer = load_engine(folder, degrees, world, local_device)
        (start, stops), known = encode_prompt(folder, tokenizer, prompt, chat, special), known_ids(tokenizer)
        ids = generate_together(engine, start, tokens, sampling, stops, known)
        pieces = text_stream(tokenizer, start, ids)
        for piece in itertools.chain([prompt + "\n" * chat], pieces, ["\n"]):
            if world.rank == 0:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            if agree(world.rank == 0 and reader_has_gone()).stop:
                break
        leave()
        return DONE
    except Exception as error:
        return report_error(error, world.rank)


def _abort(error: Exception, rank: int) -> NoReturn:
    """End this rank with no orderly leave, which would wait for peers that wait for it: gone at once, the launcher sees it."""
    exit_now(report_error(error, rank))


def exit_now(code: int) -> NoReturn:
    """End this process without cleanup: everything to be kept is on disk, and no library thread can delay the exit."""
    with contextlib.suppress(OSError):  # whoever reads our output may be what is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def report_error(error: Exception, rank: int) -> int:
    """Print what ended this rank and return its exit code."""
    text = user_message(error)
    if text is None and is_lost_peer(error):
        # Not a word on stderr but one line: the traceback that matters is that of the rank that was lost.
        print(f"rank {rank}: another rank is gone: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return LOST_PEER
    if isinstance(error, SpoiledError):  # of all ranks at once
        if rank == 0:
            print(f"fault: {error}", file=sys.stderr)
        _leave_message(str(error))
        return DIVERGED if isinstance(error, DivergedError) else FAULT
    if is_outage(error):
        print(f"error: rank {rank}: {error}", file=sys.stderr)
        _leave_message(str(error))
        return FAULT
    if text is None:
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(error)
        _leave_message("".join(traceback.format_exception_only(error)).strip())
        return FAULT
    recorded = _leave_message(text)
    if rank == 0:
        print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)
    elif not recorded:
        print(f"error: {text}", file=sys.stderr)
    return USER_ERROR


def user_message(error: Exception) -> str | None:
    """One line for a user's mistake; None for a fault of ours, which is shown with its stack trace."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in error.reason:
        return f"{ascii(error.object)[:200]}: not UTF-8 text: rename what has it in its name"
    if isinstance(error, OSError) and error.errno in _DISK:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}: make room, or choose a place that can be read and written, then start again"
    return None


def is_outage(error: Exception) -> bool:
    """Whether storage is temporarily unavailable, which is no mistake of the user's."""
    distant = isinstance(error, OSError) and error.errno is None and bool(str(error))
    return distant or isinstance(error, StorageError)


def is_lost_peer(error: Exception) -> bool:
    """Whether the error says that a peer of a collective is gone, so that the fault is not this rank's."""
    from torch.distributed import DistBackendError, DistNetworkError

    text = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Read error",
            "Write error", "remote process exited", "Socket Timeout", "failed to recv")  # fmt: skip
    ours = isinstance(error, (DistBackendError, DistNetworkError)) or (isinstance(error, RuntimeError) and "gloo" in text)
    return ours and any(words in text for words in gone)


def _leave_message(text: str) -> bool:
    """What ended this rank, into the file that its launcher reads; whether there is one."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return False
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))
    return True
