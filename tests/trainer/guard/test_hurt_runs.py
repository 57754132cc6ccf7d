"""Runs on a disk slower than their saves come, and with memory that fails: no false alarm, nothing lost, the same weights."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import hurt
from datarun import events, folder_of, noisy_sources, records, run, wait_for_step, write_run
from mikoshi.trainer.checkpoint.restore import newest_valid
from mikoshi.trainer.record.run_folder import read_jsonl
from stores import until

# Starts the ranks as `mikoshi train` does, with another function for their work.
START = """
import sys
from pathlib import Path
import hurt
from mikoshi.launch.controller.supervisor import Job, supervise
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.record.run_folder import RunFolder
run = load_config(Path(sys.argv[1]), sys.argv[5:])
RunFolder(run.run.path).make()
how = (getattr(hurt, sys.argv[3]), (run, float(sys.argv[4])))
sys.exit(supervise(Job(int(sys.argv[2]), *how, RunFolder(run.run.path), run.recovery)))
"""


def begin(config_file, how, much, *overrides, ranks=1):
    support = str(Path(hurt.__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", START, str(config_file), str(ranks), how, str(much), *overrides], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=config_file.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": support},
    )  # fmt: skip


def ended(process, code=0):
    out, _ = process.communicate(timeout=180)
    assert process.returncode == code, out
    return out


def weights(config_file, name):
    _, manifest, _ = newest_valid(folder_of(config_file, name) / "checkpoints")
    return manifest.step, {file: stamp["sha256"] for file, stamp in manifest.files.items()}


@pytest.fixture
def config_file(dataset, tmp_path):
    return write_run(
        tmp_path, dataset, steps=12, checkpoint={"every": 3, "keep": 2}, recovery={"silence": 2.5, "backoff": 0.1},
    )  # fmt: skip


@pytest.mark.slow
def test_a_save_slower_than_the_steps_between_saves_is_waited_for_and_no_hang(config_file):
    out = ended(begin(config_file, "on_a_slow_disk", 6.0, "run.name=slow", ranks=2))
    assert not events(config_file, "slow", "fault"), out
    assert [e["step"] for e in events(config_file, "slow", "save")] == [3, 6, 9, 12]


@pytest.mark.slow
def test_a_stop_while_a_save_is_under_way_is_saved_too(config_file):
    process = begin(config_file, "on_a_slow_disk", 6.0, "run.name=stopped", "train.steps=4000", "checkpoint.every=300",
                    "guard.compare=0", ranks=2)  # fmt: skip
    wait_for_step(process, config_file, "stopped", 302)  # of which the save takes seconds
    asked = max(r["step"] for r in records(config_file, "stopped"))
    process.send_signal(signal.SIGTERM)
    out = ended(process, code=75)
    assert not events(config_file, "stopped", "fault"), out
    (stop,) = events(config_file, "stopped", "stop")
    assert [e["step"] for e in events(config_file, "stopped", "save")] == [300, stop["step"]]
    assert stop["step"] >= asked


@pytest.mark.slow
@pytest.mark.parametrize("steps", [12, 6])
def test_a_stop_within_a_long_evaluation_is_saved_and_what_was_not_evaluated_is_at_the_next_start(config_file, steps):
    asked = (f"train.steps={steps}", "eval.every=6", "eval.batches=2", "recovery.grace=20")
    ended(begin(config_file, "on_a_slow_disk", 0.0, "run.name=quiet", *asked))
    process = begin(config_file, "evaluates_for_long", 0.5, "run.name=long", *asked, ranks=2)
    wait_for_step(process, config_file, "long", 6)
    if steps > 6:  # written in the background, it is committed while the evaluation goes on
        until(lambda: [e["step"] for e in events(config_file, "long", "save")] == [3, 6])
    process.send_signal(signal.SIGTERM)
    out = ended(process, code=75)
    assert f"stopped and saved after step 6 of {steps}" in out
    assert [e["step"] for e in events(config_file, "long", "save")] == [3, 6]
    assert [e["step"] for e in events(config_file, "long", "stop")] == [6]
    assert not events(config_file, "long", "eval"), "a part of an evaluation is none"
    assert not events(config_file, "long", "fault"), out
    ended(begin(config_file, "on_a_slow_disk", 0.0, "run.name=long", *asked))
    found, wanted = (
        {e["step"]: e["loss"] for e in events(config_file, name, "eval")} for name in ("long", "quiet")
    )  # fmt: skip
    assert found.keys() == wanted.keys() == {6, steps}
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_a_run_that_says_nothing_of_saves_loses_little_to_a_fault(config_file):
    config_file.write_text(config_file.read_text().replace("every = 3\n", ""))
    asked = ("train.steps=120", "recovery.mtbf=0.0001")
    ended(begin(config_file, "saved_soon", 1e9, "run.name=quiet", *asked, ranks=2))
    assert [e["step"] for e in events(config_file, "quiet", "save")] == [120], "a short run is saved at its end alone"
    process = begin(config_file, "saved_soon", 0.2, "run.name=killed", *asked, ranks=2)
    wait_for_step(process, config_file, "killed", 80)
    saved = [e["step"] for e in events(config_file, "killed", "save")]
    assert saved
    (victim, *_) = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name().startswith("mikoshi-rank")]
    victim.kill()
    out = ended(process)
    assert "saves by time, the first one after" in out
    (back,) = events(config_file, "killed", "resume")
    assert back["step"] >= saved[-1]
    assert weights(config_file, "killed") == weights(config_file, "quiet")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A run of real text, of which the batch of step 36 is noise."""
    folder = tmp_path_factory.mktemp("noisy")
    sources = noisy_sources(folder / "text", 36, 37)
    config_file = write_run(
        folder, folder / "prepared", steps=45, data={"mixture": sources}, checkpoint={"every": 5, "keep": 1},
        guard={"window": 32, "rewind": 4, "threshold": 8.0, "spike": "rewind"}, recovery={"silence": 5.0},
    )  # fmt: skip
    run(config_file, "prepare")
    return config_file


@pytest.mark.slow
def test_a_run_goes_back_to_the_same_step_however_fast_its_disk_is_and_however_few_it_keeps(noisy):
    ended(begin(noisy, "on_a_slow_disk", 0.0, "run.name=fast"))
    ended(begin(noisy, "on_a_slow_disk", 1.0, "run.name=slow"))
    for name in ("fast", "slow"):
        assert [(e["step"], e["to"]) for e in events(noisy, name, "rewind")] == [(36, 30)]
        assert not events(noisy, name, "fault")
        assert [r["step"] for r in records(noisy, name)] == list(range(1, 46))
    assert weights(noisy, "fast") == weights(noisy, "slow")
    assert weights(noisy, "fast")[0] == 45


@pytest.mark.slow
def test_memory_that_fails_once_costs_the_steps_since_and_no_checkpoint_of_it_is_kept(config_file):
    asked = ("train.steps=40", "guard.give_up=8")
    quiet = begin(config_file, "on_a_slow_disk", 0.0, "run.name=quiet", *asked)
    ended(quiet)
    out = ended(begin(config_file, "with_bad_memory", 11, "run.name=bad", *asked))
    assert "did not change for 8 steps in a row" in out
    (resumed,) = events(config_file, "bad", "resume")
    assert resumed["step"] == 9, "nothing was saved after the weight was lost"
    assert weights(config_file, "bad") == weights(config_file, "quiet")
    assert all(r["applied"] for r in read_jsonl(folder_of(config_file, "bad") / "metrics.jsonl") if "loss" in r)
