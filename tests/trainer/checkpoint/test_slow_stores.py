"""A store may take longer than the process group waits for any collective: the ranks that are done wait on, and show life."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mikoshi.parallel.process import heartbeat
from mikoshi.trainer.checkpoint import waiting
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.local import LocalStore

TIMEOUT = 2.0  # of the process group
WORK = 2.6  # of the one rank that all others wait for


class Slow(LocalStore):
    """Whose work takes long on one rank: everything that is called `slow` there."""

    def __init__(self, folder, slow, error=None):
        super().__init__(folder)
        self.slow, self.error = slow, error

    def begin(self, step):
        self._take("begin")
        super().begin(step)

    def create(self, step, name):
        if self.error is not None:
            raise self.error
        self._take("create")
        return super().create(step, name)

    def commit(self, step, manifest):
        self._take("commit")
        super().commit(step, manifest)

    def abandon(self, step):
        self._take("abandon")
        super().abandon(step)

    def _take(self, what):
        if what in self.slow:
            time.sleep(WORK)


def save_slowly(rendezvous, folder, what, background):
    """With a process group of little patience: the outcome's error, the beats, and the steps that are there."""
    rank = dist.get_rank()
    dist.barrier()  # as patient as ever: the ranks may still be importing
    dist.destroy_process_group()
    store = dist.FileStore(str(rendezvous), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    waiting.FIRST_WAIT, waiting.LATER_WAITS = 0.2, 0.4
    beats = []
    heartbeat.set_listener(lambda _, phase: beats.append(phase))
    try:
        by_whom = 1 if what == "create" else 0  # the others are for the first rank to do
        error = OSError("no room") if what == "abandon" and rank == 1 else None
        saver = Saver(Slow(folder, {what} if rank == by_whom else (), error), Keep(1), background)
        saver.begin(1, {"w": torch.arange(10.0), f"w{rank}": torch.ones(5)}, {"config": ""})
        outcome = saver.conclude()
    finally:
        heartbeat.set_listener(None)
    return outcome.error, beats, saver.store.steps()


@pytest.mark.parametrize(
    ("what", "background"), [("create", True), ("create", False), ("begin", True), ("commit", True), ("abandon", True)]
)
def test_who_is_done_waits_for_who_is_not(ranks, tmp_path, what, background):
    results = ranks.run(save_slowly, tmp_path / "store", tmp_path / "c", what, background, world=2)
    for error, beats, steps in results:
        assert error == ("rank 1: no room" if what == "abandon" else None)
        assert steps == ([] if what == "abandon" else [1])
        assert set(beats) == {"save"}
        assert len(beats) >= 5


def conclude_without_a_beat(folder):
    beats = []
    heartbeat.set_listener(lambda _, phase: beats.append(phase))
    try:
        saver = Saver(LocalStore(folder), Keep(1))
        saver.begin(1, {"w": torch.ones(5)}, {"config": ""})
        return saver.conclude().error, beats
    finally:
        heartbeat.set_listener(None)


def test_where_nobody_waits_nothing_is_said(ranks, tmp_path):
    assert ranks.run(conclude_without_a_beat, tmp_path, world=2) == [(None, [])] * 2
