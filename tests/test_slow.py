"""What takes minutes: compiled blocks, and many kills of one run."""

import random
import signal
import subprocess
import sys
import time

import pytest

from layouts import BASE, MODELS, degrees
from mikoshi.trainer.checkpoint.restore import newest_valid
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import GPT2_MODEL, TINY_MODEL, figures, run_config

pytestmark = pytest.mark.slow


def assert_same_figures(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("model", [TINY_MODEL, GPT2_MODEL], ids=["llama", "gpt2"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_compute_the_same(ranks, dataset, tmp_path, model, recompute):
    plain = run_config(dataset, tmp_path, model=model, parallel={"zero": 0})
    compiled = run_config(
        dataset, tmp_path, model=model, parallel={"zero": 3}, engine={"compile": "on", "recompute": recompute}
    )  # fmt: skip
    (expected,) = ranks.run(figures, plain, 3, world=1)
    for found in ranks.run(figures, compiled, 3, world=2, timeout=400):
        assert_same_figures(found, expected)


@pytest.mark.parametrize("layout", ["tp=2", "cp=2", "pp=2", "ep=2"])
def test_compiled_blocks_under_any_dimension(ranks, dataset, tmp_path, layout):
    model = BASE | MODELS["mixtral" if layout == "ep=2" else "llama"]
    plain = run_config(dataset, tmp_path, model=model)
    compiled = run_config(dataset, tmp_path, model=model, engine={"compile": "on"}, parallel=degrees(layout))
    (expected,) = ranks.run(figures, plain, 3, world=1)
    for found in ranks.run(figures, compiled, 3, world=2, timeout=400):
        assert_same_figures(found, expected)


@pytest.mark.soak
def test_a_run_killed_again_and_again_ends_like_a_quiet_one(dataset, tmp_path):
    config = run_config(
        dataset, tmp_path / "runs", model={**GPT2_MODEL, "width": 64}, train={"steps": 60, "global_batch": 16},
        checkpoint={"every": 5}, log={"tensorboard": False},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(config))

    def start(name):
        command = [
            sys.executable,
            "-P",
            "-m",
            "mikoshi",
            "train",
            str(tmp_path / "run.toml"),
            f"run.name={name}",
        ]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)

    def digests(name):
        _, manifest, _ = newest_valid(tmp_path / "runs" / name / "checkpoints")
        return manifest.step, {file: stamp["sha256"] for file, stamp in manifest.files.items()}

    def steps_recorded(name):
        return max((r["step"] for r in read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")), default=0)

    assert start("quiet").wait(120) == 0
    rng, kills = random.Random(1), 0
    while True:
        before = steps_recorded("hurt")
        process = start("hurt")
        # By what it has done and not by the clock: a slow machine gets as far between two kills as a fast one.
        steps, pause = rng.choice([0, 3, 6, 9, 12]), rng.uniform(0, 0.3)
        while process.poll() is None and steps and steps_recorded("hurt") < before + steps:
            time.sleep(0.01)
        time.sleep(pause)
        if process.poll() is not None:
            break
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.wait(60)
        kills += 1
        assert kills < 100
    assert process.returncode == 0
    assert kills >= 3
    assert digests("hurt") == digests("quiet")
