"""Ranks on this machine: torchrun's elastic agent starts and watches them, and this process stands between them and
whoever sends signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterable, Sequence

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trainer.exit_codes import DONE, FAULT, LOST_PEER, PREEMPTED, USER_ERROR

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Run `mikoshi ARGUMENTS` as `ranks` processes that form one world, and return the exit code of the run.

    The meeting point is a free port on the loopback interface. SIGTERM and SIGINT go on to the ranks, which finish
    the step, save and end; the agent, in a thread of its own, only watches. When one rank fails the others are ended.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # how the ranks end is told below, in our words
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    # -P: a folder called `data` or `trainer` where the user happens to be is not ours.
    command = [sys.executable, "-P", "-m", "trainer.cli", *arguments]
    failures: list[ProcessFailure] = []
    broken: list[BaseException] = []

    def watch() -> None:
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            failures.extend(error.failures.values())
        except BaseException as error:
            broken.append(error)

    agent = threading.Thread(target=watch, name="elastic-agent")
    waiting: list[int] = []  # asked for before there was a rank to ask

    def ask(number: int, _frame: object) -> None:
        if not _forward(number):
            waiting.append(number)

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        agent.start()
        while agent.is_alive():
            agent.join(0.1)  # in slices, so that the handler above gets to run
            if waiting and _forward(waiting[0]):
                waiting.pop(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if broken:
        raise broken[0]
    return _outcome(failures)


def _forward(number: int) -> bool:
    """Send a signal to every rank; whether there was one."""
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
    return bool(children)


def _outcome(failures: Iterable[ProcessFailure]) -> int:
    """The run's exit code from its ranks'; the others of a failed rank were ended by SIGTERM and say nothing."""
    by_code: dict[int, list[ProcessFailure]] = {}
    for failure in sorted(failures, key=lambda f: f.timestamp):
        by_code.setdefault(failure.exitcode, []).append(failure)
    if not by_code:
        return DONE
    if USER_ERROR in by_code:
        if all(failure.local_rank != 0 for failure in by_code[USER_ERROR]):  # rank 0 has said it itself
            print(f"error: {by_code[USER_ERROR][0].message}", file=sys.stderr)
        return USER_ERROR
    ended = (PREEMPTED, -signal.SIGTERM, -signal.SIGINT)
    first = [f for code, group in by_code.items() if code not in (*ended, LOST_PEER) for f in group]
    first = first or by_code.get(LOST_PEER, [])
    if not first:
        return PREEMPTED
    how = f"exit code {first[0].exitcode}" if first[0].exitcode > 0 else signal.Signals(-first[0].exitcode).name
    print(f"error: rank {first[0].local_rank} ended with {how}; the other ranks were ended", file=sys.stderr)
    return FAULT
