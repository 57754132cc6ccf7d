"""Offload to a disk is the same run. DeepSpeed compiles its asynchronous reading and writing for ten CPU-minutes, so this is
run where that has been done: python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()'."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from engines import engine_config, train
from mikoshi.parallel.process.process_group import World
from mikoshi.trainer.train import loop

deepspeed = pytest.importorskip("deepspeed")
# Of this very installation: of another one, it would be compiled again.
RECIPES = Path("~/.cache/torch_extensions").expanduser().glob("*/async_io/build.ninja")
BUILT = any(
    (recipe.parent / "async_io.so").exists() and str(Path(deepspeed.__file__).parent) in recipe.read_text()
    for recipe in RECIPES
)  # fmt: skip
# Pieces above DeepSpeed's smallest for a disk, a megabyte.
LARGE = {"vocab": 8192, "width": 256, "context": 64}


def train_on_disk(config):
    """What `train` finds, and the bytes that were on the disk before its engine was closed."""
    from mikoshi.trainer.engines.deepspeed.engine import DeepSpeedEngine

    built, init = [], DeepSpeedEngine.__init__

    def build(engine, *args):
        built.append(engine)
        init(engine, *args)
        pieces = [p.ds_tensor for _, p in engine.named]
        if config.engine.deepspeed.offload_parameters == "nvme":
            assert any(piece.numel() < piece.ds_numel for piece in pieces), "no parameter is on the disk"

    DeepSpeedEngine.__init__ = build
    try:
        found = train(config)
    finally:
        DeepSpeedEngine.__init__ = init
    swapped = sum(path.stat().st_size for path in config.engine.deepspeed.nvme.rglob("*.swp"))
    dist.barrier()
    built[0].close()
    dist.barrier()
    return (*found, swapped)


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="DeepSpeed's async_io is not built")
@pytest.mark.parametrize("parameters", ["none", "nvme"])
def test_offload_to_a_disk_is_the_same_run(ranks, dataset, tmp_path, parameters):
    (tmp_path / "nvme").mkdir()
    own = {"offload_optimizer": "nvme", "offload_parameters": parameters, "nvme": str(tmp_path / "nvme")}
    if parameters == "nvme":  # else all that fit into a billion elements of memory stay there
        own["settings"] = {"zero_optimization": {"offload_param": {"max_in_cpu": 0}}}
    sections = {"model": LARGE, "train": {"steps": 4}}
    ((initial, steps, _, _, state, _),) = ranks.run(train, engine_config(dataset, tmp_path, "llama", **sections), world=1)
    config = engine_config(dataset, tmp_path, "llama", "deepspeed", "zero=3", engine={"deepspeed": own}, **sections)
    for found in ranks.run(train_on_disk, config, world=2):
        assert found[0] == initial
        for (loss, norm, *_), one in zip(found[1], steps, strict=True):
            assert (loss, norm) == pytest.approx(one[:2], rel=1e-5)
        for name, tensor in found[4].items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-5)
        assert found[-1] > 0, "the disk was used"
    assert list((tmp_path / "nvme").iterdir()) == [], "and is empty again"


def test_a_run_that_ends_in_an_error_closes_its_engine_however_early(monkeypatch, tmp_path):
    closed = []

    def fail(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setattr(loop, "build_engine", lambda *_: SimpleNamespace(close=lambda: closed.append(True)))
    monkeypatch.setattr(loop, "RunLog", fail)
    monkeypatch.setattr(loop, "on_first_rank", lambda _: None)
    with pytest.raises(RuntimeError, match="no more"):
        loop.fit(engine_config("nowhere", tmp_path, "llama"), World(0, 1, 0), torch.device("cpu"))
    assert closed
