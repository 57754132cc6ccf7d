"""config.json beside exported weights: the model's shape, as [model] of a run's config has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mikoshi.data.io.atomic import write_file
from mikoshi.trainer.checkpoint.storage.files import opened
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.model.config import ModelConfig

MODEL_FILE = "config.json"
_TYPE = "mikoshi"
_LARGEST = 256 << 20
_SAME_WEIGHTS = ("context", "init_std", "embedding_std", "init_residual_scaled")
"""Keys of a model's config that do not change what its weights compute."""


def write_model(folder: Path, model: ModelConfig) -> None:
    """Write the model's shape into config.json in a folder."""
    shape = {"model_type": _TYPE, **model.model_dump(mode="json", exclude_none=True)}
    write_file(folder / MODEL_FILE, json.dumps(shape, indent=2).encode())


def check_model(folder: Path, model: ModelConfig) -> bool:
    """Whether a folder says which model its weights belong to, and that is `model`.

    False if it does not say. Raises CheckpointError if it names another model.
    """
    if not (folder / MODEL_FILE).exists():
        return False
    stored = read_json(folder / MODEL_FILE)
    if stored.pop("model_type", None) != _TYPE:
        return False
    expected = model.model_dump(mode="json", exclude_none=True)
    for key in {**expected, **stored}:
        if expected.get(key) != stored.get(key) and key not in _SAME_WEIGHTS:
            raise CheckpointError(
                f"{folder / MODEL_FILE}: {key} = {json.dumps(stored.get(key))[:80]}, the run has model.{key} = "
                f"{json.dumps(expected.get(key))[:80]}: import into the config it was made by"
            )
    return True


def unverifiable_settings(model: ModelConfig) -> str:
    """Returns a message with the settings that weights depend on and that names and shapes do not show."""
    settings = [f"heads={model.heads}", f"head_dim={model.d_head}", f'mlp="{model.mlp}"', f"norm_eps={model.norm_eps:g}"]
    if model.position == "rotary":
        settings += [f"rope.{key}={value}" for key, value in model.rope.model_dump(mode="json", exclude_none=True).items()]
    if any(model.windows):
        settings.append(f"windows={list(model.windows)}")
    if model.logit_scale != 1.0:
        settings.append(f"logit_scale={model.logit_scale:g}")
    if model.moe is not None:
        moe = model.moe
        settings += [f"moe.top_k={moe.top_k}", f'moe.router="{moe.router}"', f"moe.normalise={str(moe.normalise).lower()}"]
    return "shapes do not tell these settings of the model, compare them with those the weights are of: " + ", ".join(settings)


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object of at most 256 MiB. Raises CheckpointError."""
    with opened(path) as handle, open(handle, "rb", closefd=False) as file:
        raw = file.read(_LARGEST + 1)
    try:
        if len(raw) > _LARGEST:
            raise ValueError(f"larger than {_LARGEST} bytes")
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise ValueError("not a table")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    return values
