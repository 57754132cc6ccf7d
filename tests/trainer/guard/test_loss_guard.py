"""The loss guard raises no alarm over training as it is, sees what is off, and decides the same after a kill."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.data.sampling.curriculum import check_skips
from mikoshi.data.sampling.sampler import make_skips
from mikoshi.trainer.config.data import GuardSection
from mikoshi.trainer.engines.base import StepLimits
from mikoshi.trainer.errors import CheckpointError, RunError
from mikoshi.trainer.guard.loss_guard import LossGuard, Rewind, abandoned, add_rewind, read_rewinds
from runs import engine_and_rows, run_config

INF, NAN = math.inf, math.nan


def curve(seed, steps, noise, heavy, warmup=100):
    """Losses that fall by a power of the step, norms that rise in the warm-up and sink, with noise, the norms' with a tail
    of Student's t."""
    rng = random.Random(seed)
    for step in range(steps):
        loss = 2.0 + 8.5 * (step + 3) ** -0.25 + rng.gauss(0, noise)
        student = rng.gauss(0, 1) / math.sqrt(sum(rng.gauss(0, 1) ** 2 for _ in range(heavy)) / heavy)
        norm = (0.3 + min(step, warmup) / warmup * 0.7 * (1 + 200 / (step + 100))) * math.exp(0.1 * student)
        yield loss, norm


def alarms(guard, figures):
    """The steps that are judged anything but normal; spikes are not applied."""
    found = []
    for step, (loss, norm) in enumerate(figures):
        verdict = guard.judge(loss, norm)
        limits = guard.limits()
        assert (verdict.kind == "") == (loss < limits.loss and norm < limits.norm), "the engine and the guard agree"
        if verdict.kind:
            found.append((step, verdict.kind, verdict.why))
        else:
            guard.accept(loss, norm)
    return found


@pytest.mark.parametrize(("seeds", "steps"), [(5, 1500), pytest.param(40, 10_000, marks=pytest.mark.soak)])
def test_no_alarm_over_curves_as_they_are(seeds, steps):
    shapes = [(0.003, 6), (0.02, 5), (0.1, 6), (0.3, 8), (0.0, 12)]
    for seed in range(seeds):
        assert alarms(LossGuard(GuardSection(spike="skip")), curve(seed, steps, *shapes[seed % len(shapes)])) == []


def real_curve(config):
    engine, loader = engine_and_rows(config)
    warmup = config.optim.schedule.warmup
    lr = [config.optim.lr * min(1, (step + 1) / warmup) for step in range(config.train.steps)]
    return [(r.loss, r.grad_norm) for r in (engine.step(loader.batch(n), rate) for n, rate in enumerate(lr))]


@pytest.mark.parametrize(("lr", "warmup", "batch"), [(1e-2, 50, 4), pytest.param(3e-3, 2, 8, marks=pytest.mark.slow)])
def test_no_alarm_over_a_real_run(ranks, dataset, tmp_path, lr, warmup, batch):
    config = run_config(
        dataset, tmp_path, train={"steps": 300, "global_batch": batch}, optim={"lr": lr, "schedule": {"warmup": warmup}}
    )
    (figures,) = ranks.run(real_curve, config, world=1)
    assert figures[-1][0] < 0.7 * figures[0][0], "it has learned"
    assert alarms(LossGuard(GuardSection(spike="skip")), figures) == []


@pytest.mark.parametrize("noise", [0.003, 0.02, 0.1])
def test_spikes_are_found_and_told(noise):
    figures = list(curve(7, 2000, noise, 6))
    for step, factor in [(500, 1.6), (501, 1.6), (900, 2.0), (1500, 5.0)]:
        loss, norm = figures[step]
        figures[step] = (loss * factor, norm)
    loss, norm = figures[1700]
    figures[1700] = (loss, norm * 60)
    found = alarms(LossGuard(GuardSection(spike="skip")), figures)
    assert [(step, kind) for step, kind, _ in found] == [(s, "spike") for s in (500, 501, 900, 1500, 1700)]
    assert all("the loss is" in why and "deviations above the median of" in why for _, _, why in found[:-1])
    assert found[-1][2].startswith("the gradient norm is")


@pytest.mark.parametrize(("loss", "norm", "why"), [
    (NAN, 1.0, "the loss is nan"), (INF, 1.0, "the loss is inf"), (-INF, 1.0, "the loss is -inf"),
    (2.0, NAN, "the gradient norm is nan"), (2.0, INF, "the gradient norm is inf"), (NAN, NAN, "the loss is nan"),
])  # fmt: skip
def test_what_is_no_number_is_never_normal(loss, norm, why):
    guard = LossGuard(GuardSection())
    for known in range(200):
        verdict = guard.judge(loss, norm)
        assert (verdict.kind, verdict.why) == ("non-finite", why)
        guard.accept(2.0 + known % 3, 1.0)


def test_spikes_that_are_only_recorded_are_applied():
    guard = LossGuard(GuardSection(spike="record"))
    for _ in range(200):
        guard.accept(2.0, 1.0)
    assert guard.limits() == StepLimits()
    assert guard.judge(9.0, 1.0).kind == "spike"


def test_nothing_is_a_spike_before_enough_is_known():
    for window, fewest in [(128, 32), (32, 16), (8, 8)]:
        guard = LossGuard(GuardSection(spike="skip", window=window))
        for _ in range(fewest):
            assert guard.limits() == StepLimits()
            assert guard.judge(1e9, 1e9).kind == ""
            guard.accept(2.0, 1.0)
        assert guard.judge(1e9, 1.0).kind == guard.judge(2.0, 1e9).kind == "spike"
        assert guard.judge(0.01, 1e-9).kind == "", "a fall is no spike"
        assert guard.judge(2.1, 1.5).kind == "", "a flat curve is not held to be exact"


def test_a_new_level_becomes_normal_where_it_is_only_recorded():
    guard = LossGuard(GuardSection())
    found = []
    for step in range(1000):
        loss = 2.0 if step < 500 else 4.0
        if guard.judge(loss, 1.0).kind:
            found.append(step)
        guard.accept(loss, 1.0)
    assert found[0] == 500
    assert found[-1] < 500 + 128


def test_gradients_of_zero_length_are_figures_like_others():
    guard = LossGuard(GuardSection(spike="skip"))
    for _ in range(100):
        guard.accept(0.0, 0.0)
    assert guard.judge(0.0, 0.0).kind == ""


FIGURES = st.tuples(
    st.floats(-10, 1e6) | st.sampled_from([NAN, INF, 2.0, 1e300]), st.floats(0, 1e6) | st.sampled_from([NAN, INF, 0.0])
)


@given(st.lists(FIGURES, max_size=120), st.integers(0, 120), st.sampled_from([1, 8, 20, 64]), st.floats(0.1, 30))
@settings(deadline=None, max_examples=60)
def test_restored_midway_it_decides_the_same(figures, kill, window, threshold):
    section = GuardSection(spike="skip", window=window, threshold=threshold)
    whole = LossGuard(section)
    decisions = alarms(whole, figures)
    first = LossGuard(section)
    before = alarms(first, figures[:kill])
    second = LossGuard(section, json.loads(json.dumps(first.state(), allow_nan=False)))
    after = [(step + len(figures[:kill]), kind, why) for step, kind, why in alarms(second, figures[kill:])]
    assert before + after == decisions
    assert second.state() == whole.state()
    assert second.limits() == whole.limits()


@pytest.mark.parametrize("state", [
    {}, [], 7, {"losses": [1.0]}, {"losses": [1.0], "norms": []}, {"losses": [NAN], "norms": [1.0]},
    {"losses": ["1"], "norms": [1.0]}, {"losses": [True], "norms": [True]}, {"losses": [10**400], "norms": [1.0]},
    {"losses": [[]], "norms": [1.0]}, {"losses": {}, "norms": {}},
])  # fmt: skip
def test_a_damaged_state_is_refused(state):
    with pytest.raises(CheckpointError, match="loss guard"):
        LossGuard(GuardSection(), state)


def test_a_state_of_a_longer_window_gives_its_end():
    long = LossGuard(GuardSection(window=64))
    for number in range(64):
        long.accept(number, 1.0)
    assert LossGuard(GuardSection(window=16), long.state()).state()["losses"] == list(range(48, 64))


def test_going_back_is_kept_in_one_piece(tmp_path):
    path = tmp_path / "guard.json"
    assert read_rewinds(path) == []
    first, second = Rewind(130, 20, (160, 1040)), Rewind(90, 10, (80, 720))
    add_rewind(path, first)
    add_rewind(path, second)
    assert read_rewinds(path) == [first, second]
    assert [p.name for p in tmp_path.iterdir()] == ["guard.json"]


@pytest.mark.parametrize("content", [
    "", "null", "[]", "{}", '{"rewinds": {}}', '{"rewinds": [1]}', '{"rewinds": [], "more": 1}', '{"rewinds": [{}]}',
    '{"rewinds": [{"at": 3, "to": 1, "span": [1]}]}', '{"rewinds": [{"at": 3, "to": 1, "span": [5, 5]}]}',
    '{"rewinds": [{"at": 3, "to": 3, "span": [1, 5]}]}', '{"rewinds": [{"at": 3.5, "to": 1, "span": [1, 5]}]}',
    '{"rewinds": [{"at": true, "to": false, "span": [1, 5]}]}', '{"rewinds": [{"at": 3, "to": -1, "span": [1, 5]}]}',
    '{"rewinds": [{"at": 3, "to": NaN, "span": [1, 5]}]}', '{"rewinds": [{"at": 3, "to": 1, "span": "ab"}]}',
    "[" * 100_000, '{"rewinds": [{"at": ' + "9" * 100_000 + ', "to": 1, "span": [1, 5]}]}', " " * (1 << 20) + " {}",
    "\ud83d",
])  # fmt: skip
def test_a_damaged_record_of_going_back_is_refused_by_name(tmp_path, content):
    path = tmp_path / "guard.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(RunError, match=r"guard\.json: damaged"):
        read_rewinds(path)


def test_a_checkpoint_of_the_history_that_was_left_is_known():
    once = [Rewind(100, 50, (400, 800))]
    assert not abandoned(once, 50, []), "the one gone back to"
    assert not abandoned(once, 20, [])
    assert abandoned(once, 60, [])
    assert abandoned(once, 60, [[400, 799]])
    assert not abandoned(once, 60, [[400, 800]])
    assert not abandoned(once, 60, [[0, 10], [300, 900]]), "joined with others"
    further = [*once, Rewind(80, 40, (320, 1040))]
    assert abandoned(further, 60, [[400, 800]]), "of the second history"
    assert abandoned(further, 45, [])
    assert not abandoned(further, 45, [[320, 1040]])
    assert not abandoned([], 60, [])


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5)), max_size=5))
@settings(deadline=None)
def test_however_often_it_goes_back_the_data_go_on_from_what_is_left(moves):
    """Checkpoints of every step: those of a history that was left are told from the others for good, the others accept what
    is left out since, and no batch that spiked comes again."""
    size, step, rewinds = 8, 0, []
    live, left = {0: ((), 0)}, []

    def position(sample):
        return make_skips([r.span for r in rewinds]).positions(np.array([sample])).item()

    for steps, back, more in moves:
        for _ in range(steps):
            step += 1
            live[step] = (make_skips([r.span for r in rewinds]).spans, position(step * size))
        to, spiked = max(0, step - back), position((step - 1) * size)
        rewinds.append(Rewind(step, to, (position(to * size), position((step + more) * size - 1) + 1)))
        left += [(later, live.pop(later)[0]) for later in range(to + 1, step + 1)]
        new = make_skips([r.span for r in rewinds]).spans
        assert any(low <= spiked < high for low, high in new)
        for kept, (old, consumed) in live.items():
            assert not abandoned(rewinds, kept, old)
            check_skips(old, new, consumed)
        assert all(abandoned(rewinds, kept, old) for kept, old in left)
        assert position(to * size) == max(high for _, high in new), "one past all that is left out"
        step = to
