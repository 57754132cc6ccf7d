"""Real runs into a batch of noise: recorded, left out, or gone back before, the same however often the run is killed."""

import shutil

import pytest

from datarun import consumed, events, inside, noisy_sources, records, run, write_run
from mikoshi.trainer.checkpoint.restore import newest_valid
from mikoshi.trainer.checkpoint.verify import steps_in

STEPS, NOISY = 48, 36


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A run of real text, of which the batches of two steps are noise."""
    folder = tmp_path_factory.mktemp("noisy")
    sources = noisy_sources(folder / "text", NOISY, NOISY + 2)
    config = write_run(
        folder, folder / "prepared", steps=STEPS, data={"mixture": sources}, recovery={"restarts": 0},
        guard={"window": 32, "rewind": 4, "threshold": 8.0}, checkpoint={"every": 5, "keep": 99},
    )  # fmt: skip
    inside(config, "prepare")
    return config


def weights(config, name):
    _, manifest, _ = newest_valid(config.parent / "runs" / name / "checkpoints")
    assert manifest.step == STEPS
    return {file: stamp["sha256"] for file, stamp in manifest.files.items()}


def test_recorded_with_its_batch(noisy):
    inside(noisy, "train", "run.name=recorded")
    found = events(noisy, "recorded", "spike")
    assert found[0]["step"] == NOISY
    assert found[0]["positions"] == [(NOISY - 1) * 8, NOISY * 8]
    assert "deviations above the median" in found[0]["why"]
    assert all(r["applied"] for r in records(noisy, "recorded"))
    assert not events(noisy, "recorded", "skip")


def test_left_out(noisy):
    out = inside(noisy, "train", "run.name=left", "guard.spike=skip")
    left = [e["step"] for e in events(noisy, "left", "skip")]
    assert left == [NOISY, NOISY + 1]
    assert [e["cured"] for e in events(noisy, "left", "retry")] == [False, False]
    assert [r["step"] for r in records(noisy, "left") if not r["applied"]] == left
    assert "no rank changed its weights" in out


def test_gone_back_before_it_and_the_batches_skipped(noisy):
    out = inside(noisy, "train", "run.name=back", "guard.spike=rewind", "guard.skip=1")
    (back,) = events(noisy, "back", "rewind")
    assert (back["step"], back["to"]) == (NOISY, 30)
    assert back["skipped"] == [30 * 8, (NOISY + 1) * 8]
    assert "going back" in out
    (resumed,) = events(noisy, "back", "resume")
    assert resumed["repeated_steps"] == NOISY - 30
    told = records(noisy, "back")
    assert [r["step"] for r in told] == list(range(1, STEPS + 1))
    assert all(r["applied"] for r in told)
    assert max(r["loss"] for r in told[30:]) < told[20]["loss"] * 1.2, "the noise is not among its batches"
    assert consumed(noisy, "back").keys() == {5, 10, 15, 20, 25, 30, 35, 40, 45, STEPS}
    inside(noisy, "data inspect", "run.name=back")  # and what it consumed can be looked at

    # The same however it is killed: right after the decision, with the checkpoints of the history that was left still there.
    shutil.copytree(noisy.parent / "runs" / "back", noisy.parent / "runs" / "again")
    for path in steps_in(noisy.parent / "runs" / "again" / "checkpoints"):
        if int(path.name[5:]) > 30:
            shutil.rmtree(path)
    recorded = noisy.parent / "runs" / "recorded"
    if not recorded.exists():
        inside(noisy, "train", "run.name=recorded")
    shutil.copytree(
        recorded / "checkpoints" / "step-00000035", noisy.parent / "runs" / "again" / "checkpoints" / "step-00000035"
    )
    inside(noisy, "train", "run.name=again", "guard.spike=rewind", "guard.skip=1")
    assert weights(noisy, "again") == weights(noisy, "back")


@pytest.mark.slow
def test_gone_back_on_other_ranks_takes_the_same_way(noisy):
    run(noisy, "train", "run.name=two", "guard.spike=rewind", "guard.skip=1", ranks=2)
    assert [(e["step"], e["to"], e["skipped"]) for e in events(noisy, "two", "rewind")] == [(NOISY, 30, [240, 296])]


@pytest.mark.slow
def test_too_often_gone_back_ends_the_run_with_its_reason(noisy):
    out = inside(noisy, "train", "run.name=often", "guard.spike=rewind", "guard.rewinds=1", code=2)
    assert "guard.rewinds" in out
    assert len(events(noisy, "often", "rewind")) == 1
