"""A rank is forked from a process that has imported everything already: to start one again takes no import.

The ranks are children of a forkserver (see fork_server_process), which holds no CUDA context and runs no thread of Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any, NoReturn

from mikoshi.data.io.cores import cores
from mikoshi.launch.agent.hang_detector import DUMP
from mikoshi.launch.host.private_folder import private_folder
from mikoshi.parallel.process import heartbeat as pulse
from mikoshi.parallel.process.parent_death import die_with_parent
from mikoshi.trainer.exit_codes import FAULT
from mikoshi.trainer.signals import ASKING
from mikoshi.trainer.streams import open_streams

_PRELOADED = [
    "mikoshi.launch.agent.fork_server_process",
    "torch.distributed",
    "mikoshi.trainer.train.rank",
    "mikoshi.trainer.train.loop",
    "mikoshi.trainer.train.preflight",
    "mikoshi.launch.agent.fork_server",
]
_PR_SET_NAME = 15  # from prctl.h
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Files:
    """Where one rank of one attempt leaves word: its page, the message of its error, the stacks of its threads, and its answer
    to whoever started it for one."""

    page: Path
    error: Path
    stacks: Path
    answer: Path

    @staticmethod
    def of(folder: Path, attempt: int, rank: int) -> Files:
        return Files(*(folder / f"attempt-{attempt}-rank-{rank}.{kind}" for kind in ("page", "error", "stacks", "answer")))


@contextlib.contextmanager
def warm(ranks: int) -> Iterator[None]:
    """Begin to import what ranks need, in a process beside this one, which is gone at the end, as is the tracker of shared
    memory that comes with it. For the main thread.

    Within another one it does nothing.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        yield
        return
    # Read when torch's libraries are loaded, which is in the forkserver.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, cores() // ranks))
    _context.set_forkserver_preload(_PRELOADED)
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = config.get("tempdir")
    tracker: Any = resource_tracker._resource_tracker
    tracked = tracker._pid is not None  # by something else in this process, whose children hold on to it
    with private_folder(sockets=True) as folder:
        config["tempdir"] = str(folder)  # else its socket's folder stays for good when this process is killed
        try:
            _launch()
            yield
        finally:
            _stop(server)
            if not tracked:
                with contextlib.suppress(ChildProcessError):
                    tracker._stop()
            config["tempdir"] = before
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]


def _launch() -> None:
    """Start the forkserver where there is none. It inherits the signals held back, and a path without the folder where the
    user happens to be: a file there that is called as a module is, `random.py` say, is not one."""
    resource_tracker.ensure_running()  # by itself: it lets signals through again
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def _stop(server: Any) -> None:
    """End the forkserver at once."""
    if server._forkserver_pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(server._forkserver_pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        server._stop()


def start(
    rank: int,
    env: Mapping[str, str],
    files: Files,
    work: Callable[..., int],
    arguments: tuple[Any, ...],
    log: Path | None = None,
    bound: int = 0,
    gpus: bool = False,
) -> ForkServerProcess:
    """Fork a rank, whose environment is `env` alone, and have it call `work`. In its process no other code of ours runs.

    log: the file that it prints to; None: where this process does. bound: ranks of this node, each of which keeps to cores of
    its own, and, with `gpus`, beside its GPU; 0: it runs on any.
    """
    told = (rank, dict(env), str(Path.cwd()), files, work, arguments, log, bound, gpus)
    process = _context.Process(target=_rank, args=told, name=f"rank{rank}")
    # Else multiprocessing runs the program that this process was started with in every rank once more.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
    return process


def _rank(
    rank: int,
    env: dict[str, str],
    folder: str,
    files: Files,
    work: Callable[..., int],
    arguments: tuple[Any, ...],
    log: Path | None,
    bound: int,
    gpus: bool,
) -> NoReturn:
    """The life of a rank. It never outlives the process that it is forked from, nor waits for a library's threads."""
    from mikoshi.launch.agent import fork_server_process as nursery

    open_streams(unread=True)
    die_with_parent()
    if os.getppid() != nursery.PID:  # it died before that was said
        os._exit(FAULT)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"mikoshi-rank{rank}".encode()[:15], 0, 0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    if log is not None:
        _print_to(log)
    if bound:
        _keep_to_cores(int(env["LOCAL_RANK"]), bound, gpus)
    stacks = _traces(files.stacks)
    pulse.open_page(files.page)
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    try:
        code = work(*arguments)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if not files.error.exists():
            files.error.write_text(json.dumps({"message": f"{type(error).__name__}: {error}"}))
        code = FAULT
    with contextlib.suppress(OSError):  # whoever reads our output may be what is gone
        sys.stdout.flush()
        sys.stderr.flush()
    stacks.close()
    os._exit(code)


def _keep_to_cores(local_rank: int, local_size: int, gpus: bool) -> None:
    """Run on this rank's cores alone. Where a container forbids it, or a GPU does not say where it is, on any."""
    from mikoshi.launch.host.affinity import bind, gpu_buses

    with contextlib.suppress(Exception):
        os.sched_setaffinity(0, bind(local_rank, local_size, gpu_buses(local_size) if gpus else ()))
    if threads := os.environ.get("OMP_NUM_THREADS", ""):  # read long ago, by the process that this one is forked from
        import torch

        torch.set_num_threads(int(threads))


def _print_to(log: Path) -> None:
    """Append what this process and its libraries print to a file, line by line."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _traces(path: Path) -> IO[str]:
    """Have a crash tell where it was on stderr, and DUMP do so in this file, even while a library holds the interpreter."""
    file = path.open("w")
    faulthandler.enable()
    faulthandler.register(DUMP, file=file, all_threads=True)
    return file


def message(files: Files) -> str:
    """What a rank says of its end; empty if nothing. torch's own agent has the message of an exception in a dict."""
    try:
        told = json.loads(files.error.read_text()).get("message", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(told.get("message", "") if isinstance(told, dict) else told)
