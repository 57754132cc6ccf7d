"""Config files as accelerate's own classes write them, and what no run can be."""

import json
import tomllib

import pytest
import tomli_w

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import load_config, to_toml
from mikoshi.trainer.engines.deepspeed.settings import user_settings
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.interop.accelerate.config import convert
from mikoshi.trainer.interop.accelerate.keys import KEYS, PREFIXES
from mikoshi.trainer.train.preflight import preflight
from runs import GPT2_MODEL, run_config

accelerate = pytest.importorskip("accelerate")


def written(folder, **settings):
    """A file of accelerate's own making."""
    from accelerate.commands.config.config_args import ClusterConfig

    plain = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16", "use_cpu": False, "debug": False}
    path = folder / "accelerate.yaml"
    ClusterConfig(**plain | {"num_processes": 4} | settings).to_yaml_file(path)
    return path


def converted(folder, **settings):
    """What the file becomes, and the run that takes it as a base."""
    text = convert(written(folder, **settings))
    (folder / "accelerate.toml").write_text(text)
    run = {"model": GPT2_MODEL, "data": {"path": "x"}, "train": {"steps": 5, "global_batch": 16, "context": 64}}
    (folder / "run.toml").write_text('base = ["accelerate.toml"]\n' + tomli_w.dumps(run))
    return text, load_config(folder / "run.toml")


def test_a_basic_file_is_one_rank(tmp_path):
    from accelerate.commands.config.default import write_basic_config

    assert write_basic_config("no", str(tmp_path / "basic.yaml"))
    text = convert(tmp_path / "basic.yaml")
    assert tomllib.loads(text)["parallel"] == {"zero": 0}
    assert "mikoshi train run.toml --ranks 1\n" in text


def test_several_cpus(tmp_path):
    text, run = converted(tmp_path, distributed_type="MULTI_CPU", use_cpu=True, num_processes=2, mixed_precision="no")
    assert (run.parallel.zero, run.engine.device, run.engine.precision) == (0, "cpu", "fp32")
    assert "mikoshi train run.toml --ranks 2\n" in text


def test_several_machines_are_a_submission(tmp_path):
    text, run = converted(
        tmp_path, distributed_type="MULTI_GPU", num_processes=16, num_machines=2, main_process_ip="10.0.0.1",
        main_process_port=29501, machine_rank=1,
    )  # fmt: skip
    assert "mikoshi submit run.toml --on CLUSTER --nodes 2 --set cluster.ranks=8 (main_process_ip" in text
    assert layout_of(run, 16).state_grid == (16, 1)


@pytest.mark.parametrize(
    ("fsdp", "machines", "zero", "replicas"),
    [
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, 1, 3, None),
        ({"fsdp_reshard_after_forward": "SHARD_GRAD_OP", "fsdp_version": 1}, 1, 2, None),
        ({"fsdp_sharding_strategy": 3}, 1, 0, None),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD"}, 2, 3, 2),
        ({"fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2"}, 2, 2, 2),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": True}, 1, 3, None),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, 1, 2, None),
        ({"fsdp_version": 2}, 1, 3, None),
    ],
)
def test_fsdp(tmp_path, fsdp, machines, zero, replicas):
    _, run = converted(tmp_path, distributed_type="FSDP", num_machines=machines, fsdp_config=fsdp)
    assert (run.parallel.zero, run.parallel.replicas, run.engine.kind) == (zero, replicas, "native")
    assert run.engine.precision == "bf16"
    layout_of(run, 4)


def test_fsdp_with_offload_and_what_has_no_setting(tmp_path):
    text, run = converted(
        tmp_path, distributed_type="FSDP", dynamo_config={"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"},
        fsdp_config={
            "fsdp_version": 2, "fsdp_offload_params": True, "fsdp_activation_checkpointing": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "Evil\n[engine]\nx = 1",
            "fsdp_new_thing": 3,
        },
    )  # fmt: skip
    assert (run.parallel.offload, run.engine.recompute, run.engine.compile) == ("optimizer", "full", "on")
    assert "# Without a setting here:" in text
    for key in ("fsdp_auto_wrap_policy", "fsdp_transformer_layer_cls_to_wrap", "fsdp_new_thing"):
        assert f"#   fsdp_config.{key} = " in text
    assert '#   dynamo_config.dynamo_mode = "max-autotune"\n' in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp_config: {fsdp_ofload_params: true}", "fsdp_config.fsdp_ofload_params: not a key of accelerate; did you mean "
         "fsdp_config.fsdp_offload_params?"),
        ("fsdp_config: {on: 1}", ": a table of names is expected: quote on, off"),
        ("fsdp_config: {ofload_params: true}", "fsdp_config.ofload_params: not a key"),
        ("mixed_precison: bf16", "did you mean mixed_precision?"),
        ("deepspeed_config: {zero_stge: 3}", "did you mean deepspeed_config.zero_stage?"),
        ("megatron_lm_config: {megatron_lm_tp_degre: 2}", "did you mean megatron_lm_config.megatron_lm_tp_degree?"),
        ("parallelism_config: {parallelism_config_tp_sze: 2}", "did you mean parallelism_config.parallelism_config_tp_size?"),
        ("dynamo_config: {dynamo_bakend: INDUCTOR}", "did you mean dynamo_config.dynamo_backend?"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(f"distributed_type: FSDP\n{text}\n")
    with pytest.raises(ConfigError) as error:
        convert(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_key_of_accelerate_is_known():
    from dataclasses import fields

    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    names = [action.dest for action in parser._actions]
    (own,) = [group for group in parser._action_groups if group.title == "DeepSpeed Arguments"]
    assert {action.dest for action in own._group_actions} <= set(KEYS["deepspeed_config"].split())
    assert {field.name for field in fields(ClusterConfig)} <= set(KEYS[""].split())
    for section, prefix in PREFIXES.items():
        known = set(KEYS[section].split())
        requested = {name.removeprefix(prefix) for name in names if prefix and name.startswith(prefix)} - {"config"}
        assert requested <= known, section


def test_parallelism(tmp_path):
    sizes = {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "cp": 2}
    settings = {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
    _, run = converted(
        tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 2}, num_processes=16, parallelism_config=settings
    )
    assert layout_of(run, 16).tp == layout_of(run, 16).cp == 2
    assert layout_of(run, 16).state_grid == (2, 4)
    with pytest.raises(ConfigError, match="= 16 ranks, and num_processes is 8"):
        converted(tmp_path, distributed_type="FSDP", num_processes=8, parallelism_config=settings)


@pytest.mark.parametrize(
    ("size", "strategy", "kind"), [("cp", "allgather", "all-gather"), ("cp", "alltoall", "ring"), ("sp", None, "ulysses")]
)
def test_context_parallelism(tmp_path, size, strategy, kind):
    settings = {f"parallelism_config_{size}_size": 2, "parallelism_config_dp_shard_size": 2}
    settings |= {"parallelism_config_cp_comm_strategy": strategy} if strategy else {}
    text, run = converted(tmp_path, distributed_type="FSDP", parallelism_config=settings, num_processes=4)
    assert (run.parallel.cp, run.parallel.context_kind) == (2, kind)
    assert ("data.document_mask = false" in text) == (kind == "ring")


def test_deepspeed(tmp_path):
    text, run = converted(
        tmp_path, distributed_type="DEEPSPEED",
        deepspeed_config={
            "zero_stage": 3, "offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/nvme",
            "offload_param_device": "cpu", "gradient_accumulation_steps": 4, "gradient_clipping": 0.5,
            "zero3_init_flag": True, "deepspeed_multinode_launcher": "standard",
        },
    )  # fmt: skip
    deepspeed = run.engine.deepspeed
    assert (run.engine.kind, run.parallel.zero, run.optim.clip) == ("deepspeed", 3, 0.5)
    assert (deepspeed.offload_optimizer, deepspeed.offload_parameters, str(deepspeed.nvme)) == ("nvme", "cpu", "/nvme")
    assert "x 4 (accumulated) x 4 data ranks" in text
    assert "#   deepspeed_config.zero3_init_flag = true: " in text


def test_a_deepspeed_json_and_the_run_say_the_same(tmp_path):
    inside = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 0.25,
        "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 2,
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(inside))
    settings = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": False}
    text, run = converted(tmp_path, distributed_type="DEEPSPEED", mixed_precision="no", deepspeed_config=settings)
    assert (run.parallel.zero, run.optim.clip, run.engine.precision) == (1, 0.25, "bf16")
    assert run.engine.deepspeed.offload_optimizer == "cpu"
    assert run.engine.deepspeed.config is None, "the base says it all"
    assert "x 2 (accumulated)" in text
    (tmp_path / "ds.json").write_text('{"fp16": {"enabled": true}}')
    with pytest.raises(ConfigError, match=r"ds.json: fp16.enabled = true: fp16 needs loss scaling.*use bf16"):
        converted(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=settings)
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ConfigError, match=r'deepspeed_config_file = ".*ds\.json": there is no .*ds\.json: put the'):
        converted(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=settings)


REAL = {
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": True},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 2e-4, "betas": [0.9, 0.98], "eps": 1e-7, "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": 2, "total_num_steps": 5},
    },
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 5e8, "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "none"},
        "zero_hpz_partition_size": 2,
    },
    "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False},
    "gradient_accumulation_steps": 4, "gradient_clipping": 0.5, "steps_per_print": 2000, "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4, "wall_clock_breakdown": False, "communication_data_type": "bf16",
    "prescale_gradients": False, "elasticity": {"enabled": False, "max_train_batch_size": 2000}, "left_as\nis": [1],
}  # fmt: skip


def test_what_the_json_of_an_optimizer_leaves_out_is_deepspeeds(tmp_path):
    """Not a run's own defaults, which are others."""
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "Adam", "params": {"lr": 2e-4, "eps": "auto"}}}))
    settings = {"deepspeed_config_file": "ds.json"}
    found = tomllib.loads(convert(written(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=settings)))
    assert found["optim"] == {"lr": 2e-4, "weight_decay": 0.0, "betas": [0.9, 0.999]}


def test_a_json_as_people_have_them_becomes_a_base_that_runs(tmp_path, dataset):
    """Through to everything that is checked before a rank starts."""
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(json.dumps(REAL))
    config = {"deepspeed_config_file": "ds.json", "zero3_init_flag": True}
    text = convert(written(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=config))
    (tmp_path / "base.toml").write_text(text)
    values = tomllib.loads(to_toml(run_config(dataset, tmp_path)))
    own = {name: values[name] for name in ("run", "model", "data", "train")}
    (tmp_path / "run.toml").write_text('base = ["base.toml"]\n' + tomli_w.dumps(own))
    run = load_config(tmp_path / "run.toml", ["engine.device=cpu"])
    preflight(run, 4)
    assert (run.parallel.zero, run.engine.precision, run.optim.clip, run.engine.deepspeed.hpz) == (3, "bf16", 0.5, 2)
    assert (run.optim.lr, run.optim.betas, run.optim.eps, run.engine.deepspeed.offload_optimizer) == (
        2e-4,
        (0.9, 0.98),
        1e-7,
        "cpu",
    )
    tuned = user_settings(run, layout_of(run, 4))
    assert tuned.pop("zero_optimization") == {
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "stage3_prefetch_bucket_size": 5e8,
        "offload_optimizer": {"pin_memory": True},
    }  # fmt: skip
    assert tuned == {"steps_per_print": 2000, "wall_clock_breakdown": False}
    set_by_run, left = text.split("# Without a setting here:")
    assert "train.global_batch = 64, as ds.json has it" in set_by_run
    assert "train.micro_batch = 4, as ds.json has it" in set_by_run
    assert 'optim.schedule.kind = "linear", optim.schedule.warmup = 2, train.steps = 5' in set_by_run
    for named in ("optimizer.params.torch_adam", "stage3_gather_16bit_weights_on_model_save", "partition_activations",
                  "communication_data_type", "left_as"):  # fmt: skip
        assert named in left


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ({"zero_optimization": {"offload_optimiser": {"device": "cpu"}}}, "did you mean zero_optimization.offload_optimizer?"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, 'reduce_bucket_size = "big": a whole number'),
        ({"gradient_cliping": 1.0}, "gradient_cliping: not known; did you mean gradient_clipping?"),
        ({"gradient_cliping": "auto"}, "gradient_cliping: not known; did you mean gradient_clipping?"),
        ({"steps_per_print": 0}, "steps_per_print = 0: a whole number of at least 1"),
    ],
)
def test_a_mistake_in_a_json_is_told_with_its_file(tmp_path, inside, message):
    (tmp_path / "ds.json").write_text(json.dumps(inside))
    with pytest.raises(ConfigError) as error:
        converted(tmp_path, distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": "ds.json"})
    assert message in str(error.value)
    assert "ds.json: " in str(error.value)


def test_another_optimizer_and_old_offload(tmp_path):
    inside = {"optimizer": {"type": "Lion", "params": {"lr": 1.0}}, "zero_optimization": {"stage": 2, "cpu_offload": True}}
    (tmp_path / "ds.json").write_text(json.dumps(inside))
    text, run = converted(tmp_path, distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": "ds.json"})
    assert '#   optimizer.type = "Lion": ' in text
    assert "#   optimizer.params.lr = 1.0: " in text
    assert (run.optim.lr, run.engine.deepspeed.offload_optimizer) == (3e-4, "cpu")


def test_a_json_is_that_of_the_yamls_folder_wherever_the_command_runs(tmp_path, monkeypatch):
    """And the base says it all, so that a run from another folder takes no other one."""
    (tmp_path / "acc").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}
    path = written(tmp_path / "acc", **settings).relative_to(tmp_path)
    with pytest.raises(ConfigError, match=r'"ds.json": there is no acc/ds.json nor ds.json: put the DeepSpeed JSON there'):
        convert(path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    found = tomllib.loads(convert(path))
    assert (found["parallel"]["zero"], "deepspeed" in found["engine"]) == (1, False)
    (tmp_path / "acc" / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    found = tomllib.loads(convert(path))
    assert found["parallel"]["zero"] == 3


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(ConfigError, match=": is a folder: give the file in it"):
        convert(tmp_path)


def test_megatron(tmp_path):
    text, run = converted(
        tmp_path, distributed_type="MEGATRON_LM", num_processes=8,
        megatron_lm_config={
            "megatron_lm_tp_degree": 2, "megatron_lm_pp_degree": 2, "megatron_lm_num_micro_batches": 4,
            "megatron_lm_recompute_activations": True, "megatron_lm_sequence_parallelism": True,
            "megatron_lm_use_distributed_optimizer": True, "megatron_lm_gradient_clipping": 1.5,
        },
    )  # fmt: skip
    assert (run.engine.kind, run.parallel.zero, run.optim.clip) == ("megatron", 1, 1.5)
    assert (run.parallel.tp, run.parallel.pp, run.engine.recompute) == (2, 2, "selective")
    layout = layout_of(run, 8)
    assert isinstance(layout, Layout)
    assert layout.shards == 2
    assert "x 4 (accumulated) x 2 data ranks" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributed_type": "NO", "mixed_precision": "fp16"}, r'mixed_precision = "fp16": .*mixed_precision: bf16'),
        ({"distributed_type": "NO", "mixed_precision": "fp8"}, "only Megatron's engine computes in FP8"),
        ({"distributed_type": "MULTI_NPU"}, "only CUDA GPUs and CPUs carry a run"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 3, "num_machines": 2}, "does not come out even"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "SOME"}}, "none of FULL_SHARD"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_sharding_strategy": "FULL_SHARD"}}, "of FSDP1"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "zero_stage = 4: a whole number of 0 to 3"),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_hidden_dropout": 0.1}}, "no dropout"),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 3}}, "3 does not divide it"),
        ({"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "TVM"}}, "compiled by inductor"),
    ],
)
def test_what_no_run_can_be(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        converted(tmp_path, **settings)
    assert "\n" not in str(error.value)
    assert "accelerate.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['touch CANARY']", "not plain YAML"),
        ("a: &x [1, 1]\nb: &y [*x, *x, *x]\nc: [*y, *y, *y]", "aliases"),
        ("[" * 100_000, "not plain YAML"),
        ("- 1\n- 2", "not a table"),
        ("1: 2", "not a table"),
        ("", "not a table"),
        ("\xff", "not UTF-8"),
        ("distributed_type: [NO]", "a word is expected"),
        ("distributed_type: NO\nnum_processes: many", "a whole number"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: 3", "a table is expected"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_clipping: .nan}", "a number of at least 0"),
        ("x: " + "y" * (1 << 20), "larger than"),
    ],
)
def test_hostile_files(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as error:
        convert(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "CANARY").exists()


def test_no_value_gets_out_of_its_comment(tmp_path):
    wild = {"debug_thing\n[parallel]\nzero = 9": "a\nb\x7f\u2028\r", "tpu_name": "x\n[run]\nname = 'y'"}
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({"distributed_type": "NO", **wild}))
    assert tomllib.loads(convert(path)) == {"parallel": {"zero": 0}, "engine": {"precision": "fp32"}}


def test_the_command(mikoshi, tmp_path, dataset):
    path = written(tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 2})
    code, out, _ = mikoshi("config", "--from-accelerate", path)
    assert code == 0
    (tmp_path / "layout.toml").write_text(out)
    (tmp_path / "run.toml").write_text(to_toml(run_config(dataset, tmp_path)))
    code, _, errors = mikoshi("config", tmp_path / "run.toml", "--from-accelerate", path)
    assert (code, len(errors)) == (2, 1)
    code, _, errors = mikoshi("config", "--from-accelerate", tmp_path / "none.yaml")
    assert (code, len(errors)) == (2, 1)
    assert "no such file" in errors[0]
