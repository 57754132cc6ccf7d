"""Jobs on processes of their own: each result comes once, no process outlives its parent, and none that dies is waited for.

Workers are plain interpreters that import what a job needs and nothing of the caller's `__main__`. They and the parent
talk over a socket pair; its end is how a worker learns that the parent is gone, also in the middle of a job.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

from mikoshi.data.errors import DataError, StorageError

C = TypeVar("C")
J = TypeVar("J")
R = TypeVar("R")
Tell = Callable[..., None]

_START = "import sys; sys.path[:] = sys.argv[2:]; from mikoshi.data.prepare.pool import serve; serve(int(sys.argv[1]))"
# Each worker is one core's: the libraries beneath start no threads of their own.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def run(
    task: Callable[[C, J, Tell], R],
    context: C,
    jobs: Sequence[J],
    workers: int,
    told: Tell = lambda *_: None,
    held: tuple[int, ...] = (),
) -> Generator[tuple[int, R], None, None]:
    """Call `task(context, job, tell)` for every job on `workers` processes; yield (number of the job, result) as they end.

    `task` is a function of a module; it, the context, jobs and results are pickled. What a task hands to `tell` comes out
    of told(number of the job, ...) here. `held`: file descriptors that the workers inherit. One worker, or one job, needs
    no process and is run here.

    When a job fails, no further one is begun, and of those that fail the first in order is raised: its DataError,
    StorageError or OSError as it was, RuntimeError with the worker's own traceback for anything else, DataError if the
    worker died.
    """
    if min(workers, len(jobs)) <= 1:
        for number, job in enumerate(jobs):
            tell = lambda *what, number=number: told(number, *what)  # noqa: E731
            yield number, task(context, job, tell)
        return
    crew: list[_Worker] = []
    try:
        for _ in range(min(workers, len(jobs))):
            crew.append(_hire(held, task, context))  # noqa: PERF401 - those begun are ended if the next cannot begin
        yield from _share_out(jobs, crew, told)
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.wait()
            worker.pipe.close()


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    job: int = field(default=-1)  # -1: idle


def _hire(held: tuple[int, ...], task: object, context: object) -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-c", _START, str(theirs.fileno()), *sys.path]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(), *held), env={**os.environ, **_ONE_THREAD})
    worker = _Worker(process, Connection(ours.detach()))
    worker.pipe.send((task, context))
    return worker


def _share_out(jobs: Sequence[Any], crew: list[_Worker], told: Tell) -> Iterator[tuple[int, Any]]:
    coming = iter(range(len(jobs)))
    failed: dict[int, Exception] = {}
    by_pipe: dict[object, _Worker] = {worker.pipe: worker for worker in crew}
    for worker in crew:
        _give(worker, next(coming), jobs)
    while busy := [worker for worker in crew if worker.job >= 0]:
        if failed and min(failed) < min(worker.job for worker in busy):
            break
        for worker in (by_pipe[pipe] for pipe in wait([worker.pipe for worker in busy])):
            kind, what = _hear(worker)
            if kind == "told":
                told(worker.job, *what)
                continue
            number, worker.job = worker.job, -1
            if kind == "done":
                yield number, what
            else:
                failed[number] = _failure(kind, what, jobs[number])
            if kind != "died" and not failed and (following := next(coming, None)) is not None:
                _give(worker, following, jobs)
    if failed:
        raise failed[min(failed)]


def _give(worker: _Worker, number: int, jobs: Sequence[Any]) -> None:
    worker.job = number
    try:
        worker.pipe.send(jobs[number])
    except OSError:  # dead: the next reading from it says so
        return


def _hear(worker: _Worker) -> tuple[str, Any]:
    try:
        kind, what = worker.pipe.recv()
        return kind, what
    except (EOFError, OSError):
        return "died", worker.process.wait()


def _failure(kind: str, what: Any, job: object) -> Exception:
    if kind == "data":
        return DataError(what)
    if kind == "storage":
        return StorageError(what)
    if kind == "disk":
        return OSError(*what)
    if kind == "died":
        how = f"signal {signal.Signals(-what).name}" if what < 0 else f"exit code {what}"
        return DataError(
            f"data.source: the worker process at {job} died ({how}; with SIGKILL, often for want of memory: "
            "give fewer workers); what is finished is kept, the same command goes on"
        )
    return RuntimeError(f"a worker process failed at {job}:\n{what}")


def serve(handle: int) -> NoReturn:
    """A worker's whole life, at the other end of the socket `handle`."""
    for asking in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group, and the parent decides
        signal.signal(asking, signal.SIG_IGN)
    pipe = Connection(handle)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    try:
        task, context = orders.get()
        while True:
            pipe.send(_perform(task, context, orders.get(), lambda *what: pipe.send(("told", what))))
    except OSError:  # nobody listens any more
        os._exit(1)


def _listen(pipe: Connection, orders: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            orders.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)
    except Exception:  # an order that cannot be understood: its class cannot be imported here
        pipe.send(("bug", traceback.format_exc()))


def _perform(task: Callable[..., Any], context: object, job: object, tell: Tell) -> tuple[str, Any]:
    try:
        return "done", task(context, job, tell)
    except DataError as error:
        return "data", str(error)
    except StorageError as error:
        return "storage", str(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        return "disk", (error.errno, error.strerror, error.filename and str(error.filename))
    except MemoryError:
        return "data", f"data.source: {job} does not fit in memory: give fewer workers"
    except Exception:
        return "bug", traceback.format_exc()
