"""A run that goes on with other settings says each of them, and where its learning rate goes; checkpoints of before go on."""

import json

import pytest
import torch

from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.config.run import RunConfig, differences, parse_config, to_toml
from mikoshi.trainer.engines.optim import Optimizers
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.train.changed_settings import describe_changes, reset_moments
from runs import run_config

MOE = {"experts": 2, "top_k": 1}


def told(old, new, step):
    return describe_changes(old, new, differences(old, new), step)


def config(dataset=".", folder=".", **sections):
    schedule = {"warmup": 2, "final": 0.1, **sections.pop("schedule", {})}
    optim = {"lr": 1e-3, "schedule": schedule, **sections.pop("optim", {})}
    return run_config(dataset, folder, optim=optim, **sections)


def test_a_longer_run_says_what_becomes_of_the_learning_rate():
    old, new = config(train={"steps": 10}), config(train={"steps": 40})
    change, rate = told(old, new, 10)
    assert change == "changed since step 10: train.steps: 10 -> 40"
    assert rate.startswith("learning rate: at step 11 it was 0.0001, it is now 0.000")
    assert rate.endswith("(optim.schedule.steps=10 keeps the schedule)")
    assert told(old, config(train={"steps": 40}, schedule={"steps": 10}), 10)[-1] == "learning rate: unchanged"


def test_a_rate_that_moves_later_is_said_with_its_step():
    wsd = {"kind": "wsd", "decay": 4}
    *_, rate = told(config(train={"steps": 10}, schedule=wsd), config(train={"steps": 20}, schedule=wsd), 3)
    assert rate.startswith("learning rate: unchanged up to step 6; at step 7 it was 0.000775, it is now 0.001")


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("optim", {"betas": [0.8, 0.9]}, "optim.betas: [0.9, 0.95] -> [0.8, 0.9]"),
        ("optim", {"weight_decay": 0.2}, "optim.weight_decay: 0.1 -> 0.2"),
        ("optim", {"clip": 0.5}, "optim.clip: 1.0 -> 0.5"),
        ("engine", {"precision": "bf16"}, "-> bf16"),
        ("train", {"micro_batch": 1}, "train.micro_batch: unset -> 1"),
        ("guard", {"spike": "skip"}, "guard.spike: record -> skip"),
        ("parallel", {"zero": 3}, "parallel.zero: 2 -> 3"),
    ],
)
def test_every_change_is_a_line(section, values, line):
    (found,) = told(config(), config(**{section: values}), 3)
    assert found.startswith("changed since step 3: ")
    assert line in found


def test_a_run_says_its_changes_on_the_console(dataset, tmp_path, mikoshi):
    first = config(dataset, tmp_path / "runs", train={"steps": 4}, recovery={"restarts": 0}, log={"tensorboard": False})
    (tmp_path / "run.toml").write_text(to_toml(first))
    assert mikoshi("train", "run.toml", "run.name=test")[0] == 0
    code, out, _ = mikoshi("train", "run.toml", "run.name=test", "train.steps=6", "optim.lr=2e-3", "optim.clip=0.5")
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith(("changed", "learning rate"))]
    assert {line.partition(": ")[2] for line in said[:-1]} == {
        "train.steps: 4 -> 6", "optim.lr: 0.001 -> 0.002", "optim.clip: 1.0 -> 0.5",
    }  # fmt: skip
    rates = [json.loads(line)["lr"] for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines() if "lr" in line]
    assert said[-1].startswith(f"learning rate: at step 5 it was {rates[3]:.4g}, it is now {rates[4]:.4g}")
    code, out, _ = mikoshi("train", "run.toml", "run.name=test", "train.steps=6", "optim.lr=2e-3", "optim.clip=0.5")
    assert code == 0
    assert "changed" not in out


def test_a_config_saved_before_schedules_had_a_length_is_read():
    text = "\n".join(line for line in to_toml(config()).splitlines() if not line.startswith("steps = ") or "5" in line)
    assert parse_config(text, "before").optim.schedule.steps is None


def test_a_muon_checkpoint_of_experts_under_adamw_goes_on(dataset, tmp_path, mikoshi):
    """As it was written when the stacked experts had AdamW and the router Muon."""
    run = config(
        dataset, tmp_path / "runs", train={"steps": 2}, model={"moe": MOE}, optim={"kind": "muon"},
        recovery={"restarts": 0}, log={"tensorboard": False},
    )  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(run))
    assert mikoshi("train", "run.toml", "run.name=test")[0] == 0
    folder = tmp_path / "runs/test/checkpoints"
    saved, manifest, _ = newest_valid(folder)
    state = {name: torch.zeros(entry["shape"], dtype=torch.float32) for name, entry in manifest.tensors.items()}
    load(saved, manifest, state)
    before = {}
    for name, tensor in state.items():
        owner, _, moment = name.rpartition(".")
        if moment == "momentum_buffer" and ".experts." in name:
            before |= {f"{owner}.exp_avg": tensor, f"{owner}.exp_avg_sq": tensor**2, f"{owner}.step": torch.tensor(2.0)}
        elif ".router.weight" in name and moment == "exp_avg":
            before[f"{owner}.momentum_buffer"] = tensor
        elif not (".router.weight" in name and name.startswith("optim.")):
            before[name] = tensor
    saved.store.remove(2)
    save(folder, 2, before, {key: value for key, value in manifest.record.items() if key != "step"}, keep=3)
    code, out, errors = mikoshi("train", "run.toml", "run.name=test", "train.steps=5")
    assert code == 0, (out, errors)
    assert "optimizer state of 8 parameters begins anew" in out
    rows = [json.loads(line) for line in (tmp_path / "runs/test/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("applied")][-1] == 5


def test_only_moments_of_another_optimizer_begin_anew():
    run = config(model={"moe": MOE}, optim={"kind": "muon"})
    assert isinstance(run, RunConfig)
    names = [name for name, _ in Optimizers(GPT(run.model).named_parameters(), run.optim).state()]
    assert reset_moments(names, dict.fromkeys(names)) == []
    lost = [name for name in names if "blocks.0.attn.q" not in name]
    assert reset_moments(names, dict.fromkeys(lost)) == [], "a moment that is missing is damage"
