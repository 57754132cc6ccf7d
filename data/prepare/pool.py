"""A process pool: each result comes once, no worker outlives the parent, and the death of a worker is noticed at once.

Workers are plain interpreters that import what a job needs and nothing of the caller's `__main__`. They talk to the parent over
a socket pair, whose end tells a worker that the parent is gone, even in the middle of a job.
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
Report = Callable[..., None]

_START = "import sys; sys.path[:] = sys.argv[2:]; from mikoshi.data.prepare.pool import serve; serve(int(sys.argv[1]))"
# Each worker is one core's: the libraries beneath start no threads of their own.
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def run_jobs(
    task: Callable[[C, J, Report], R],
    context: C,
    jobs: Sequence[J],
    workers: int,
    on_report: Report = lambda *_: None,
    inherited_fds: tuple[int, ...] = (),
) -> Generator[tuple[int, R], None, None]:
    """Call `task(context, job, tell)` for every job on `workers` processes; yield (number of the job, result) as
    jobs end.

    `task` must be a module-level function; it, the context, jobs and results are pickled. A single worker or a single job
    runs in this process.

    on_report: called here as on_report(number of the job, ...) for every `report(...)` of a task.
    inherited_fds: file descriptors that the workers inherit.

    Once a job fails, no further job starts. Raises the error of the first failed job in order: its DataError, StorageError
    or OSError unchanged, DataError if the worker died, and RuntimeError with the worker's traceback for anything else.
    """
    if min(workers, len(jobs)) <= 1:
        for number, job in enumerate(jobs):
            report = lambda *what, number=number: on_report(number, *what)  # noqa: E731
            yield number, task(context, job, report)
        return
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers, len(jobs))):
            pool.append(_start_worker(inherited_fds, task, context))  # noqa: PERF401 - those begun are ended if the next cannot begin
        yield from _schedule(jobs, pool, on_report)
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.wait()
            worker.pipe.close()


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    job: int = field(default=-1)  # -1: idle


def _start_worker(inherited_fds: tuple[int, ...], task: object, context: object) -> _Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-c", _START, str(theirs.fileno()), *sys.path]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(), *inherited_fds), env={**os.environ, **_ONE_THREAD})
    worker = _Worker(process, Connection(ours.detach()))
    worker.pipe.send((task, context))
    return worker


def _schedule(jobs: Sequence[Any], workers: list[_Worker], on_report: Report) -> Iterator[tuple[int, Any]]:
    pending = iter(range(len(jobs)))
    failed: dict[int, Exception] = {}
    by_pipe: dict[object, _Worker] = {worker.pipe: worker for worker in workers}
    for worker in workers:
        _assign(worker, next(pending), jobs)
    while busy := [worker for worker in workers if worker.job >= 0]:
        if failed and min(failed) < min(worker.job for worker in busy):
            break
        for worker in (by_pipe[pipe] for pipe in wait([worker.pipe for worker in busy])):
            status, payload = _receive(worker)
            if status == "report":
                on_report(worker.job, *payload)
                continue
            number, worker.job = worker.job, -1
            if status == "done":
                yield number, payload
            else:
                failed[number] = _failure(status, payload, jobs[number])
            if status != "died" and not failed and (following := next(pending, None)) is not None:
                _assign(worker, following, jobs)
    if failed:
        raise failed[min(failed)]


def _assign(worker: _Worker, number: int, jobs: Sequence[Any]) -> None:
    worker.job = number
    try:
        worker.pipe.send(jobs[number])
    except OSError:  # dead: the next reading from it says so
        return


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        status, payload = worker.pipe.recv()
        return status, payload
    except (EOFError, OSError):
        return "died", worker.process.wait()


def _failure(status: str, payload: Any, job: object) -> Exception:
    if status == "data":
        return DataError(payload)
    if status == "storage":
        return StorageError(payload)
    if status == "disk":
        return OSError(*payload)
    if status == "died":
        how = f"signal {signal.Signals(-payload).name}" if payload < 0 else f"exit code {payload}"
        return DataError(
            f"data.source: the worker process at {job} died ({how}; with SIGKILL, often for want of memory: "
            "give fewer workers); what is finished is kept, the same command goes on"
        )
    return RuntimeError(f"a worker process failed at {job}:\n{payload}")


def serve(handle: int) -> NoReturn:
    """The main loop of a worker, at the other end of the socket `handle`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group, and the parent decides
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(handle)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, orders), daemon=True).start()
    try:
        task, context = orders.get()
        while True:
            pipe.send(_execute(task, context, orders.get(), lambda *what: pipe.send(("report", what))))
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


def _execute(task: Callable[..., Any], context: object, job: object, report: Report) -> tuple[str, Any]:
    try:
        return "done", task(context, job, report)
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
