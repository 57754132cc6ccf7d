"""Small runs for tests: a config and a dataset of real text that train in a second."""

from pathlib import Path

import torch
import torch.distributed as dist

from mikoshi.data.prepare.prepare import Recipe, prepare
from mikoshi.data.sources.text import SourceSpec
from mikoshi.parallel.sharding import local, local_region
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.feed.feed import open_feed

VOCAB = 384

TINY_MODEL = {"vocab": VOCAB, "context": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}
GPT2_MODEL = {
    "vocab": VOCAB, "context": 64, "layers": 2, "width": 32, "heads": 4, "position": "learned", "norm": "layernorm",
    "mlp": "gelu_tanh", "bias": True, "tied": True,
}  # fmt: skip


def text_folder(folder: Path) -> Path:
    """Some hundred kilobytes of real text: modules of the standard library."""
    import email
    import json

    folder.mkdir(parents=True)
    for package in (json, email):
        for path in sorted(Path(package.__file__).parent.glob("*.py")):
            (folder / f"{package.__name__}_{path.name}").write_text(path.read_text())
    return folder


def make_dataset(folder: Path) -> Path:
    prepare(Recipe(SourceSpec(str(text_folder(folder / "text"))), vocab=VOCAB, held_out=0.1), folder / "dataset")
    return folder / "dataset"


def make_conversations(folder: Path) -> Path:
    """Questions of unlike length, which are read, and short answers, which are learned."""
    import json

    folder.mkdir(parents=True)
    lines = [line.strip() for path in sorted(text_folder(folder / "text").iterdir()) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line]
    with (folder / "chat.jsonl").open("w") as out:
        for n in range(0, 900, 6):
            question, answer = " ".join(lines[n : n + 1 + n % 5]), lines[n + 5][: 4 + n % 40]
            out.write(json.dumps({"prompt": question[: 10 + n % 150], "response": answer}) + "\n")
    prepare(Recipe(SourceSpec(str(folder / "chat.jsonl"), chat="chatml"), vocab=VOCAB, held_out=0.2), folder / "dataset")
    return folder / "dataset"


def run_config(dataset: Path, folder: Path, **sections) -> RunConfig:
    plain = {
        "run": {"name": "test", "folder": folder},
        "model": TINY_MODEL,
        "data": {"path": str(dataset)},
        "train": {"steps": 5, "global_batch": 8, "context": 64},
        "optim": {"lr": 3e-3, "schedule": {"warmup": 2}},
        "engine": {"precision": "fp32"},
    }
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return RunConfig.model_validate(plain)


def data_layout(config: RunConfig, world: int, zero: int):
    """All ranks for data, whatever the config says of ZeRO."""
    parallel = config.parallel.model_copy(update={"zero": zero})
    return layout_of(config.model_copy(update={"parallel": parallel}), world)


def loader_of(config: RunConfig, layout, rank: int):
    """A rank's loader at the beginning of a run."""
    feed = open_feed(config)
    return feed.loader(layout, layout.coordinates(rank), feed.continued(None))


def held_out_of(config: RunConfig, layout, rank: int):
    """A rank's evaluation batches of a lone source."""
    return open_feed(config).evaluation(layout, layout.coordinates(rank))[""]


def engine_and_rows(config: RunConfig):
    """This rank's engine, under the config's own layout of all ranks, and the loader of its rows. Collective."""
    layout = layout_of(config, dist.get_world_size())
    return build_engine(config, layout, torch.device("cpu")), loader_of(config, layout, dist.get_rank())


def figures(config: RunConfig, steps: int):
    """Loss, gradient norm and number of tokens of the first steps of a config, each of which was applied. Collective."""
    engine, loader = engine_and_rows(config)
    results = [engine.step(loader.batch(step), 1e-3) for step in range(steps)]
    assert all(r.applied for r in results)
    return [(r.loss, r.grad_norm, r.tokens) for r in results]


def whole_state(state):
    """The whole tensors of a state dict of pieces, put together from what every rank says it holds, with no help of
    DTensor's own: names of all ranks, each element from some rank that has it. Collective."""
    mine = {name: (tuple(t.shape), *local_region(t), local(t).detach().clone()) for name, t in state.items()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found, filled = {}, {}
    for rank in everyone:
        for name, (shape, offset, size, values) in rank.items():
            into = found.setdefault(name, torch.full(shape, float("nan"), dtype=values.dtype))
            box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
            into[box] = values
            filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))[box] = True
    assert all(f.all() for f in filled.values()), [name for name, f in filled.items() if not f.all()]
    return found
