"""Saves by time cost least together with what faults repeat, all ranks save the same steps, and a run says what it may lose."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mikoshi.trainer.checkpoint.of_run import retention_of
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.config.run import load_config, to_toml
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.signals import agree
from mikoshi.trainer.train.save_schedule import SOONEST, SaveSchedule
from mikoshi.trainer.train.saves import Saves
from runs import run_config

HOUR = 3600.0


def schedule(tmp_path, ranks=8, mtbf=None, steps=10**6, **checkpoint):
    recovery = {} if mtbf is None else {"mtbf": mtbf}
    return SaveSchedule(run_config(tmp_path, tmp_path, train={"steps": steps}, checkpoint=checkpoint, recovery=recovery), ranks)


def saved_steps(made, step_seconds, stall, steps, start=0):
    """The steps that a run of this pace saves, on a clock of its own."""
    made.start_at(start, 0.0)
    now, saved = 0.0, []
    for done in range(start + 1, steps + 1):
        now += step_seconds
        if made.due(done, now):
            made.save_started(now)
            now += stall
            made.measured(stall, 2 * stall)
            saved.append(done)
    return saved


def lost_to_saves_and_faults(interval, stall, mtbf, seed):
    """By playing it: hours of useful work take how many seconds more, with faults at random."""
    draw, work, clock, total = random.Random(seed), 0.0, 0.0, 200 * HOUR
    fault = draw.expovariate(1 / mtbf)
    while work < total:
        clock += interval + stall
        if clock > fault:
            clock, fault = fault, fault + draw.expovariate(1 / mtbf)  # all since the last save is lost
        else:
            work += interval
    return clock - total


@pytest.mark.parametrize(("stall", "mtbf"), [(20.0, 24.0), (60.0, 6.0), (5.0, 2.0)])
def test_no_other_interval_loses_less(tmp_path, stall, mtbf):
    made = schedule(tmp_path, mtbf=mtbf)
    made.measured(stall, stall)
    assert made.interval >= SOONEST

    def lost(interval):
        return sum(lost_to_saves_and_faults(interval, stall, mtbf * HOUR, seed) for seed in range(6))

    best = lost(max(made.interval, SOONEST))
    assert best < lost(made.interval * 3)
    assert best < lost(made.interval / 3)


def test_the_first_save_comes_after_minutes_and_measures_what_the_others_cost(tmp_path):
    assert saved_steps(schedule(tmp_path), 0.1, 5.0, 2900) == [], "a run of less than that saves at its end only"
    steps = saved_steps(schedule(tmp_path), 1.0, 10.0, 10_000)
    assert steps[0] == SOONEST
    interval = (2 * 10.0 * 24 * HOUR) ** 0.5  # 22 minutes
    assert {b - a for a, b in itertools.pairwise(steps)} == {int(interval - 10.0) + 1}
    quick = saved_steps(schedule(tmp_path), 1.0, 0.01, 10_000)
    assert quick[1] - quick[0] == SOONEST, "one that costs next to nothing is made no more often"
    assert saved_steps(schedule(tmp_path), 1.0, 10.0, 10_000, start=500)[0] == 500 + SOONEST


def test_more_ranks_are_saved_more_often(tmp_path):
    made = [schedule(tmp_path, ranks) for ranks in (1, 1000, 16_384)]
    assert [round(one.mtbf / HOUR, 2) for one in made] == [24, 24, 3.05]
    assert schedule(tmp_path, 16_384, mtbf=12).mtbf == 12 * HOUR


def test_a_save_that_takes_long_to_be_written_is_not_due_again_before_it_is(tmp_path):
    made = schedule(tmp_path)
    made.measured(0.1, 2000.0)
    assert made.interval == 2000.0


def test_steps_between_checkpoints_are_what_is_asked(tmp_path):
    assert saved_steps(schedule(tmp_path, every=30), 100.0, 1.0, 100) == [30, 60, 90]
    assert saved_steps(schedule(tmp_path, every=30, keep_every=50), 100.0, 1.0, 100) == [30, 60, 90]
    assert saved_steps(schedule(tmp_path, every=0), 100.0, 1.0, 100) == [], "only at the end"
    assert schedule(tmp_path, every=0, keep_every=50).due(50, 0.0) is False
    assert saved_steps(schedule(tmp_path, keep_every=40), 1.0, 0.1, 100) == [40, 80], "kept for good, and so saved"


def test_of_the_config(tmp_path):
    assert run_config(tmp_path, tmp_path).checkpoint.every is None
    for every, regular in ((None, 0), (0, 0), (7, 7)):
        config = run_config(tmp_path, tmp_path, checkpoint={"every": every})
        (tmp_path / "run.toml").write_text(to_toml(config))
        again = load_config(tmp_path / "run.toml")
        assert (again.checkpoint.every, again.checkpoint.regular) == (every, regular)
        assert retention_of(again) == Keep(2)
    for every in (None, 0):  # going back is decided by steps, the same whatever time they take
        (tmp_path / "run.toml").write_text(to_toml(run_config(tmp_path, tmp_path, checkpoint={"every": every})))
        with pytest.raises(ConfigError, match=r"set checkpoint\.every"):
            load_config(tmp_path / "run.toml", ['guard.spike="rewind"'])


def test_a_run_says_what_a_fault_would_lose(tmp_path):
    made = schedule(tmp_path, every=500, steps=1200)
    made.start_at(0, 0.0)
    told, figures = made.at_start()
    assert told == "saves every 500 steps: a fault would lose at most 500 steps"
    assert figures == {"every": 500, "at_most_lost_steps": 500}
    assert made.interval_change(19, 19 * 3.0) is None
    told, figures = made.interval_change(20, 20 * 3.0)
    assert told == "saves every 500 steps, about 25 minutes; a fault would lose at most 26 minutes"
    assert (figures["every"], figures["seconds"]) == (500, 1500)
    assert made.interval_change(21, 21 * 3.0) is None, "once"
    made.start_at(1000, 0.0)
    assert made.at_start()[1]["at_most_lost_steps"] == 200

    made = schedule(tmp_path, every=0)
    made.start_at(40, 0.0)
    assert made.at_start()[0] == "saves only at the end (checkpoint.every = 0): a fault would lose all since step 40"

    made = schedule(tmp_path)
    made.start_at(0, 0.0)
    assert made.at_start()[0] == (
        "saves by time, the first one after 5 minutes, then as often as costs least with a fault every 24 h (recovery.mtbf); "
        "a fault before the first would lose all since step 0"
    )
    assert made.interval_change(100, 1000.0) is None, "nothing is measured yet"
    made.measured(10.0, 90.0)
    told, figures = made.interval_change(100, 1000.0)
    assert told == "saves every about 131 steps, about 22 minutes; a fault would lose at most 24 minutes"
    assert figures["at_most_lost_seconds"] == pytest.approx(1314.5 + 90 + 10, abs=0.1)


def by_time(folder, steps):
    """Ranks whose clocks do not agree: the steps that this one has saved."""
    config = run_config(folder, folder, train={"steps": steps})
    rank = dist.get_rank()
    log = SimpleNamespace(
        silent=rank > 0, layout=SimpleNamespace(world=dist.get_world_size()), saved=lambda *_: None, restart_clock=lambda: None,
        save_plan=lambda *_: None,
    )  # fmt: skip
    saves = Saves(config, Saver(LocalStore(folder), Keep(99)), log, lambda: {"w": torch.ones(3)}, lambda _: None)
    saves.start_at(0)
    saved = []
    for done in range(1, steps + 1):
        saves.schedule._last -= 100.0 if rank == 0 else 1e6 * rank  # so long does a step take here
        agreed = agree(False, *saves.flags(done))
        saves.after_step(done, agreed, lambda _: {"config": "", "data": {}})
        saved += [done] if agreed.save else []
    saves.wait_for_save()
    return saved


def test_all_ranks_save_the_steps_that_the_first_ones_clock_asks_for(ranks, tmp_path):
    told = ranks.run(by_time, tmp_path, 10, world=2)
    assert told == [[3, 6, 9]] * 2
    assert LocalStore(tmp_path).steps() == [9, 6, 3]
