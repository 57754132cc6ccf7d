"""Runs the first steps of configs in rank processes of their own, one trial after another, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict

from mikoshi.launch.agent import answers
from mikoshi.launch.agent.fork_server import running_fork_server
from mikoshi.launch.agent.outcome import RanksOutcome
from mikoshi.launch.agent.rendezvous import Rendezvous
from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.agent.worker_group import WorkerGroup, WorkerGroupSpec
from mikoshi.launch.controller.supervisor import collect_signals
from mikoshi.launch.host.private_folder import private_folder
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import USER_ERRORS, LaunchError
from mikoshi.trainer.estimate.micro_batch import AttemptResult, failed_attempt, try_steps
from mikoshi.trainer.exit_codes import DONE, FAULT, LOST_PEER
from mikoshi.trainer.train.rank import is_lost_peer, report_error


@contextlib.contextmanager
def trial_runner(ranks: int, memory: int | None) -> Iterator[Callable[[RunConfig], AttemptResult]]:
    """Yield a function that tries a config in `ranks` ranks. Call it from the main thread.

    The function raises LaunchError if the trial takes too long or a signal stops it.

    memory: bytes that each rank may use; None for no limit
    """
    requests, count = StopRequests(grace=5.0), 0
    with collect_signals(requests), running_fork_server(ranks), private_folder() as private:

        def run_trial(config: RunConfig) -> AttemptResult:
            nonlocal count
            rendezvous = Rendezvous()  # stays open during the attempt
            spec = WorkerGroupSpec(
                count, rendezvous.single_node(ranks), _rank, (config, memory), config.recovery, None, private, logs=None
            )
            count += 1
            group = WorkerGroup(spec, requests)
            timer = threading.Timer(config.recovery.patience, group.stop_event.set)
            timer.start()
            try:
                result = merge_results(group.run())
            finally:
                timer.cancel()
            if group.stop_event.is_set():
                raise LaunchError(
                    f"train.micro_batch={config.train.micro_batch}: two steps took longer than recovery.patience = "
                    f"{config.recovery.patience:g} s: raise it, or look why the ranks wait"
                )
            if requests.signals:
                raise LaunchError("stopped by a signal: nothing was found")
            return result

        yield run_trial


def merge_results(outcome: RanksOutcome) -> AttemptResult:
    """Merge the results of a trial's ranks. One failed rank fails the trial."""
    found = [AttemptResult(**json.loads(text)) for _, text in sorted(outcome.answers.items())]
    if failed := next((result for result in found if result.error), None):
        return failed
    killed = [rank for rank, code in outcome.codes.items() if code == -signal.SIGKILL]
    if killed and all(code in (-signal.SIGKILL, LOST_PEER, DONE) for code in outcome.codes.values()):
        return AttemptResult(
            error=f"rank {killed[0]} was killed (SIGKILL), as the kernel does with what makes it run out of memory."
        )
    wrong = [rank for rank, code in outcome.codes.items() if code != DONE]
    if not wrong and len(found) == outcome.ranks:
        return AttemptResult(max(result.peak for result in found))
    rank = outcome.root_cause(wrong, LOST_PEER, -signal.SIGKILL) if wrong else 0
    said = outcome.said.get(rank, "").splitlines()
    return AttemptResult(error=f"rank {rank}: {said[0][:300] if said else f'ended with exit code {outcome.codes.get(rank)}'}")


def _rank(config: RunConfig, memory: int | None) -> int:
    """Run one rank of a trial. Its place is in the environment."""
    from mikoshi.parallel.process.process_group import world_from

    world = world_from(os.environ)
    assert world is not None, "the worker group sets the rank's place"
    try:
        result = try_steps(config, world, memory)
    except Exception as error:
        result = failed_attempt(error)
        if isinstance(error, USER_ERRORS) or is_lost_peer(error):
            return report_error(error, world.rank)
    answers.write_answer(asdict(result))
    return FAULT if result.error else DONE
