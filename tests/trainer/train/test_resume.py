"""Real runs of the real command: stopped by SIGTERM, killed with -9, resumed; the same weights to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from left import left_by
from mikoshi.trainer.checkpoint.restore import newest_valid
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import GPT2_MODEL, run_config

STEPS = 60
MARK = "MIKOSHI_TEST_MARK"  # in the environment of a start and of all that comes of it


@pytest.fixture(scope="module")
def config_file(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config = run_config(
        dataset, folder / "runs", model={**GPT2_MODEL, "width": 64},
        train={"steps": STEPS, "global_batch": 16, "micro_batch": 4}, checkpoint={"every": 20, "keep": 9},
        # At a rate where training does not amplify a rounding error: at 3e-3 one unit in the last place of one
        # weight moves the losses of this run by 1e-5, here by 1e-7.
        optim={"lr": 1e-3}, eval={"every": 25, "batches": 2}, log={"tensorboard": False}, run={"name": "unused"},
    )  # fmt: skip
    (folder / "run.toml").write_text(to_toml(config))
    return folder / "run.toml"


def start(config_file, name, ranks=2):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mikoshi", "train", str(config_file), f"run.name={name}", "--ranks", str(ranks)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=config_file.parent,
        env={**os.environ, MARK: str(config_file)},
    )  # fmt: skip


def finish(process, code=0):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code, out
    return out


def run_path(config_file, name):
    return config_file.parent / "runs" / name


def steps_recorded(config_file, name):
    return [r for r in read_jsonl(run_path(config_file, name) / "metrics.jsonl") if "loss" in r]


def wait_for_step(process, config_file, name, step):
    deadline = time.monotonic() + 90
    while not any(r["step"] >= step for r in steps_recorded(config_file, name)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def weights(config_file, name):
    """SHA-256 of every file of the last checkpoint: equal digests mean equal weights and moments, to the bit."""
    _, manifest, _ = newest_valid(run_path(config_file, name) / "checkpoints")
    assert manifest.step == STEPS
    return {file: stamp["sha256"] for file, stamp in manifest.files.items()}


def rank_processes(config_file):
    return [p for p in left_by(MARK, str(config_file)) if p.name().startswith("mikoshi-rank")]


@pytest.fixture(scope="module")
def quiet(config_file):
    finish(start(config_file, "quiet"))
    return weights(config_file, "quiet"), steps_recorded(config_file, "quiet")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGUSR2))]
)
def test_stopped_by_a_signal_and_resumed_is_the_same_to_the_bit(config_file, quiet, number):
    name = f"stopped-{number.name}"
    process = start(config_file, name)
    wait_for_step(process, config_file, name, 30)
    asked = max(r["step"] for r in steps_recorded(config_file, name))
    process.send_signal(number)
    out = finish(process, code=75)
    assert "stopped and saved after step" in out
    stopped_at = steps_recorded(config_file, name)[-1]["step"]
    assert asked <= stopped_at < STEPS
    out = finish(start(config_file, name))
    assert f"resumed after step {stopped_at}" in out, "not one step is lost"
    assert weights(config_file, name) == quiet[0]
    assert_same_metrics(steps_recorded(config_file, name), quiet[1], exact=True)


def assert_same_metrics(found, expected, exact):
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens"):
            assert ours[key] == (theirs[key] if exact else pytest.approx(theirs[key], rel=1e-5)), (ours["step"], key)


def assert_nobody_left(config_file, seconds=5):
    deadline = time.monotonic() + seconds
    while left_by(MARK, str(config_file)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


@pytest.mark.slow
def test_the_launcher_killed_at_a_random_step_and_resumed_is_the_same_to_the_bit(config_file, quiet):
    step = random.randrange(22, 50)
    process = start(config_file, "killed")
    wait_for_step(process, config_file, "killed", step)
    assert len(rank_processes(config_file)) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert_nobody_left(config_file)
    out = finish(start(config_file, "killed"))
    assert "resumed after step 20" in out or "resumed after step 40" in out
    assert weights(config_file, "killed") == quiet[0], f"killed at step {step}"
    assert_same_metrics(steps_recorded(config_file, "killed"), quiet[1], exact=True)


@pytest.mark.slow
def test_a_rank_killed_at_a_random_step_is_started_again_and_the_run_is_the_same_to_the_bit(config_file, quiet):
    step = random.randrange(22, 50)
    process = start(config_file, "rank")
    wait_for_step(process, config_file, "rank", step)
    random.choice(rank_processes(config_file)).kill()
    out = finish(process)
    assert "was killed (SIGKILL)" in out
    assert "resumed after step 20" in out or "resumed after step 40" in out
    assert weights(config_file, "rank") == quiet[0], f"killed at step {step}"
    assert_same_metrics(steps_recorded(config_file, "rank"), quiet[1], exact=True)
    assert_nobody_left(config_file)


@pytest.mark.slow
def test_resumed_on_another_number_of_ranks_goes_on_with_the_same_losses(config_file, quiet):
    process = start(config_file, "changed", ranks=1)
    wait_for_step(process, config_file, "changed", 20)
    process.send_signal(signal.SIGINT)
    finish(process, code=75)
    finish(start(config_file, "changed", ranks=4))
    assert_same_metrics(steps_recorded(config_file, "changed"), quiet[1], exact=False)
    events = [json.loads(line) for line in (run_path(config_file, "changed") / "events.jsonl").read_text().splitlines()]
    assert [e["ranks"] for e in events if e["event"] == "start"] == [1, 4]


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(config_file, quiet):
    assert f"finished {STEPS} steps" in finish(start(config_file, "quiet"))
    assert weights(config_file, "quiet") == quiet[0]


@pytest.mark.slow
def test_torchrun_places_are_taken_as_given(config_file, quiet):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mikoshi",
         "train", str(config_file), "run.name=torchrun"],
        capture_output=True, text=True, timeout=120, cwd=config_file.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(config_file, "torchrun") == quiet[0]
