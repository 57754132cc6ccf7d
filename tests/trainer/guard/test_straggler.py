"""A rank twice as slow as its peers is named within 20 steps; ranks that are not raise no alarm, however busy the machine."""

import random
import subprocess
import sys
import time
from statistics import median
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from layouts import degrees
from mikoshi.trainer.guard.straggler import SlowRank, Stragglers, find_slow
from runs import engine_and_rows, run_config


def test_who_is_slow():
    assert find_slow([1.0, 1.0, 2.0, 1.1], [0, 0, 0, 0]) == [SlowRank(2, 2.0)]
    assert find_slow([1.0, 1.3, 0.8, 1.1], [0, 0, 0, 0]) == []
    assert find_slow([1.0, 2.0], [0, 0]) == [SlowRank(1, 2.0)]
    assert find_slow([1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1]) == [], "another stage, another amount of work"
    assert find_slow([1.0, 1.0, 9.0], [0, 0, 1]) == [], "alone it has no peers"
    assert find_slow([3.0, 1.0, 1.0, 3.0], [0, 0, 0, 0]) == [SlowRank(0, 3.0), SlowRank(3, 3.0)]
    assert find_slow([0.0, 0.0, 1.0, 0.0], [0, 0, 0, 0]) == [], "nothing is known of the others"


def test_who_is_slow_is_who_the_definition_says():
    by_chance = random.Random(1)
    for count in (1, 2, 3, 4, 7, 16) * 20:
        peers = [by_chance.randrange(3) for _ in range(count)]
        times = [by_chance.choice((0.0, 1.0, 1.0, 1.4, 2.0, 5.0)) for _ in range(count)]
        wanted = []
        for rank, mine in enumerate(times):
            others = [t for at, t in enumerate(times) if at != rank and peers[at] == peers[rank] and t > 0]
            if others and mine >= 1.5 * median(others):
                wanted.append(SlowRank(rank, mine / median(others)))
        assert find_slow(times, peers) == wanted


def test_thousands_of_ranks_are_compared_in_thousands_of_looks():
    class Counted(float):
        looks = 0

        def __lt__(self, other):
            Counted.looks += 1
            return float(self) < float(other)

        def __gt__(self, other):
            Counted.looks += 1
            return float(self) > float(other)

    times = [Counted(1.0 + random.Random(rank).random() / 4) for rank in range(4096)]
    times[77] = Counted(3.0)
    assert [one.rank for one in find_slow(times, [rank % 2 for rank in range(4096)])] == [77]
    assert Counted.looks < 40 * 4096


def test_who_is_slow_once_is_not_named():
    watch, first = Stragglers(torch.device("cpu"), [0, 0]), SlowRank(0, 2.0)
    assert [watch.persistent([first], [0, 1]) for _ in range(2)] == [[], []]
    assert watch.persistent([], [0, 1]) == []
    assert [watch.persistent([SlowRank(0, ratio)], [0, 1]) for ratio in (2.0, 9.0, 3.0)] == [[], [], [SlowRank(0, 3.0)]]
    assert [watch.persistent([first], [0, 1]) for _ in range(2)] == [[], []]
    assert watch.persistent([first], [1]) == [], "told by a time of long ago"
    assert watch.persistent([first], [0]) == [first]


def steps(config, count, slow_rank, since):
    """Train; what is named, by step. From a step on `slow_rank` burns three times as much time again as it works: beside
    other tests the clock of a rank at work goes up to half as fast again now and then."""
    engine, loader = engine_and_rows(config)
    peers = [engine.layout.coordinates(rank).pp for rank in range(dist.get_world_size())]
    stragglers, found = Stragglers(torch.device("cpu"), peers), []
    for step in range(1, count + 1):
        rows = loader.batch(step - 1)
        stragglers.begin()
        begun = time.thread_time()
        engine.step(rows, 1e-3)
        if dist.get_rank() == slow_rank and step >= since:
            until = time.thread_time() + 3 * (time.thread_time() - begun)
            while time.thread_time() < until:
                pass
        stragglers.end()
        if stragglers.due(step):
            found += [(step, one.rank, one.ratio) for one in stragglers.slow_ranks()]
    return found


def told_times(slow_rank, since, count, seed):
    """What is named of ranks whose clocks tell work of a second a step, a fifth more or less; `slow_rank`'s twice that."""
    by_chance, now = random.Random(seed + dist.get_rank()), [0.0]
    watch, found = Stragglers(torch.device("cpu"), [0] * dist.get_world_size()), []
    with mock.patch("mikoshi.trainer.guard.straggler.time.thread_time", lambda: now[0]):
        for step in range(1, count + 1):
            watch.begin()
            now[0] += by_chance.uniform(0.8, 1.2) * (2 if dist.get_rank() == slow_rank and step >= since else 1)
            watch.end()
            found += [(step, one.rank, one.ratio) for one in watch.slow_ranks()] if watch.due(step) else []
    return found


def told_often(count, seeds):
    return [told_times(seed % 4, since, count, 4 * seed) for seed in range(seeds) for since in range(1, 6)]


def test_a_rank_twice_as_slow_is_named_within_20_steps(ranks):
    for found in ranks.run(told_often, 25, 20, world=4):
        cases = [(seed % 4, since) for seed in range(20) for since in range(1, 6)]
        for (rank, since), slow_ranks in zip(cases, found, strict=True):
            ((step, one, ratio),) = slow_ranks
            assert one == rank and step < since + 20 and 1.6 < ratio < 2.5, (since, slow_ranks)


def config_of(dataset, folder, layout, count):
    return run_config(dataset, folder, parallel=degrees(layout), train={"steps": count, "global_batch": 16})


@pytest.mark.parametrize(
    ("layout", "rank", "since"),
    [
        ("zero=0", 2, 6),
        pytest.param("zero=3", 0, 7, marks=pytest.mark.slow),
        pytest.param("pp=2", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named_within_20_steps_of_training(ranks, dataset, tmp_path, layout, rank, since):
    found = ranks.run(steps, config_of(dataset, tmp_path, layout, 30), 30, rank, since, world=4)
    assert all(one == found[0] for one in found), "the same on every rank"
    assert {slow_ranks for _, slow_ranks, _ in found[0]} == {rank}
    assert found[0][0][0] < since + 20


@pytest.mark.parametrize(
    ("count", "hogs"),
    [(60, 1), pytest.param(1000, 0, marks=pytest.mark.soak), pytest.param(1000, 2, marks=pytest.mark.soak)],
)
def test_no_alarm_over_normal_steps_beside_others_at_work(ranks, dataset, tmp_path, hogs, count):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
    try:
        found = ranks.run(steps, config_of(dataset, tmp_path, "zero=0", count), count, None, 0, world=4, timeout=600)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert found == [[]] * 4


def test_a_lone_rank_is_never_due():
    alone = Stragglers(torch.device("cpu"), [0])
    assert not any(alone.due(step) for step in range(100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_product_is_timed_on_the_device():
    watch = Stragglers(torch.device("cuda"), [0, 0])
    begun = time.monotonic()
    while len(watch.known) < 3 and time.monotonic() < begun + 20:
        watch.begin()
        torch.cuda.synchronize()
        watch.end()
    assert len(watch.known) == 3
    assert all(1e-6 < seconds < 0.5 for seconds in watch.known)
    assert 2 * sum(watch.known) < 0.01 * (time.monotonic() - begun), "seldom enough"
