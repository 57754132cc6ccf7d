"""DeepSpeed in whole runs of the real launcher: quiet, without a compiler, stopped and gone on with by another engine."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mikoshi.trainer.config.run import to_toml
from runs import engine_and_rows, run_config

pytest.importorskip("deepspeed")


def written(config, folder):
    path = folder / "run.toml"
    path.write_text(to_toml(config))
    return path


def train(config, *overrides, env=None, ranks=2):
    command = [sys.executable, "-P", "-m", "mikoshi", "train", str(config), "--ranks", str(ranks), *overrides]
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True, timeout=240, check=False)


def losses(config):
    lines = (config.run.path / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.slow
def test_begun_with_one_engine_and_ended_with_the_other(dataset, tmp_path):
    """With a DeepSpeed checkpoint in the run folder and among its checkpoints that would run code if it were read, and no
    compiler to be found."""
    sections = {"train": {"steps": 6, "global_batch": 8, "micro_batch": 2}, "checkpoint": {"every": 2, "keep": 9}}
    mixed = run_config(dataset, tmp_path, run={"name": "mixed"}, engine={"kind": "deepspeed", "device": "cpu"}, **sections)
    poison = pickle.dumps(Canary(tmp_path / "executed"))
    for folder in (mixed.run.path, mixed.run.path / "checkpoints"):
        for name in ("global_step2/mp_rank_00_model_states.pt", "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(poison)
        (folder / "latest").write_text("global_step2")
    bare = {"PATH": str(Path(sys.executable).parent), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    config = written(mixed, tmp_path)
    for overrides in (["train.steps=2"], ["train.steps=4", "engine.kind=native"], ["train.steps=6", "parallel.zero=3"]):
        schedule = ["optim.schedule.kind=constant"]
        done = train(config, *overrides, *schedule, env=bare)
        assert done.returncode == 0, done.stderr
        assert "DeepSpeed" not in done.stdout
        assert "DeepSpeed" not in done.stderr
        assert "deprecated" not in done.stderr
    reference = run_config(dataset, tmp_path, run={"name": "reference"}, engine={"device": "cpu"}, **sections)
    done = train(written(reference, tmp_path), "optim.schedule.kind=constant", ranks=1)
    assert done.returncode == 0, done.stderr
    found, expected = losses(mixed), losses(reference)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert found == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "built").glob("**/*")), "nothing was built"


def test_what_it_cannot_do_ends_before_a_rank_starts(dataset, tmp_path):
    config = run_config(dataset, tmp_path, engine={"kind": "deepspeed", "device": "cpu"}, parallel={"pp": 2})
    done = train(written(config, tmp_path))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 'engine.kind = "deepspeed": parallel.pp > 1' in line


def built(config):
    from deepspeed import ops

    engine, _ = engine_and_rows(config)
    streams = [handler.stream.name for handler in logging.getLogger("DeepSpeed").handlers]
    linear = torch.nn.functional.linear.__module__
    return engine.model.training, ops.__compatible_ops__["deepspeed_shm_comm"], streams, linear


def test_it_is_brought_in_quietly_and_builds_nothing(ranks, dataset, tmp_path):
    """And leaves torch as it was: DeepSpeed would replace its linear product for the whole process."""
    config = run_config(dataset, tmp_path, engine={"kind": "deepspeed"}, parallel={"zero": 3})
    for training, shm, streams, linear in ranks.run(built, config, world=2):
        assert training
        assert shm is False
        assert streams == ["<stderr>"]
        assert linear == torch.nn.functional.linear.__module__ == "torch._C._nn"


def with_settings(config):
    engine, loader = engine_and_rows(config)
    notice = engine.deepspeed.config
    return notice["steps_per_print"], notice["zero_optimization"]["reduce_bucket_size"], engine.step(loader.batch(0), 1e-3).loss


def test_a_users_settings_arrive(ranks, dataset, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"steps_per_print": 7, "zero_optimization": {"stage": 2, "reduce_bucket_size": 500}}))
    config = run_config(dataset, tmp_path, engine={"kind": "deepspeed", "deepspeed": {"config": path}})
    plain = run_config(dataset, tmp_path)
    ((expected, *_), *_) = ranks.run(first_loss, plain, world=1)
    for every, bucket, loss in ranks.run(with_settings, config, world=2):
        assert (every, bucket) == (7, 500)
        assert loss == pytest.approx(expected, rel=1e-5)


def first_loss(config):
    engine, loader = engine_and_rows(config)
    return (engine.step(loader.batch(0), 1e-3).loss,)


def asks_too_much(config):
    from mikoshi.trainer.errors import ConfigError

    try:
        engine_and_rows(config)
    except ConfigError as error:
        return str(error)
    return None


def test_a_value_that_deepspeed_does_not_take_is_named(ranks, dataset, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"tensorboard": {"enabled": "maybe"}}))
    config = run_config(dataset, tmp_path, engine={"kind": "deepspeed", "deepspeed": {"config": path}})
    for message in ranks.run(asks_too_much, config, world=2):
        assert message.startswith(f'engine.deepspeed.config = {str(path)!r}: tensorboard.enabled = "maybe": DeepSpeed does not')
