"""One rank's part of a command, to its exit code: however it ends, the user is told why, once, and no peer waits for it."""

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
    from mikoshi.trainer.chaos.plan import Plan
    from mikoshi.trainer.config.run import RunConfig
    from mikoshi.trainer.generation.generate import Sampling
    from mikoshi.trainer.record.run_folder import RunFolder

# Of these the user is told in one line: the disk is full, read-only, over quota, or not ours to write.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)


def place_here(ranks: int | None = None) -> World | None:
    """The place that a launcher has given this process; None where it is to start `ranks` ranks itself, or as many as it likes.
    Raises LayoutError for a place that cannot be, and ConfigError where --ranks asks for another number of ranks."""
    from mikoshi.parallel.process.process_group import world_from
    from mikoshi.trainer.errors import ConfigError

    place = world_from(os.environ)
    if place is not None and place.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        # A container that sets RANK and WORLD_SIZE for itself, and mpirun or srun in it: each rank would be a run of its own.
        other = world_from({name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")})
        if other is not None and other.size > 1:
            raise ConfigError(
                f"{place.source}, but {other.source}: two launchers: unset `RANK` and `WORLD_SIZE`, or the others"
            )
    if place is not None and ranks not in (None, place.size):
        names = " and ".join(f"`{word.partition('=')[0]}`" for word in place.source.split())
        raise ConfigError(
            f"--ranks {ranks}: {place.source} say that a launcher started this process as rank {place.rank} of {place.size}: "
            f"leave out --ranks, or unset {names} to have {ranks} rank{'s' * (ranks != 1)} started here"
        )
    return place


def refuse_several(verb: str) -> None:
    """Refuse a command that starts its own ranks and that a launcher has started several times: all would write to one folder.
    Raises ConfigError and LayoutError."""
    place = place_here()
    if place is not None and place.size > 1:
        from mikoshi.trainer.errors import ConfigError

        raise ConfigError(
            f"{place.source}: `mikoshi {verb}` starts its ranks itself: run it once, with --ranks, without torchrun, srun or "
            "mpirun"
        )


def train_rank(run: RunConfig, place: World) -> int:
    """This process's part of a run, as one rank that no supervisor of ours started; its exit code."""
    from mikoshi.parallel.process.parent_death import die_with_parent
    from mikoshi.parallel.process.process_group import join, leave, pick_device

    if place.master is None:
        device = pick_device(run.engine.device, place)
        join(place, device)
        try:
            return _fit(run, place, device)
        finally:
            leave()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        from mikoshi.trainer.train.preflight import preflight

        preflight(run, place.size)  # a launcher of another make has checked nothing
        end_now(_train(run, place, None))
    except Exception as error:
        _gone(error, place.rank)


def train_supervised(run: RunConfig, plan: Plan | None = None) -> int:
    """The part of a run of the rank that the environment says, under controller.supervisor; its exit code. `plan`: faults to be
    suffered on the way."""
    from mikoshi.parallel.process.process_group import world_from
    from mikoshi.trainer.signals import stopping_is_no_crash

    place = world_from(os.environ)
    assert place is not None, "a supervisor says which rank this is"
    with stopping_is_no_crash():
        return _train(run, place, plan)


def _train(run: RunConfig, place: World, plan: Plan | None) -> int:
    from mikoshi.parallel.process.process_group import join, leave, pick_device, wait_for_all
    from mikoshi.trainer.signals import ASKING

    try:
        device = pick_device(run.engine.device, place)
        # A rank that is silent for longer is ended by its supervisor, which knows whose fault it is; this is for the rest.
        join(place, device, timedelta(seconds=run.recovery.patience + 60))
        code = _fit(run, place, device, plan)
        for number in ASKING:  # all is saved: when a peer ends a moment earlier, what its end sets off is not meant for us
            signal.signal(number, signal.SIG_IGN)
        wait_for_all()
        leave()
        return code
    except Exception as error:
        return say(error, place.rank)


def _fit(run: RunConfig, place: World, device: torch.device, plan: Plan | None = None) -> int:
    from mikoshi.trainer.train.loop import fit

    return DONE if fit(run, place, device, plan) else PREEMPTED


def generate_rank(
    folder: RunFolder, device: str, prompt: str, chat: bool, special: bool | None, tokens: int, sampling: Sampling,
    degrees: dict[str, int],
) -> int:  # fmt: skip
    """The part of a generation of the rank that the environment says; rank 0 writes the text. Its exit code."""
    from mikoshi.parallel.process.process_group import join, leave, pick_device, world_from
    from mikoshi.trainer.generation.generate import generate_together, known_ids, load_engine, text_stream
    from mikoshi.trainer.generation.prompt import start_of
    from mikoshi.trainer.signals import agree
    from mikoshi.trainer.streams import reader_has_gone

    place = world_from(os.environ)
    assert place is not None, "a launcher says which rank this is"
    try:
        here = pick_device(device, place)
        join(place, here)
        engine, tokenizer = load_engine(folder, degrees, place, here)
        (start, stops), known = start_of(folder, tokenizer, prompt, chat, special), known_ids(tokenizer)
        ids = generate_together(engine, start, tokens, sampling, stops, known)
        pieces = text_stream(tokenizer, start, ids)
        for piece in itertools.chain([prompt + "\n" * chat], pieces, ["\n"]):
            if place.rank == 0:
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            if agree(place.rank == 0 and reader_has_gone()).stop:
                break
        leave()
        return DONE
    except Exception as error:
        return say(error, place.rank)


def _gone(error: Exception, rank: int) -> NoReturn:
    """End this rank with no orderly leave, which would wait for peers that wait for it: gone at once, the launcher sees it."""
    end_now(say(error, rank))


def end_now(code: int) -> NoReturn:
    """End this process now: what is to be kept is on disk, and no thread of a library has a say in how it ends."""
    with contextlib.suppress(OSError):  # whoever reads our output may be what is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def say(error: Exception, rank: int) -> int:
    """Tell what ended this rank; its exit code."""
    text = told(error)
    if text is None and lost_peer(error):
        # Not a word on stderr but one line: the traceback that matters is that of the rank that was lost.
        print(f"rank {rank}: another rank is gone: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return LOST_PEER
    if isinstance(error, SpoiledError):  # of all ranks at once
        if rank == 0:
            print(f"fault: {error}", file=sys.stderr)
        _leave_message(str(error))
        return DIVERGED if isinstance(error, DivergedError) else FAULT
    if outage(error):
        print(f"error: rank {rank}: {error}", file=sys.stderr)
        _leave_message(str(error))
        return FAULT
    if text is None:
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(error)
        _leave_message("".join(traceback.format_exception_only(error)).strip())
        return FAULT
    heard = _leave_message(text)
    if rank == 0:
        print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)
    elif not heard:
        print(f"error: {text}", file=sys.stderr)
    return USER_ERROR


def told(error: Exception) -> str | None:
    """The one line of a user's mistake; None for a fault of ours, which deserves its stack trace."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in error.reason:
        return f"{ascii(error.object)[:200]}: not UTF-8 text: rename what has it in its name"
    if isinstance(error, OSError) and error.errno in _DISK:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}: make room, or choose a place that can be read and written, then start again"
    return None


def outage(error: Exception) -> bool:
    """Whether storage does not answer just now, which is nobody's mistake; the error says where and why."""
    distant = isinstance(error, OSError) and error.errno is None and bool(str(error))
    return distant or isinstance(error, StorageError)


def lost_peer(error: Exception) -> bool:
    """Whether an error says that the other end of a collective is gone: then the fault is not this rank's."""
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
