"""Attempts of a run's first steps in rank processes of their own, one after another, of which nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict

from mikoshi.launch.agent import answers
from mikoshi.launch.agent.fork_server import warm
from mikoshi.launch.agent.outcome import Ended
from mikoshi.launch.agent.rendezvous import Meeting
from mikoshi.launch.agent.requests import Requests
from mikoshi.launch.agent.worker_group import Attempt, Ranks
from mikoshi.launch.controller.supervisor import asked
from mikoshi.launch.host.private_folder import private_folder
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import USER_ERRORS, LaunchError
from mikoshi.trainer.estimate.micro_batch import Told, in_words, try_steps
from mikoshi.trainer.exit_codes import DONE, FAULT, LOST_PEER
from mikoshi.trainer.train.rank import lost_peer, say


@contextlib.contextmanager
def attempts(ranks: int, memory: int | None) -> Iterator[Callable[[RunConfig], Told]]:
    """Gives the function that has `ranks` ranks try a config, each with so many bytes at most. For the main thread: a signal
    to stop ends the ranks, and then LaunchError is raised."""
    requests, count = Requests(grace=5.0), 0
    with asked(requests), warm(ranks), private_folder() as private:

        def carry(config: RunConfig) -> Told:
            nonlocal count
            meeting = Meeting()  # open for as long as the attempt lasts
            attempt = Attempt(count, meeting.alone(ranks), _rank, (config, memory), config.recovery, None, private, logs=None)
            count += 1
            running = Ranks(attempt, requests)
            late = threading.Timer(config.recovery.patience, running.end.set)
            late.start()
            try:
                told = told_of(running.run())
            finally:
                late.cancel()
            if running.end.is_set():
                raise LaunchError(
                    f"train.micro_batch={config.train.micro_batch}: two steps took longer than recovery.patience = "
                    f"{config.recovery.patience:g} s: raise it, or look why the ranks wait"
                )
            if requests.asked:
                raise LaunchError("stopped by a signal: nothing was found")
            return told

        yield carry


def told_of(ended: Ended) -> Told:
    """What the ranks of an attempt say together: one that has failed speaks for all."""
    found = [Told(**json.loads(text)) for _, text in sorted(ended.answers.items())]
    if failed := next((told for told in found if told.error), None):
        return failed
    killed = [rank for rank, code in ended.codes.items() if code == -signal.SIGKILL]
    if killed and all(code in (-signal.SIGKILL, LOST_PEER, DONE) for code in ended.codes.values()):
        return Told(error=f"rank {killed[0]} was killed (SIGKILL), as the kernel does with what makes it run out of memory.")
    wrong = [rank for rank, code in ended.codes.items() if code != DONE]
    if not wrong and len(found) == ended.ranks:
        return Told(max(told.peak for told in found))
    rank = ended.first(wrong, LOST_PEER, -signal.SIGKILL) if wrong else 0
    said = ended.said.get(rank, "").splitlines()
    return Told(error=f"rank {rank}: {said[0][:300] if said else f'ended with exit code {ended.codes.get(rank)}'}")


def _rank(config: RunConfig, memory: int | None) -> int:
    """The part of an attempt of the rank that the environment says."""
    from mikoshi.parallel.process.process_group import world_from

    place = world_from(os.environ)
    assert place is not None, "whoever starts an attempt says which rank this is"
    try:
        told = try_steps(config, place, memory)
    except Exception as error:
        told = in_words(error)
        if isinstance(error, USER_ERRORS) or lost_peer(error):
            return say(error, place.rank)
    answers.leave(asdict(told))
    return FAULT if told.error else DONE
