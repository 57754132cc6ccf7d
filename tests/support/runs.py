"""Small runs for tests: a config and a dataset of real text that train in a second."""

from pathlib import Path

from data.prepare import Recipe, prepare
from trainer.config import RunConfig

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
    prepare(Recipe(str(text_folder(folder / "text")), vocab=VOCAB, held_out=0.1), folder / "dataset")
    return folder / "dataset"


def run_config(dataset: Path, folder: Path, **sections) -> RunConfig:
    plain = {
        "run": {"name": "test", "folder": folder},
        "model": TINY_MODEL,
        "data": {"path": dataset},
        "train": {"steps": 5, "global_batch": 8, "context": 64},
        "optim": {"lr": 3e-3, "schedule": {"warmup": 2}},
    }
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return RunConfig.model_validate(plain)
