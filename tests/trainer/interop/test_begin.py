"""A run that begins with given weights: its first loss is theirs, in any layout, and nothing is left of one that cannot be."""

import resource

import pytest
import torch
import torch.distributed as dist

from layouts import degrees
from mikoshi.data.errors import DataError
from mikoshi.parallel.process.process_group import World
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.verify import steps_in
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.errors import CheckpointError, RunError
from mikoshi.trainer.interop.begin import begin_run, expected_state
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.train.loop import fit
from runs import GPT2_MODEL, TINY_MODEL, engine_and_rows, loader_of, run_config

MOE = {**TINY_MODEL, "moe": {"experts": 4, "top_k": 2, "router": "sigmoid", "bias_rate": 0.01}}


def config_of(dataset, folder, model=GPT2_MODEL, **sections):
    return run_config(dataset, folder / "runs", model=model, log={"tensorboard": False}, **sections)


def given(config):
    """A model of the config's shape with weights of its own, and these."""
    torch.manual_seed(5)
    model = GPT(config.model)
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}


def first_loss(config, model):
    """Of the first batch of the run's data, by the plain model."""
    rows = loader_of(config, layout_of(config, 1), 0).batch(0)
    arrays = (rows.tokens, rows.labels, rows.docs, rows.positions)
    with torch.no_grad():
        loss = model(*(None if a is None else torch.from_numpy(a) for a in arrays))
    return float(loss) / int((rows.labels >= 0).sum())


def train(config):
    fit(config, World(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))


def names_of_state(config):
    engine, _ = engine_and_rows(config)
    return {name: (tuple(t.shape), t.dtype) for name, t in engine.state().items()}


@pytest.mark.parametrize("layout", ["", "tp=2", "zero=3", "pp=2"])
def test_the_first_loss_is_that_of_the_given_weights_in_any_layout(ranks, dataset, tmp_path, layout):
    config = config_of(dataset, tmp_path, parallel=degrees(layout), train={"steps": 2})
    model, weights = given(config)
    begin_run(config, weights, source="a test")
    ranks.run(train, config, world=2 if layout else 1)
    losses = [r["loss"] for r in read_jsonl(RunFolder(config.run.path).metrics) if "loss" in r]
    assert losses[0] == pytest.approx(first_loss(config_of(dataset, tmp_path), model), rel=1e-6)
    assert len(losses) == 2
    assert losses[1] != losses[0]


@pytest.mark.parametrize("model", [GPT2_MODEL, TINY_MODEL, MOE], ids=["gpt2", "llama", "experts"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_is_what_the_engine_itself_has(ranks, dataset, tmp_path, model, kind):
    config = config_of(dataset, tmp_path, model, optim={"kind": kind})
    (own,) = ranks.run(names_of_state, config, world=1)
    assert {name: (tuple(t.shape), t.dtype) for name, t in expected_state(config).items()} == own


def test_what_is_committed_is_what_was_given_with_the_run_beside_it(dataset, tmp_path):
    config = config_of(dataset, tmp_path)
    _, weights = given(config)
    halves = {name: w.bfloat16() for name, w in weights.items()}
    moments = {name.removeprefix("optim."): torch.full(t.shape, 0.5) for name, t in expected_state(config).items()}
    where = begin_run(config, halves.__getitem__, moments, source="some file")
    found, manifest, refused = newest_valid(RunFolder(config.run.path).checkpoints)
    assert (str(found), manifest.step, refused) == (where, 0, [])
    state = {name: torch.zeros(entry["shape"]) for name, entry in manifest.tensors.items()}
    load(found, manifest, state)
    for name, tensor in state.items():
        kind, _, rest = name.partition(".")
        assert torch.equal(tensor, halves[rest].float() if kind == "model" else torch.full(tensor.shape, 0.5)), name
    assert load_config(config.run.path) == config
    assert RunFolder(config.run.path).tokenizer.exists()
    assert [(e["event"], e["source"]) for e in read_jsonl(RunFolder(config.run.path).events)] == [("import", "some file")]


def test_a_run_that_has_checkpoints_is_left_alone(dataset, tmp_path):
    config = config_of(dataset, tmp_path)
    _, weights = given(config)
    begin_run(config, weights, source="a test")
    with pytest.raises(CheckpointError, match=r"has checkpoints already, the newest of step 0: give another run\.name"):
        begin_run(config, weights, source="a test")
    other = config_of(dataset, tmp_path, run={"name": "other"})
    RunFolder(other.run.path).make()
    with RunFolder(other.run.path).lock(), pytest.raises(RunError, match="another process"):
        begin_run(other, weights, source="a test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.bias"), r"in\.file: it has no norm\.bias"),
        (lambda w: w.update({"norm.bias": torch.zeros(31)}), r"in\.file: norm\.bias is of shape \[31\], .*has \[32\]"),
        (lambda w: w.update({"norm.bias": torch.zeros(32, dtype=torch.int32)}), r"in\.file: norm\.bias is int32"),
    ],
)
def test_weights_of_another_model_leave_nothing(dataset, tmp_path, change, message):
    config = config_of(dataset, tmp_path)
    _, weights = given(config)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        begin_run(config, weights, source="in.file")
    folder = RunFolder(config.run.path)
    assert steps_in(folder.checkpoints) == []
    assert not list(folder.checkpoints.iterdir()), "nor a partial one"
    assert not folder.config.exists()


def test_without_data_nothing_is_made(tmp_path):
    config = config_of(tmp_path / "none", tmp_path)
    with pytest.raises(DataError):
        begin_run(config, {}, source="a test")
    assert not config.run.path.exists()


def test_one_tensor_is_in_memory_at_a_time(ranks, dataset, tmp_path):
    """In a process of its own: a gigabyte of weights and moments goes through less than a third of that."""
    model = {**TINY_MODEL, "layers": 20, "width": 512, "mlp_width": 2048}
    config = config_of(dataset, tmp_path, model)
    (grown, size), *_ = ranks.run(begin_large, config, world=1)
    assert size > 900e6
    assert grown < size / 3


def begin_large(config):
    shapes = {name.removeprefix("model."): t.shape for name, t in expected_state(config).items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin_run(config, lambda name: torch.zeros(shapes[name]), source="a test")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    _, manifest, _ = newest_valid(RunFolder(config.run.path).checkpoints)
    return grown, sum(entry["size"] for entry in manifest.files.values())
