"""Forks ranks from a process that has already imported everything, so that a restart takes no import.

The ranks are children of a multiprocessing forkserver (see fork_server_process), which holds no CUDA context and no Python
thread.
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
from mikoshi.launch.agent.hang_detector import DUMP_SIGNAL
from mikoshi.launch.host.private_folder import private_folder
from mikoshi.parallel.process import heartbeat
from mikoshi.parallel.process.parent_death import die_with_parent
from mikoshi.trainer.exit_codes import FAULT
from mikoshi.trainer.signals import STOP_SIGNALS
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
class RankFiles:
    """The files through which one rank of one attempt reports: its heartbeat page, its error message, the stacks of its
    threads, and its answer."""

    page: Path
    error: Path
    stacks: Path
    answer: Path

    @staticmethod
    def of(folder: Path, attempt: int, rank: int) -> RankFiles:
        """The files of a rank in the private folder of its node."""
        return RankFiles(*(folder / f"attempt-{attempt}-rank-{rank}.{kind}" for kind in ("page", "error", "stacks", "answer")))


@contextlib.contextmanager
def running_fork_server(ranks: int) -> Iterator[None]:
    """Run a fork server that imports what ranks need, inside a `with` block. Call it from the main thread.

    At the end the server is gone, as is the resource tracker that comes with it. Nested uses share one server.

    ranks: ranks of this node, among which the cores are divided for OpenMP
    """
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        yield
        return
    # torch's libraries read it when they are loaded, which happens in the forkserver.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, cores() // ranks))
    _context.set_forkserver_preload(_PRELOADED)
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = config.get("tempdir")
    tracker: Any = resource_tracker._resource_tracker
    tracked = tracker._pid is not None  # started by other code, whose children use it
    with private_folder(sockets=True) as folder:
        config["tempdir"] = str(folder)  # otherwise the socket's folder would stay when this process is killed
        try:
            _start_fork_server()
            yield
        finally:
            _stop(server)
            if not tracked:
                with contextlib.suppress(ChildProcessError):
                    tracker._stop()
            config["tempdir"] = before
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]


def _start_fork_server() -> None:
    """Start the forkserver if there is none.

    It inherits the blocked signals. It also inherits PYTHONSAFEPATH, so that a file in the current folder, such as
    `random.py`, does not hide a module.
    """
    resource_tracker.ensure_running()  # before the signals are blocked, since it unblocks them
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def _stop(server: Any) -> None:
    """Kill the forkserver."""
    if server._forkserver_pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(server._forkserver_pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        server._stop()


def start_rank(
    rank: int,
    env: Mapping[str, str],
    files: RankFiles,
    function: Callable[..., int],
    arguments: tuple[Any, ...],
    log: Path | None = None,
    ranks_on_node: int = 0,
    gpus: bool = False,
) -> ForkServerProcess:
    """Fork a rank that calls `function(*arguments)`, with `env` as its whole environment.

    log: the file for its output; None: the output of this process
    ranks_on_node: if set, pin the rank to its share of the cores
    gpus: with `ranks_on_node`, take the cores beside the rank's GPU
    """
    args = (rank, dict(env), str(Path.cwd()), files, function, arguments, log, ranks_on_node, gpus)
    process = _context.Process(target=_run_rank, args=args, name=f"rank{rank}")
    # Otherwise multiprocessing would run this process's main program in every rank.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = main
    return process


def _run_rank(
    rank: int,
    env: dict[str, str],
    folder: str,
    files: RankFiles,
    function: Callable[..., int],
    arguments: tuple[Any, ...],
    log: Path | None,
    ranks_on_node: int,
    gpus: bool,
) -> NoReturn:
    """Run a rank. It never outlives the fork server, and it does not wait for threads of libraries."""
    from mikoshi.launch.agent import fork_server_process

    open_streams(unread=True)
    die_with_parent()
    if os.getppid() != fork_server_process.PID:  # the fork server died before die_with_parent()
        os._exit(FAULT)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"mikoshi-rank{rank}".encode()[:15], 0, 0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    if log is not None:
        _redirect_output(log)
    if ranks_on_node:
        _pin_to_cores(int(env["LOCAL_RANK"]), ranks_on_node, gpus)
    stacks = _enable_stack_dumps(files.stacks)
    heartbeat.open_page(files.page)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        code = function(*arguments)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if not files.error.exists():
            files.error.write_text(json.dumps({"message": f"{type(error).__name__}: {error}"}))
        code = FAULT
    with contextlib.suppress(OSError):  # the reader of the output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    stacks.close()
    os._exit(code)


def _pin_to_cores(local_rank: int, local_size: int, gpus: bool) -> None:
    """Run on this rank's cores alone. Where a container forbids that, or a GPU's position is unknown, run on any."""
    from mikoshi.launch.host.affinity import cores_for_rank, gpu_buses

    with contextlib.suppress(Exception):
        os.sched_setaffinity(0, cores_for_rank(local_rank, local_size, gpu_buses(local_size) if gpus else ()))
    if threads := os.environ.get("OMP_NUM_THREADS", ""):  # the fork server has read its own value
        import torch

        torch.set_num_threads(int(threads))


def _redirect_output(log: Path) -> None:
    """Append the output of this process and its libraries to a file, line by line."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _enable_stack_dumps(path: Path) -> IO[str]:
    """Print a stack on a crash, and write all stacks to `path` on DUMP_SIGNAL, even while a library holds the interpreter
    lock."""
    file = path.open("w")
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True)
    return file


def error_message(files: RankFiles) -> str:
    """The error message that a rank left, or "". torch's own agent puts the message of an exception in a dict."""
    try:
        args = json.loads(files.error.read_text()).get("message", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(args.get("message", "") if isinstance(args, dict) else args)
