"""Megatron-core's checkpoints: what we write it loads, what it writes we read, and a poisoned one runs nothing."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gpt import gpt_model, logits_of, on_cpu
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.interop.begin import begin_run
from mikoshi.trainer.interop.committed import open_committed
from mikoshi.trainer.interop.dcp import open_folder, saved_tensor
from mikoshi.trainer.interop.megatron.export import export_megatron, saved_plain
from mikoshi.trainer.interop.megatron.torch_dist import find_weights
from mikoshi.trainer.interop.model_file import unverifiable_settings
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from runs import GPT2_MODEL, TINY_MODEL, run_config

MODELS = {
    "gpt2": GPT2_MODEL,
    "llama": TINY_MODEL,
    "qwen3": {**TINY_MODEL, "qk_norm": True, "qkv_bias": True},
}
LINEAR = "decoder.layers.mlp.linear_fc2.weight"


def weighted(model):
    """Our GPT with weights that all count."""
    torch.manual_seed(3)
    gpt = GPT(model)
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(std=0.3)
    return gpt, {name: p.detach() for name, p in gpt.named_parameters()}


@pytest.fixture(scope="module")
def runs_of(dataset, tmp_path_factory):
    """For each model a run that begins with weights: its config, our GPT and the weights."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, shape in MODELS.items():
        config = run_config(dataset, folder, model=shape, run={"name": name})
        gpt, weights = weighted(config.model)
        begin_run(config, weights, source="a test")
        found[name] = (config, gpt, weights)
    return found


def megatron_loads(model, folder, tp, tokens, vocab):
    """What Megatron-core's model makes of tokens with the weights of a folder."""
    from megatron.core import dist_checkpointing

    with on_cpu(tp):
        built = gpt_model(model, tp, vocab=vocab)
        loaded = dist_checkpointing.load(built.sharded_state_dict(), str(folder))
        results = built.load_state_dict({k: v for k, v in loaded.items() if k not in ("iteration", "checkpoint_version")})
        assert not results.missing_keys
        assert not results.unexpected_keys
        return logits_of(built, tokens), loaded["iteration"]


def megatron_saves(model, folder, tp, how, vocab=None):
    """A torch_dist checkpoint by Megatron-core itself, weights under our names beside it (of tp 1)."""
    from megatron.core import dist_checkpointing

    with on_cpu(tp):
        torch.manual_seed(11)
        built = gpt_model(model, tp, vocab=vocab)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save({**built.sharded_state_dict(metadata=how), "iteration": 7, "args": object}, str(folder))
        torch.manual_seed(12)
        tokens = torch.randint(0, model.vocab, (2, 16))
        return tokens, logits_of(built, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_megatron_core_loads_in_any_layout(ranks, runs_of, tmp_path, name):
    pytest.importorskip("megatron.core")
    config, gpt, _ = runs_of[name]
    tokens = torch.randint(0, config.model.vocab, (2, 16))
    expected = gpt(tokens).detach()
    folder = export_megatron(open_committed(config.run.path), tmp_path / "out")
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"
    for tp in (1, 2):
        for logits, iteration in ranks.run(megatron_loads, config.model, folder, tp, tokens, None, world=tp):
            assert torch.allclose(logits, expected, atol=1e-5, rtol=0)
            assert iteration == 0


def test_a_vocabulary_is_padded_only_on_request(ranks, runs_of, tmp_path):
    pytest.importorskip("megatron.core")
    config, gpt, weights = runs_of["gpt2"]
    tokens = torch.randint(0, config.model.vocab, (2, 16))
    folder = export_megatron(open_committed(config.run.path), tmp_path / "out", vocabulary=512)
    for logits, _ in ranks.run(megatron_loads, config.model, folder, 2, tokens, 512, world=2):
        assert torch.allclose(logits[..., : config.model.vocab], gpt(tokens).detach(), atol=1e-5, rtol=0)
    back = find_weights(folder, config.model)
    assert back.padding == 512 - config.model.vocab
    assert all(torch.equal(back(key), weight) for key, weight in weights.items())
    with pytest.raises(CheckpointError, match="--vocab 100: the model has 384 rows"):
        export_megatron(open_committed(config.run.path), tmp_path / "small", vocabulary=100)


HOW = {
    "stacked": {},
    "by layer": {"non_homogeneous_layers": True},
    "halves apart": {"singleton_local_shards": True},
}


@pytest.mark.parametrize(
    ("name", "tp", "how"),
    [
        ("llama", 2, "stacked"),
        *(pytest.param(*case, how, marks=pytest.mark.slow) for case in (("gpt2", 2), ("llama", 1)) for how in HOW),
        *(pytest.param("qwen3", 2, how, marks=pytest.mark.slow) for how in ("by layer", "halves apart")),
    ],
)
def test_what_megatron_core_saves_is_imported(ranks, tmp_path, name, tp, how):
    pytest.importorskip("megatron.core")
    model = ModelConfig.model_validate(MODELS[name])
    (tokens, expected), *_ = ranks.run(megatron_saves, model, tmp_path / "m", tp, HOW[how], world=tp)
    weights = find_weights(tmp_path / "m", model)
    gpt = GPT(model)
    with torch.no_grad():
        for key, p in gpt.named_parameters():
            p.copy_(weights(key))
        assert torch.allclose(gpt(tokens), expected, atol=1e-5, rtol=0)


def test_imported_by_the_command_a_run_goes_on_from_it_and_comes_back_out(dataset, runs_of, tmp_path, mikoshi):
    config, _, weights = runs_of["llama"]
    code, out, _ = mikoshi("checkpoint", "export-megatron", config.run.path, tmp_path / "out", "--vocab", 512)
    assert (code, "iter_0000000" in out) == (0, True)
    other = run_config(dataset, tmp_path / "runs", model=TINY_MODEL, recovery={"restarts": 0}, log={"tensorboard": False})
    (tmp_path / "other.toml").write_text(to_toml(other))
    code, out, _ = mikoshi("checkpoint", "import-megatron", tmp_path / "out", tmp_path / "other.toml")
    assert code == 0
    assert "128 rows of padding are left out" in out
    found = open_committed(other.run.path)
    assert all(torch.equal(found.read(key), weight) for key, weight in weights.items())
    code, _, _ = mikoshi("train", tmp_path / "other.toml")
    assert code == 0
    assert [r["step"] for r in read_jsonl(RunFolder(other.run.path).metrics) if "loss" in r] == [1, 2, 3, 4, 5]
    code, _, _ = mikoshi(
        "checkpoint", "export-megatron", LocalStore(RunFolder(other.run.path).checkpoints).describe(5), "again"
    )
    assert code == 0
    assert (tmp_path / "again" / "latest_checkpointed_iteration.txt").read_text() == "5"
    code, _, errors = mikoshi("checkpoint", "export-megatron", other.run.path, "again")
    assert (code, len(errors)) == (2, 1)
    assert "iter_0000005: exists already" in errors[0]


@pytest.fixture
def exported(runs_of, tmp_path):
    """An exported folder and its model."""
    config, _, _ = runs_of["llama"]
    return export_megatron(open_committed(config.run.path), tmp_path / "out"), config.model


class Canary:
    """Whoever unpickles it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


def metadata_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def poison_metadata(folder, canary):
    metadata = metadata_of(folder)
    metadata.planner_data = canary
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_metadata_in_an_old_protocol(folder, canary):
    (folder / ".metadata").write_bytes(pickle.dumps(canary, protocol=0))


def poison_chunk(folder, canary):
    """A chunk's own pickle, at the end of the file, where the metadata now say that it is."""
    metadata = metadata_of(folder)
    (index,) = [i for i in metadata.storage_data if i.fqn == LINEAR and tuple(i.offset) == (0, 0, 0)]
    info = metadata.storage_data[index]
    file = folder / info.relative_path
    info.offset, info.length = file.stat().st_size, append(file, canary)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def append(file, value):
    out = io.BytesIO()
    torch.save(value, out)
    out.write(b" " * 8192)  # room as for the tensor, which a comment of the ZIP file would be
    with file.open("ab") as end:
        end.write(out.getvalue())
    return len(out.getvalue())


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poison_metadata, r"\.metadata: cannot be read: names '(posix|os)\.system', .*nothing of it was run"),
        (poison_metadata_in_an_old_protocol, r"\.metadata: cannot be read: "),
        (poison_chunk, r"__0_0\.distcp: .*cannot be read: names '(posix|os)\.system'"),
    ],
)
def test_a_poisoned_file_is_refused_by_name_and_runs_nothing(exported, tmp_path, poison, message):
    folder, model = exported
    poison(folder, Canary(tmp_path / "canary"))
    with pytest.raises(CheckpointError, match=message) as refused:
        everything(folder, model)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "canary").exists()


def everything(folder, model):
    weights = find_weights(folder, model)
    with torch.device("meta"):
        names = [name for name, _ in GPT(model).named_parameters()]
    return {name: weights(name) for name in names}


def test_a_name_that_is_a_bomb_of_nested_tuples_is_refused_at_once(exported):
    """A few hundred bytes whose text would fill any memory: tuples that share their parts."""
    folder, model = exported
    bomb = ()
    for _ in range(40):
        bomb = (bomb, bomb)
    metadata = metadata_of(folder)
    object.__setattr__(next(index for index in metadata.storage_data if index.offset is not None), "fqn", bomb)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="a name that is no text"):
        everything(folder, model)


def test_what_is_not_weights_is_not_opened_at_all(exported, runs_of, tmp_path):
    folder, model = exported
    canary = Canary(tmp_path / "canary")
    torch.save({"args": canary}, folder / "common.pt")
    metadata = metadata_of(folder)
    states = [i for i in metadata.storage_data if "_extra_state" in i.fqn]
    assert states
    for index in states:
        info = metadata.storage_data[index]
        info.offset, info.length = (folder / info.relative_path).stat().st_size, append(folder / info.relative_path, [canary])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    found = everything(folder, model)
    assert all(torch.equal(found[key], weight) for key, weight in runs_of["llama"][2].items())
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(canary))
    assert (tmp_path / "canary").exists(), "the poison works where it is unpickled"


@dataclass
class Parts:
    """What is said of a tensor: of all, and of where its first chunk lies."""

    metadata: Any
    entry: Any
    info: Any


def setting(part, **values):
    """A change that gives these values to a part of `Parts`."""

    def change(parts):
        for key, value in values.items():
            setattr(getattr(parts, part), key, value)

    return change


def one_chunk_twice(parts):
    parts.entry.chunks[1].offsets = parts.entry.chunks[0].offsets


def one_chunk_huge(parts):
    parts.entry.chunks[0].sizes = torch.Size((1, 1 << 40, 48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("entry", size=torch.Size((2, 1 << 40, 1 << 20))), r"chunks do not make up"),
        (one_chunk_huge, r"reaches out of"),
        (setting("info", offset=-5), r"a size that is none"),
        (setting("info", offset=1 << 50), r"__0_0\.distcp: bytes .* it was cut short"),
        (setting("info", relative_path="../../../etc/passwd"), r"is not the name of a file in the checkpoint"),
        (setting("info", relative_path="/etc/passwd"), r"is not the name of a file in the checkpoint"),
        (setting("info", length=100), r"too few"),
        (setting("info", transform_descriptors=["zstd"]), r"written with an extension of DCP"),
        (one_chunk_twice, r"chunks do not make up"),
        (setting("entry", size="2, 3"), r"a size that is none"),
        (setting("metadata", storage_data={}), r"\.metadata: cannot be read"),
        (setting("info", offset=3), r"__0_0\.distcp: decoder\.layers\.mlp\.linear_fc2\.weight: cannot be read|is torch"),
    ],
)
def test_what_cannot_be_is_refused_before_memory_is_taken_for_it(exported, change, message):
    folder, model = exported
    metadata = metadata_of(folder)
    (index,) = [i for i in metadata.storage_data if i.fqn == LINEAR and tuple(i.offset) == (0, 0, 0)]
    change(Parts(metadata, metadata.state_dict_metadata[LINEAR], metadata.storage_data[index]))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=message) as refused:
        everything(folder, model)
    assert len(str(refused.value).splitlines()) == 1
    assert str(folder) in str(refused.value)


def test_links_and_what_is_no_file_are_refused(exported, tmp_path):
    folder, model = exported
    shutil.move(folder / "__0_0.distcp", tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: not a regular file"):
        find_weights(folder, model)
    (folder / "__0_0.distcp").unlink()
    os.mkfifo(folder / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: not a regular file"):
        find_weights(folder, model)


def test_any_torn_metadata_is_one_line(exported):
    folder, _ = exported
    whole = (folder / ".metadata").read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        (folder / ".metadata").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read"):
            open_folder(folder)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):  # a flipped bit is found, or changes nothing that is read
        at, bit = (int(torch.randint(0, n, (1,), generator=generator)) for n in (len(whole), 8))
        (folder / ".metadata").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            open_folder(folder)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_saved_tensor_is_read_as_it_was(dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    for tensor in (whole, whole.T, whole[1:, 2:4], whole[0, 0], whole[:0], torch.nn.Parameter(whole.float()).to(dtype)):
        out = io.BytesIO()
        torch.save(tensor, out)
        found = saved_tensor(bytearray(out.getvalue()))
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_compressed_or_foreign_zip_is_no_tensor():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 1000)
    with pytest.raises(ValueError, match="compressed"):
        saved_tensor(bytearray(out.getvalue()))
    out = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, out)
    with pytest.raises(ValueError, match="no plain tensor"):
        saved_tensor(bytearray(out.getvalue()))


def test_plain_numbers_are_saved_as_torch_saves_them(tmp_path):
    values = {"iteration": 1_000_000, "checkpoint_version": 3.0, "negative": -7}
    (tmp_path / "x.pt").write_bytes(saved_plain(values))
    assert torch.load(tmp_path / "x.pt", weights_only=True) == values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, r"final_layernorm\.weight is of shape \[32\], the config's model has \[64\] \(norm\.weight\)"),
        ({"layers": 3}, r"is of 2 layers, the config's model has 3"),
        ({"mlp_width": 64}, r"linear_fc[12].* a layer, the config's model has"),
        ({"tied": True}, r"embed\.weight, or has it twice, .*is model\.tied false in truth"),
        ({"qk_norm": True}, r"has no blocks\.0\.attn\.q_norm\.weight"),
        ({"mlp": "gelu_tanh"}, r"linear_fc1"),
        ({"vocab": 400}, r"word_embeddings"),
        ({"kv_heads": 4}, r"linear_qkv\.weight is of shape"),
        ({"windows": [16]}, r"model\.windows: Megatron-core's dense GPT has nothing like it"),
    ],
)
def test_a_model_of_another_shape_is_told_where(exported, change, message):
    folder, model = exported
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        find_weights(folder, ModelConfig.model_validate(model.model_dump(exclude_unset=True) | change))


def test_what_no_shape_tells_is_told_by_our_own_export(exported):
    folder, model = exported
    other = ModelConfig.model_validate(model.model_dump(exclude_unset=True) | {"norm_eps": 1e-6})
    with pytest.raises(CheckpointError, match=r"config\.json: norm_eps = 1e-05, the run has model\.norm_eps = 1e-06"):
        find_weights(folder, other)
    (folder / "config.json").unlink()
    assert find_weights(folder, other)
    assert "norm_eps=1e-06" in unverifiable_settings(other)


def test_what_is_no_checkpoint_of_its_is_told(exported, tmp_path):
    folder, model = exported
    with pytest.raises(CheckpointError, match=r"no checkpoint of Megatron-core"):
        find_weights(tmp_path, model)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match=r"is no iteration"):
        find_weights(folder.parent, model)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match=r"sharded_backend 'zarr': only torch_dist is read"):
        find_weights(folder, model)


def test_a_run_that_megatron_cannot_be_and_a_damaged_one_are_not_exported(dataset, tmp_path):
    config = run_config(dataset, tmp_path, model={**TINY_MODEL, "block": "parallel"})
    begin_run(config, weighted(config.model)[1], source="a test")
    with pytest.raises(CheckpointError, match=r'model\.block = "parallel": Megatron-core'):
        export_megatron(open_committed(config.run.path), tmp_path / "out")
    step = RunFolder(config.run.path).checkpoints / "step-00000000"
    with next(step.glob("*.safetensors")).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(CheckpointError, match="altered"):
        open_committed(step)
    assert not (tmp_path / "out").exists()


def test_neither_way_imports_megatron(exported):
    check = (
        "import sys\nfrom pathlib import Path\n"
        "import mikoshi.trainer.interop.megatron.export, mikoshi.trainer.interop.megatron.torch_dist as m\n"
        "from mikoshi.trainer.model.config import ModelConfig\n"
        f"m.find_weights(Path({str(exported[0])!r}), ModelConfig.model_validate({TINY_MODEL!r}))('norm.weight')\n"
        "sys.exit('megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
