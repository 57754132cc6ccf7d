"""Weights as sharded safetensors, there and back: by our own hands and by accelerate's."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mikoshi.trainer.checkpoint.restore import load
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.checkpoint.verify import steps_in, verify
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import CheckpointError, ConfigError
from mikoshi.trainer.interop.begin import begin_run
from mikoshi.trainer.interop.committed import open_committed
from mikoshi.trainer.interop.sharded import export, open_weights, parse_size, split_into_shards
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import GPT2_MODEL, TINY_MODEL, run_config

MODELS = {"llama": TINY_MODEL, "gpt2-tied": GPT2_MODEL}


@pytest.fixture(params=list(MODELS))
def begun(request, dataset, tmp_path):
    """A run with a checkpoint, and the model whose weights it holds."""
    config = run_config(dataset, tmp_path / "runs", model=MODELS[request.param])
    torch.manual_seed(3)
    model = GPT(config.model)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    begin_run(config, {name: p.detach() for name, p in model.named_parameters()}, source="a test")
    return config, model


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def weights_of(run):
    """Of a run's checkpoint of step 0."""
    where = run.run.path / "checkpoints" / "step-00000000"
    manifest = verify(where)
    state = {f"model.{name}": torch.empty(p.shape) for name, p in GPT(run.model).named_parameters()}
    load(where, manifest, state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def test_a_round_trip_through_accelerate(begun, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    config, model = begun
    made = export(open_committed(config.run.path), tmp_path / "out", 20_000)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made.files > 3
    assert files == ["config.json", *(f"model-{n + 1:05d}-of-{made.files:05d}.safetensors" for n in range(made.files)),
                     "model.safetensors.index.json"]  # fmt: skip
    with torch.device("meta"):
        empty = GPT(config.model)
    accelerate.load_checkpoint_in_model(empty, str(tmp_path / "out"), device_map={"": "cpu"}, strict=True)
    same(dict(empty.named_parameters()), dict(model.named_parameters()))
    ids = torch.arange(40)[None]
    assert torch.equal(empty(ids), model(ids)), "ties are kept"
    assert (empty.head is None) == config.model.tied


def test_what_accelerate_saves_begins_a_run(begun, dataset, tmp_path, mikoshi):
    accelerate = pytest.importorskip("accelerate")
    config, model = begun
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "saved"), max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    other = run_config(dataset, tmp_path / "runs", model=config.model.model_dump(), run={"name": "fine-tune"},
                       train={"steps": 2})  # fmt: skip
    (tmp_path / "run.toml").write_text(to_toml(other))
    code, out, errors = mikoshi("checkpoint", "import", tmp_path / "saved", tmp_path / "run.toml", "optim.lr=0.001")
    assert (code, errors) == (0, [])
    assert f"go on with `mikoshi train {tmp_path}/run.toml optim.lr=0.001`" in out
    same(weights_of(other), dict(model.named_parameters()))
    code, _, errors = mikoshi("checkpoint", "import", tmp_path / "saved", tmp_path / "run.toml")
    assert code == 2
    assert "has checkpoints already" in errors[0]
    code, _, errors = mikoshi("train", tmp_path / "run.toml", "recovery.restarts=0")
    assert (code, errors) == (0, [])
    assert [path.name for path in steps_in(other.run.path / "checkpoints")] == ["step-00000002", "step-00000000"]
    assert [event["step"] for event in read_jsonl(other.run.path / "events.jsonl") if event["event"] == "resume"] == [0]


def test_the_command_and_its_refusals(begun, tmp_path, mikoshi):
    config, model = begun
    step = config.run.path / "checkpoints" / "step-00000000"
    code, out, errors = mikoshi("checkpoint", "export", step, tmp_path / "one")
    assert (code, errors) == (0, [])
    assert "one: 1 file, " in out
    mikoshi("checkpoint", "export", step, tmp_path / "many", "--max-shard-size", 100)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == len(dict(model.named_parameters()))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    with open_weights(tmp_path / "one", config.model) as read:
        same({name: read(name) for name, _ in model.named_parameters()}, dict(model.named_parameters()))
        with pytest.raises(KeyError):
            read("blocks.9.attn.q.weight")
    for arguments, message in (
        ((step, tmp_path / "one"), "exists already"),
        ((tmp_path / "nothing", tmp_path / "two"), "not a run folder"),
        ((step, tmp_path / "two", "--max-shard-size", "5 apples"), "--max-shard-size 5 apples"),
    ):
        code, _, errors = mikoshi("checkpoint", "export", *arguments)
        assert code == 2
        assert message in errors[0]
    damaged = next(step.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="altered"):
        export(open_committed(step), tmp_path / "two", 10**9)
    assert not (tmp_path / "two").exists()
    assert not list(tmp_path.glob(".two*"))


@pytest.mark.parametrize("begun", ["llama"], indirect=True)
def test_a_damaged_newer_one_is_told_and_the_wrong_folder_named(begun, tmp_path, mikoshi):
    config, model = begun
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    save(config.run.path / "checkpoints", 4, state, {"config": to_toml(config)}, keep=9)
    newest = next((config.run.path / "checkpoints" / "step-00000004").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mikoshi", "checkpoint", "export", config.run.path, tmp_path / "out"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert "not taken: " in done.stderr
    assert "step-00000004" in done.stderr
    assert "of step 0" in done.stdout
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("1")
    for folder, message in (
        (config.run.path, "`mikoshi checkpoint export`"),
        (tmp_path / "megatron", "`mikoshi checkpoint import-m"),
    ):
        code, _, errors = mikoshi("checkpoint", "import", folder, tmp_path / "run.toml", "run.name=other")
        assert code == 2
        assert message in errors[0]


def test_another_model_and_hostile_folders_are_refused(dataset, tmp_path):
    config = run_config(dataset, tmp_path / "runs")
    begin_run(config, dict(GPT(config.model).named_parameters()), source="a test")
    export(open_committed(config.run.path), tmp_path / "good", 20_000)

    first = min((tmp_path / "good").glob("model-*"))

    def refused(message, model=config.model, **files):
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        for path in (tmp_path / "good").iterdir():
            (bad / path.name).write_bytes(path.read_bytes())
        for name, change in files.items():
            path = bad / {"index": "model.safetensors.index.json", "config": "config.json"}.get(name, name)
            path.write_text(change(json.loads(path.read_text())))
        with pytest.raises(CheckpointError, match=message) as error, open_weights(bad, model):
            pass
        assert "\n" not in str(error.value)

    def mapped(value):
        return lambda index: json.dumps({"weight_map": index["weight_map"] | value})

    refused(
        "rope = .*the run has model.rope",
        model=run_config(dataset, tmp_path, model={**TINY_MODEL, "rope": {"theta": 5e5}}).model,
    )
    refused("the config's model has no blocks.1", config=lambda _: "{}", model=config.model.model_copy(update={"layers": 1}))
    refused("is no name of a file here", index=mapped({"embed.weight": "../../etc/passwd"}))
    refused("is no name of a file here", index=mapped({"embed.weight": "/dev/zero.safetensors"}))
    refused("missing", index=mapped({"embed.weight": "model-00009-of-00001.safetensors"}))
    refused(
        "has no evil, which",
        index=mapped({"evil": first.name}),
    )
    refused("weight_map: not a table", index=lambda _: "{}")
    refused("damaged", index=lambda _: "[" * 100_000)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    with (
        pytest.raises(CheckpointError, match="a pickle, which is never loaded"),
        open_weights(tmp_path / "pickled", config.model),
    ):
        pass


def test_sizes_and_groups():
    assert [parse_size(text) for text in ("5GB", "1 GiB", "0.5kb", "12")] == [5 * 10**9, 2**30, 500, 12]
    for text in ("0", "GB", "-1MB", "5 XB", ""):
        with pytest.raises(ConfigError):
            parse_size(text)
    assert split_into_shards({"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}, 8) == [["a", "b"], ["c"], ["d", "e"]]


def test_no_more_than_a_shard_is_in_memory(dataset, tmp_path):
    """Out and in, by the peak of a process's resident set over what it had before."""
    model = {"vocab": 384, "context": 64, "layers": 16, "width": 256, "heads": 4, "mlp_width": 1024}
    config = run_config(dataset, tmp_path / "runs", model=model)
    (tmp_path / "run.toml").write_text(to_toml(config))
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from mikoshi.trainer.config.run import load_config
        from mikoshi.trainer.interop.begin import begin_run, expected_state
        from mikoshi.trainer.interop.committed import open_committed
        from mikoshi.trainer.interop.sharded import export, open_weights

        def peak():
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

        folder, config = Path(sys.argv[1]), load_config(Path(sys.argv[1]) / "run.toml")
        state = expected_state(config)
        begin_run(config, lambda name: torch.full(state[f"model.{name}"].shape, 1.0), source="a test")
        for what in ("export", "import"):
            open("/proc/self/clear_refs", "w").write("5")
            before = peak()
            if what == "export":
                made = export(open_committed(config.run.path), folder / "out", 8 << 20)
            else:
                with open_weights(folder / "out", config.model) as read:
                    for name in state:
                        if name.startswith("model."):
                            assert bool((read(name.removeprefix("model.")) == 1).all())
            print(made.bytes, made.files, peak() - before)
    """)
    (tmp_path / "measure.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "measure.py"), str(tmp_path)], capture_output=True, text=True, timeout=100,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        total, files, extra = map(int, line.split())
        assert total > 60 << 20
        assert files >= 8
        assert extra < 8 << 20, f"{extra / 2**20:.1f} MiB more than before, of {total / 2**20:.0f} MiB of weights"
    assert len(done.stdout.splitlines()) == 2
