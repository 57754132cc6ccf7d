"""`accelerate launch` starts the ranks of a run as any launcher does, or is refused where it starts fewer than asked."""

import os
import sys

import pytest

from mikoshi.trainer.checkpoint.verify import read_manifest, steps_in
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.interop.accelerate.start import lone_process_reason
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import run_config
from whole import run_whole

pytest.importorskip("accelerate")

FREE_PORT = ["--main_process_port", "0"]


def run_here(folder, arguments):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    return run_whole(
        [sys.executable, "-P", "-m", *arguments], cwd=folder,
        env=plain | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")},
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_the_two_ranks_of_a_run(dataset, tmp_path):
    config = run_config(dataset, tmp_path / "runs", parallel={"zero": 2})
    (tmp_path / "run.toml").write_text(to_toml(config))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *FREE_PORT, "-m", "mikoshi"]
    train = ["train", str(tmp_path / "run.toml")]
    done = run_here(tmp_path, [*launch, *train, "run.name=theirs"])
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_here(tmp_path, ["mikoshi", *train, "run.name=ours", "--ranks", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for name in ("theirs", "ours"):
        metrics = read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")
        files = read_manifest(steps_in(tmp_path / "runs" / name / "checkpoints")[0]).files
        found[name] = [(m["step"], m["loss"], m["grad_norm"]) for m in metrics if "loss" in m], files
    assert found["theirs"] == found["ours"], "losses and weights, to the bit"
    assert len(found["ours"][0]) == 5
    assert len(found["ours"][1]) == 2, "a file of each rank"


@pytest.mark.slow
def test_one_process_where_two_were_asked_for_is_refused(dataset, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(run_config(dataset, tmp_path / "runs")))
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mikoshi"]
    done = run_here(tmp_path, [*launch, "train", str(tmp_path / "run.toml")])
    assert done.returncode != 0
    assert "error: accelerate launch: several processes were asked for, and this is the only one" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_one_process_where_one_was_asked_for_trains(dataset, tmp_path):
    config = run_config(dataset, tmp_path / "runs", train={"steps": 2}, engine={"device": "cpu"})
    (tmp_path / "run.toml").write_text(to_toml(config))
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "mikoshi"]
    done = run_here(tmp_path, [*launch, "train", str(tmp_path / "run.toml")])
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_environment_says():
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    several = launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert lone_process_reason({}) is None
    assert lone_process_reason(launched) is None
    assert lone_process_reason({"MASTER_ADDR": "n1"}) is None, "of another launcher"
    assert lone_process_reason(several | {"RANK": "0", "WORLD_SIZE": "2"}) is None
    assert "unset MASTER_ADDR" in (lone_process_reason(several) or "")
