"""What DeepSpeed cannot do is refused before any rank starts, and so is a user's JSON that contradicts the run."""

import errno
import json
import os
import re
import signal

import pytest

from layouts import BASE, MODELS, degrees
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.engines import limits
from mikoshi.trainer.engines.deepspeed import limits as deepspeed_limits
from mikoshi.trainer.engines.deepspeed import swap as deepspeed_swap
from mikoshi.trainer.engines.deepspeed.settings import user_settings
from mikoshi.trainer.engines.deepspeed.swap import swap_folder
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.errors import ConfigError
from runs import run_config


def config_of(folder, layout="", engine=None, **sections):
    sections["model"] = BASE | {"kv_heads": 2} | sections.get("model", {})
    sections["engine"] = {"kind": "deepspeed"} | (engine or {})
    sections["parallel"] = degrees(layout) | sections.get("parallel", {})
    return run_config("nowhere", folder, **sections)


def refusal(config, world=4, cuda=False):
    try:
        limits.refuse(config, layout_of(config, world), cuda)
    except ConfigError as error:
        return str(error)
    return ""


def of(**settings):
    return {"deepspeed": settings}


CASES = [
    ("tp=2", {}, {}, "parallel.tp > 1"),
    ("pp=2 zero=2", {}, {}, "parallel.pp > 1 with parallel.zero > 1"),
    ("pp=2 cp=2 zero=1", {}, {}, "parallel.pp > 1 with parallel.cp > 1"),
    ("pp=2 zero=1 schedule=gpipe", {}, {}, 'parallel.schedule other than "1f1b"'),
    ("pp=2 zero=1 schedule=interleaved virtual_stages=2", {}, {}, "or parallel.virtual_stages > 1"),
    ("ep=2", {}, {"model": MODELS["mixtral"]}, "parallel.ep > 1"),
    ("", {}, {"model": MODELS["deepseek"]}, "model.moe.bias_rate"),
    ("cp=2", {}, {}, 'another parallel.context_kind than "ulysses"'),
    ("zero=2 replicas=2", {}, {}, "parallel.replicas > 1"),
    ("", {}, {"optim": {"kind": "muon"}}, 'optim.kind = "muon"'),
    ("zero=0", {"precision": "bf16"}, {}, 'engine.precision = "bf16" with parallel.zero = 0'),
    ("zero=1", {"precision": "bf16"}, {"model": MODELS["mixtral"]}, 'engine.precision = "bf16" with model.moe'),
    ("zero=3", {"compile": "on"}, {}, 'engine.compile = "on" with parallel.zero = 3'),
    ("", {}, {"parallel": {"async_tp": True}}, "parallel.async_tp"),
    ("zero=0", of(offload_optimizer="cpu"), {}, "offload with parallel.zero = 0"),
    ("zero=0 offload=optimizer", {}, {}, "offload with parallel.zero = 0"),
    ("zero=2", of(offload_parameters="cpu"), {}, "engine.deepspeed.offload_parameters with parallel.zero < 3"),
    ("zero=2", of(offload_optimizer="nvme", nvme="/nvme"), {}, "offload to nvme with parallel.zero < 3"),
    ("zero=3", of(offload_optimizer="nvme"), {}, "without engine.deepspeed.nvme"),
    ("zero=3", of(offload_optimizer="nvme", nvme="/none/such"), {}, "an engine.deepspeed.nvme that is no folder"),
    ("zero=2", of(hpz=2), {}, "with parallel.zero < 3"),
    ("zero=2", of(quantized_weights=True), {}, "with parallel.zero < 3"),
    ("zero=3", of(hpz=3), {}, "hpz that does not divide the ranks"),
    (
        "zero=3",
        of(offload_parameters="nvme", nvme="/nvme", hpz=2),
        {},
        'hpz > 1 with engine.deepspeed.offload_parameters = "nvme"',
    ),
    ("zero=3", of(quantized_gradients=True), {}, "without CUDA"),
]


@pytest.mark.parametrize(("layout", "engine", "sections", "message"), CASES)
def test_it_is_refused_with_the_reason_and_a_way_out(tmp_path, layout, engine, sections, message):
    found = refusal(config_of(tmp_path, layout, engine, **sections))
    assert any(message in line for line in found.splitlines())
    assert all(line.startswith('engine.kind = "deepspeed": ') for line in found.splitlines())


def test_every_row_of_the_table_can_be_met(tmp_path, monkeypatch):
    """By a case above, or by a machine that lacks something."""
    fired = {line.split(": ")[1] for case in CASES for line in refusal(config_of(tmp_path, *case[:2], **case[2])).splitlines()}
    nvme = config_of(tmp_path, "zero=3", of(offload_optimizer="nvme", nvme="/nvme"))
    monkeypatch.setattr(deepspeed_limits.shutil, "which", lambda _: None)
    monkeypatch.setattr(deepspeed_limits, "find_library", lambda _: None)
    monkeypatch.setattr(deepspeed_limits, "installed", lambda _: False)
    monkeypatch.setattr(deepspeed_limits.importlib.metadata, "version", lambda _: "0.18.9")
    quantized = config_of(tmp_path, "zero=3", of(quantized_weights=True))
    fired |= {
        line.split(": ")[1] for message in (refusal(nvme), refusal(quantized, cuda=True)) for line in message.splitlines()
    }
    assert fired == {row.what for row in deepspeed_limits.DEEPSPEED}


def test_what_is_not_known_yet_is_not_refused(tmp_path):
    assert refusal(config_of(tmp_path, "zero=3", of(quantized_gradients=True)), cuda=None) == ""


@pytest.mark.parametrize(
    ("layout", "engine"),
    [("zero=0", {}), ("zero=3", {}), ("cp=2 context_kind=ulysses", {}), ("zero=3", of(offload_parameters="cpu", hpz=2)),
     ("zero=1", {"precision": "bf16", "recompute": "full"}), ("zero=2 offload=optimizer", {}), ("pp=2 zero=0", {}),
     ("pp=4 zero=1", {"precision": "bf16"}), ("pp=2 zero=1 offload=optimizer", {})],
)  # fmt: skip
def test_the_rest_is_not(tmp_path, layout, engine):
    assert refusal(config_of(tmp_path, layout, engine)) == ""


def test_the_nearest_that_is_told_for_bf16_is_none_that_is_refused_too(tmp_path):
    message = refusal(config_of(tmp_path, "zero=0", {"precision": "bf16"}))
    (way,) = re.findall(r"(parallel\.zero=1)$", message)
    assert refusal(config_of(tmp_path, way.removeprefix("parallel."), {"precision": "bf16"})) == ""


def test_layouts_that_no_engine_can_have_are_refused_before(tmp_path):
    with pytest.raises(LayoutError):
        layout_of(config_of(tmp_path, "tp=3"), 4)


def with_json(folder, text, layout="zero=2", **sections):
    path = folder / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return refusal(config_of(folder, layout, of(config=path), **sections))


GOOD = [
    {},
    {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False}},
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0},
    {"train_batch_size": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}}},
    {"scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}}, "bf16": {"enabled": "auto"}},
    {"fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 2}, "elasticity": {"enabled": False, "version": 0.1}},
    {"fp16": {"enabled": "auto", "loss_scale_window": 1000}, "zero_optimization": {"sub_group_size": 1e9}},
    {"fp16": {"enabled": False}, "bf16": {"enabled": False}, "wall_clock_breakdown": True, "steps_per_print": 10},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
]


@pytest.mark.parametrize("text", GOOD)
def test_a_json_that_agrees_or_tunes_is_taken(tmp_path, text):
    assert with_json(tmp_path, text) == ""


BAD = [
    ({"train_batch_size": 16}, "train_batch_size = 16: train.global_batch is 8: set train.global_batch"),
    ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5: optim.clip is 1.0: set optim.clip"),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: parallel.zero is 2"),
    (
        {"bf16": {"enabled": True}},
        'bf16.enabled = true: engine.precision is "fp32": set engine.precision="bf16", or leave it out',
    ),
    (
        {"fp16": {"enabled": True}},
        'fp16.enabled = true: engine.precision is "fp32", which can be "fp32" or "bf16": leave it out, or use '
        'engine.precision="bf16" in its place',
    ),
    ({"amp": {"enabled": True}}, 'amp.enabled = true: engine.precision is "fp32"'),
    ({"torch_autocast": {"enabled": True}}, 'torch_autocast.enabled = true: engine.precision is "fp32"'),
    ({"fp16": {"loss_scale": 0}}, "fp16.loss_scale: leave it out: engine.precision says it"),
    (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps = 2: a rank's 2 row(s) of a step go in 1 micro-batch(es) of 2: set train.micro_batch=1",
    ),
    ({"gradient_accumulation_steps": 4}, "of 2: leave it out: no train.micro_batch gives that"),
    ({"train_micro_batch_size_per_gpu": 1}, "set train.micro_batch=1, or leave it out"),
    ({"train_micro_batch_size_per_gpu": 3}, "no train.micro_batch gives that"),
    ({"zero_optimization": True}, "zero_optimization = true: a table is expected"),
    ({"zero_optimization": {"offload_param": "cpu"}}, 'zero_optimization.offload_param = "cpu": a table is expected'),
    ({"fp16": True}, "fp16 = true: a table is expected"),
    ({"train_batch_size": {"rows": 8}}, "train_batch_size: a value is expected, not a table"),
    (
        {"zero_optimisation": {"stage": 2, "overlap_comm": True}},
        "zero_optimisation: not known; did you mean zero_optimization?",
    ),
    ({"zero_optimization": {"ofload_param": {"device": "cpu"}}}, "did you mean zero_optimization.offload_param?"),
    (
        {"zero_optimization": {"reduce_bucket_size": "big"}},
        'zero_optimization.reduce_bucket_size = "big": a whole number of at least 0 is expected',
    ),
    ({"zero_optimization": {"overlap_comm": 3}}, "zero_optimization.overlap_comm = 3: true or false is expected"),
    ({"seed": 7}, "seed: leave it out: set run.seed"),
    ({"eigenvalue": {"enabled": True}}, "eigenvalue.enabled: leave it out: it steers quantisation alone"),
    ({"optimizer": {"type": "Lion"}}, 'optimizer.type = "Lion": optim.kind is "adamw": leave it out'),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr = 1.0: optim.lr is 0.003"),
    ({"optimizer": {"params": {"fused": True}}}, "optimizer.params.fused: leave it out: set [optim]"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type: leave it out"),
    ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: leave it out"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "set engine.deepspeed.offload_optimizer"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "mics_shard_size: leave it out"),
    ({"communication_data_type": "bf16"}, "cannot be another"),
    ({"elasticity": {"enabled": True}}, "elasticity.enabled: leave it out"),
    ({"pipeline": {"stages": 2}}, "pipeline.stages: leave it out"),
    ({"activation_checkpointing": {"partition_activations": True}}, "set engine.recompute"),
    ({"gradient_cliping": 1.0}, "gradient_cliping: not known; did you mean gradient_clipping?"),
    ({"zero_optimization": {"reduce_buckt_size": 1}}, "did you mean zero_optimization.reduce_bucket_size?"),
    ({"steps_per_print": 0}, "steps_per_print = 0: a whole number of at least 1 is expected"),
    ({"aio": {"block_size": "x"}}, 'aio.block_size = "x": a whole number of at least 1'),
    ({"gradient_cliping": "auto"}, "gradient_cliping: not known; did you mean gradient_clipping?"),
    (
        {"zero_optimizaton": {"enabled": False, "overlap_comm": True}},
        "zero_optimizaton: not known; did you mean zero_optimization?",
    ),
    ({"zero_optimization": {"enabled": "auto"}}, "zero_optimization.enabled: not known"),
    ({"flux_capacitor": 1}, "flux_capacitor: not known"),
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"steps_per_print": 1, "steps_per_print": 2}', "'steps_per_print' is there twice"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_contradicts_the_run_is_refused_by_name(tmp_path, text, message):
    found = with_json(tmp_path, text)
    assert message in found
    assert found.startswith("engine.deepspeed.config = ")
    assert len(found.splitlines()) == 1


def test_the_micro_batch_that_is_told_is_right(tmp_path):
    for requested in ({"gradient_accumulation_steps": 4}, {"train_micro_batch_size_per_gpu": 2}):
        (size,) = re.findall(r"set train\.micro_batch=(\d+)", with_json(tmp_path, requested, train={"global_batch": 32}))
        assert with_json(tmp_path, requested, train={"global_batch": 32, "micro_batch": int(size)}) == ""


def test_in_bf16_the_way_out_is_not_what_is_set(tmp_path):
    def message(text):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(text))
        return refusal(config_of(tmp_path, "zero=2", of(config=path) | {"precision": "bf16"}))

    assert message({"fp16": {"enabled": True}}).endswith(
        'engine.precision is "bf16", which can be "fp32" or "bf16": leave it out'
    )
    assert message({"bf16": {"enabled": False}}).endswith('is "bf16": set engine.precision="fp32", or leave it out')
    assert message({"bf16": {"enabled": True}}) == ""


def test_what_deepspeed_itself_finds_has_its_section_and_value():
    from mikoshi.trainer.engines.deepspeed.setup import rejection

    error = {"loc": ("enabled",), "msg": "Input should be a valid boolean", "input": "maybe"}
    notice = {"aio": {"enabled": 3}, "comms_logger": {"enabled": "maybe"}}
    assert rejection(notice, error) == (
        'comms_logger.enabled = "maybe": DeepSpeed does not take it: input should be a valid boolean'
    )


def test_every_contradiction_is_a_line(tmp_path):
    found = with_json(tmp_path, {"train_batch_size": 16, "gradient_clipping": 0.5, "flux": 1})
    assert len(found.splitlines()) == 3


def test_a_json_that_is_not_there(tmp_path):
    config = config_of(tmp_path, "zero=2", of(config=tmp_path / "none.json"))
    assert "none.json': cannot be read: No such file" in refusal(config)


def test_a_relative_json_is_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "zero=2", of(config="ds.json"))
    assert refusal(config).endswith(f"(from the current folder, {tmp_path}): give its full path")
    (tmp_path / "ds.json").write_text("{}")
    assert refusal(config) == ""


def test_settings_are_as_a_json_and_go_over_it(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 1, "sub_group_size": 2}}')
    config = config_of(tmp_path, "zero=2", of(config=path, settings={"zero_optimization": {"reduce_bucket_size": 3}}))
    found = user_settings(config, layout_of(config, 4))
    assert found == {"zero_optimization": {"reduce_bucket_size": 3, "sub_group_size": 2}}
    path.write_text('{"tensorboard": {"job_name": 3}}')
    other = config_of(tmp_path, "zero=2", of(config=path, settings={"tensorboard": {"job_name": {"x": 1}}}))
    assert user_settings(other, layout_of(other, 4)) == {"tensorboard": {"job_name": {"x": 1}}}
    wrong = config_of(tmp_path, "zero=2", of(settings={"seed": 1}))
    assert refusal(wrong) == "engine.deepspeed.settings: seed: leave it out: set run.seed"


def test_a_disk_that_another_machine_has_is_not_missed_here(tmp_path):
    config = config_of(tmp_path, "zero=3", of(offload_parameters="nvme", nvme=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"that is no folder, or none to write in: .*: a folder that is there: mkdir -p"):
        limits.refuse(config, layout_of(config, 2), cuda=False)
    limits.refuse(config, layout_of(config, 2), cuda=False, on_this_machine=False)
    assert not (tmp_path / "none").exists()


class Owner:
    """Stands for an engine."""


def swapping(folder, name="run"):
    return config_of(folder, "zero=3", of(offload_optimizer="nvme", nvme=folder / "disk"), run={"name": name})


def test_every_rank_of_every_run_swaps_into_a_folder_of_its_own_that_goes_with_it(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "someone-elses").mkdir()
    one, two, three = Owner(), Owner(), Owner()
    first, close = swap_folder(swapping(tmp_path), 0, one)
    second, _ = swap_folder(swapping(tmp_path), 1, two)
    third, _ = swap_folder(swapping(tmp_path), 0, three)
    assert len({first, second, third}) == 3
    assert [path.name.split("-")[:2] for path in (first, second, third)] == [
        ["run", "rank0"],
        ["run", "rank1"],
        ["run", "rank0"],
    ]
    (first / "x.swp").write_bytes(b"x")
    close()
    assert not first.exists()
    del two
    assert {path.name for path in disk.iterdir()} == {"someone-elses", third.name, f"{third.name}-lock"}
    assert swap_folder(config_of(tmp_path, "zero=3", of(nvme=disk)), 0, one)[0] is None


def test_what_a_killed_rank_left_is_removed_at_the_next_start(tmp_path):
    (tmp_path / "disk").mkdir()
    child = os.fork()
    if not child:
        folder, _ = swap_folder(swapping(tmp_path, "dead"), 0, owner := Owner())
        (folder / "x.swp").write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)
        del owner
    os.waitpid(child, 0)
    left, lock = sorted((tmp_path / "disk").iterdir())
    assert (left / "x.swp").exists()
    elsewhere = lock.with_name("run-rank0-x.another-host.mikoshi-swap-lock")
    elsewhere.touch()  # whether it is held, only its host knows
    owner = Owner()
    mine, _ = swap_folder(swapping(tmp_path, "next"), 0, owner)
    kept = mine.with_name(f"{mine.name}-lock")
    assert set((tmp_path / "disk").iterdir()) == {mine, kept, elsewhere}


def test_a_removal_that_was_cut_short_is_gone_on_with(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    owner = Owner()
    folder, leave = swap_folder(swapping(tmp_path), 0, owner)
    (folder / "x.swp").write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed_swap.shutil, "rmtree", lambda *_, **__: None)
        leave()
    assert (folder / "x.swp").exists()
    deepspeed_swap.sweep(tmp_path / "disk")
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_disk_that_cannot_lock_is_told(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(deepspeed_swap.fcntl, "flock", refused)
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.nvme = .*: cannot be swapped to: No locks available"):
        swap_folder(swapping(tmp_path), 0, Owner())
    assert list((tmp_path / "disk").iterdir()) == []
