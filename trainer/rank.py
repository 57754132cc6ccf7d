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
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from trainer.errors import USER_ERRORS
from trainer.exit_codes import DONE, FAULT, LOST_PEER, PREEMPTED, USER_ERROR

if TYPE_CHECKING:
    import torch

    from parallel.world import World
    from trainer.config import RunConfig
    from trainer.generate import Sampling
    from trainer.runfolder import RunFolder

# Of these the user is told in one line: the disk is full, read-only, over quota, or not ours to write.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)


def train_rank(run: RunConfig, place: World) -> int:
    """This process's part of a run, as one rank; its exit code."""
    from parallel.world import die_with_parent, join, leave, pick_device

    if place.master is None:
        device = pick_device(run.engine.device, place)
        join(place, device)
        try:
            return _fit(run, place, device)
        finally:
            leave()
    watched = "TORCHELASTIC_RUN_ID" in os.environ
    if watched:
        die_with_parent()
    try:
        from trainer.preflight import preflight

        preflight(run, place.size)  # a launcher of another make has checked nothing
        device = pick_device(run.engine.device, place)
        join(place, device)
        code = _fit(run, place, device)
        if watched:  # all is saved: when a peer ends a moment earlier, the agent's SIGTERM is no longer meant for us
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave()
        _end(code)
    except Exception as error:
        _gone(error, place.rank)


def _fit(run: RunConfig, place: World, device: torch.device) -> int:
    from trainer.loop import fit

    return DONE if fit(run, place, device) else PREEMPTED


def generate_rank(
    folder: RunFolder, place: World, device: str, prompt: str, tokens: int, sampling: Sampling, degrees: dict[str, int]
) -> int:
    """This process's part of a generation, as one rank of several; rank 0 writes the text. Its exit code."""
    from parallel.world import die_with_parent, join, leave, pick_device
    from trainer.generate import generate_together, load_engine, text_stream

    die_with_parent()
    try:
        here = pick_device(device, place)
        join(place, here)
        engine, tokenizer = load_engine(folder, degrees, place, here)
        start = tokenizer.encode(prompt) or [tokenizer.separator]
        pieces = text_stream(tokenizer, start, generate_together(engine, start, tokens, sampling, tokenizer.separator))
        for piece in itertools.chain([prompt], pieces, ["\n"]):
            if place.rank == 0:
                typer.echo(piece, nl=False)
        leave()
        return DONE
    except Exception as error:
        _gone(error, place.rank)


def _gone(error: Exception, rank: int) -> NoReturn:
    """End this rank with no orderly leave, which would wait for peers that wait for it: gone at once, the launcher sees it."""
    _end(say(error, rank))


def _end(code: int) -> NoReturn:
    """End this process now: what is to be kept is on disk, and no thread of a library has a say in how it ends."""
    with contextlib.suppress(OSError):  # whoever reads our output may be what is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def say(error: Exception, rank: int) -> int:
    """Tell what ended this rank; its exit code."""
    text = told(error)
    if text is None and _lost_peer(error):
        # Not a word on stderr but one line: the traceback that matters is that of the rank that was lost.
        print(f"rank {rank}: another rank is gone: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return LOST_PEER
    if text is None:
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(error)
        return FAULT
    if rank == 0:
        print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)
    else:
        _leave_message(text)
    return USER_ERROR


def told(error: Exception) -> str | None:
    """The one line of a user's mistake; None for a fault of ours, which deserves its stack trace."""
    if isinstance(error, USER_ERRORS):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}: make room, or choose a place that can be read and written, then start again"
    return None


def _lost_peer(error: Exception) -> bool:
    """Whether an error says that the other end of a collective is gone: then the fault is not this rank's."""
    from torch.distributed import DistBackendError, DistNetworkError

    text = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Read error",
            "Write error", "remote process exited", "Socket Timeout", "failed to recv")  # fmt: skip
    ours = isinstance(error, (DistBackendError, DistNetworkError)) or (isinstance(error, RuntimeError) and "gloo" in text)
    return ours and any(words in text for words in gone)


def _leave_message(text: str) -> None:
    """A user's error on a rank other than 0: into the file that torchrun's agent reads, so that it is said once."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        print(f"error: {text}", file=sys.stderr)
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))
