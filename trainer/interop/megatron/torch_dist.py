"""Megatron-core's torch_dist checkpoints, in and out: weights to begin a run with, and a run's weights for Megatron.

    FOLDER/latest_checkpointed_iteration.txt
    FOLDER/iter_0000100/    metadata.json, common.pt, .metadata and *.distcp (interop.dcp); ours also have config.json

Neither way needs Megatron-core, a GPU or more memory than a layer and the embedding take. Nothing that is read is executed:
common.pt and the state of the optimizer and the random generators are not opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mikoshi.trainer.engines.megatron.names import rows_of
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.interop.dcp import METADATA, DCPFolder, open_folder
from mikoshi.trainer.interop.model_file import check_model
from mikoshi.trainer.model.config import ModelConfig
from mikoshi.trainer.model.gpt import GPT

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"
EMBEDDING = "embedding.word_embeddings.weight"
VOCABULARY = (EMBEDDING, "output_layer.weight")
"""Parameters with one row a token. Megatron-LM pads them with unused rows until their number divides evenly."""

LAYERS = "decoder.layers."
_GATED = re.compile(r"(.*\.mlp\.linear_fc1\.(?:weight|bias))_([wv])")


def unsupported_settings(model: ModelConfig) -> list[str]:
    """Returns the settings of a model that Megatron's dense GPT cannot represent, by key."""
    found = [
        ("model.moe", model.moe is not None),
        (f'model.position = "{model.position}"', model.position == "alibi"),
        ('model.norm_order = "post"', model.norm_order == "post"),
        ('model.block = "parallel"', model.block == "parallel"),
        ("model.embedding_norm", model.embedding_norm),
        ("model.bias without model.qkv_bias", model.bias and not model.bias_qkv),
        (f"model.logit_scale = {model.logit_scale:g}", model.logit_scale != 1.0),
        ("model.windows", any(model.windows)),
        ("LayerNorm without a bias (model.bias = false)", model.norm == "layernorm" and not model.bias),
        ("model.qk_norm beside LayerNorm", model.qk_norm and model.norm == "layernorm"),
    ]
    return [key for key, is_so in found if is_so]


def check_supported(model: ModelConfig) -> None:
    """Raises CheckpointError for a model that Megatron's dense GPT cannot represent."""
    if keys := unsupported_settings(model):
        raise CheckpointError(
            f"{', '.join(keys)}: Megatron-core's dense GPT has nothing like it: exchange the weights as safetensors"
        )


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns our parameters and their shapes."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(model).named_parameters()}


@dataclass(frozen=True)
class _Run:
    """Rows of a stored tensor that are rows of ours, from `first` on. layer: where layers are stacked, its number there."""

    first: int
    count: int
    stored: str
    layer: int | None
    at: int


@dataclass(frozen=True)
class TorchDistWeights:
    """The weights in a torch_dist folder under our names.

    padding: rows that its vocabulary has beyond the model's.
    """

    source: Path
    padding: int
    _folder: DCPFolder
    _shapes: dict[str, tuple[int, ...]]
    _runs: dict[str, list[_Run]]

    def __call__(self, name: str) -> Tensor:
        """Returns a parameter, whole. Raises KeyError for an unknown name, CheckpointError for a damaged file."""
        shape = self._shapes[name]
        return torch.cat([self._rows(run, shape[1:]) for run in self._runs[name]])

    def _rows(self, run: _Run, row: tuple[int, ...]) -> Tensor:
        stacked = run.layer is not None
        offset = (*((run.layer or 0,) if stacked else ()), run.at, *(0 for _ in row))
        rows = self._folder.read(run.stored, offset, (*((1,) if stacked else ()), run.count, *row))
        return rows[0] if stacked else rows


def find_weights(place: Path, model: ModelConfig) -> TorchDistWeights:
    """Returns the weights of a torch_dist checkpoint, in every form that Megatron-core has written.

    Layers may be stacked in one tensor or separate, gate and up projection in one tensor or two, names with a prefix or
    without. Raises CheckpointError, with the file or the parameter, for a folder that is not one, is damaged or unsafe, or
    has another model's shape.

    place: the folder of an iteration, or of several, of which the latest is taken.
    """
    check_supported(model)
    path = _iteration(place)
    check_model(path, model)
    folder = open_folder(path)
    prefix = _prefix(path, folder)
    shapes = shapes_of(model)
    runs: dict[str, list[_Run]] = {name: [] for name in shapes}
    padding = 0
    for stored in sorted(name for name in folder.tensors if name.startswith(prefix)):
        if stored.startswith(prefix + "optimizer.") or not _is_weight(stored.removeprefix(prefix)):
            continue
        for name, layer in _parameters(stored.removeprefix(prefix), folder.tensors[stored].shape, model, path):
            more = _add(runs, shapes, folder.tensors[stored].shape, stored, name, layer, model, path)
            padding = max(padding, more)
    _check_complete(runs, shapes, path)
    return TorchDistWeights(path, padding, folder, shapes, runs)


def _iteration(place: Path) -> Path:
    """Returns the folder of the iteration to read, checked to be in the torch_dist format."""
    path, tracker = place, place / TRACKER
    if tracker.is_file() and not (place / METADATA).exists():
        name = tracker.read_bytes()[:40].decode("ascii", "replace").strip()
        if name != "release" and not re.fullmatch(r"\d{1,12}", name):
            raise CheckpointError(f"{tracker}: {name!r} is no iteration: give the folder of one")
        path = place / ("release" if name == "release" else f"iter_{int(name):07d}")
    try:
        config = json.loads((path / CONFIG).read_bytes()[: 1 << 16])
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: no checkpoint of Megatron-core: it has no {CONFIG} that can be read: give a folder with {TRACKER}, or "
            "that of an iteration"
        ) from None
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path / CONFIG}: sharded_backend {str(backend)[:40]!r}: only torch_dist is read: save it with "
            "--ckpt-format torch_dist"
        )
    return path


def _prefix(path: Path, folder: DCPFolder) -> str:
    """Returns what stands before every weight's name: nothing, or what a wrapper adds ("module.")."""
    found = {name.removesuffix(EMBEDDING) for name in folder.tensors if name.endswith(EMBEDDING)}
    plain = sorted(prefix for prefix in found if not prefix.startswith(("optimizer.", "chained_")))
    if len(plain) != 1:
        problem = f"several models: {', '.join(plain)[:200]}" if plain else f"no {EMBEDDING}"
        raise CheckpointError(f"{path / METADATA}: {problem}: only the checkpoint of one GPT is read")
    return plain[0]


def _is_weight(name: str) -> bool:
    return name.startswith(("embedding.", "decoder.", "output_layer.")) and "_extra_state" not in name


def _parameters(stored: str, shape: tuple[int, ...], model: ModelConfig, path: Path) -> Iterable[tuple[str, int | None]]:
    """Megatron's parameters that a stored tensor is: itself, or those of all layers, each with its number in it."""
    rest = stored.removeprefix(LAYERS)
    if rest == stored or rest.split(".")[0].isdigit():
        return [(stored, None)]
    if shape[:1] != (model.layers,):
        layers = shape[0] if shape else 0
        raise CheckpointError(f"{path / METADATA}: {stored} is of {layers} layers, the config's model has {model.layers}")
    return [(f"{LAYERS}{layer}.{rest}", layer) for layer in range(model.layers)]


def _add(
    runs: dict[str, list[_Run]], shapes: dict[str, tuple[int, ...]], shape: tuple[int, ...], stored: str, name: str,
    layer: int | None, model: ModelConfig, path: Path,
) -> int:  # fmt: skip
    """Enter the rows of a parameter under our names; returns how many it has too many, for padding. Raises CheckpointError
    for one that is not the model's."""
    half = _GATED.fullmatch(name)
    try:
        rows = rows_of(half[1] if half else name, model)
    except KeyError:
        raise CheckpointError(f"{path / METADATA}: {stored}: the config's model has nothing like it") from None
    if half:
        rows = (rows["wv".index(half[2])],) if len(rows) == 2 else ()
    unknown = [run.name for run in rows if run.name not in shapes]
    if unknown or not rows:
        raise CheckpointError(f"{path / METADATA}: {stored}: the config's model has no {(unknown or [name])[0]}")
    own = shape[1:] if layer is not None else shape
    wanted = (sum(run.count for run in rows), *shapes[rows[0].name][1:])
    padding = own[0] - wanted[0] if own and name in VOCABULARY and own[0] >= wanted[0] and own[1:] == wanted[1:] else 0
    if own != wanted and not padding:
        raise CheckpointError(
            f"{path / METADATA}: {stored} is of shape {list(own)}{'' if layer is None else ' a layer'}, the config's model has "
            f"{list(wanted)} ({rows[0].name}): import into a config of its shape"
        )
    at = 0
    for run in rows:
        runs[run.name].append(_Run(run.first, run.count, stored, layer, at))
        at += run.count
    return padding


def _check_complete(runs: dict[str, list[_Run]], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises CheckpointError unless every row of every parameter of ours is there once; sorts the runs of each."""
    for name, found in runs.items():
        found.sort(key=lambda run: run.first)
        ends = [0, *(run.first + run.count for run in found)]
        if [run.first for run in found] == ends[:-1] and ends[-1] == shapes[name][0]:
            continue
        hint = {"head.weight": ": is it model.tied?", "embed.weight": ": is model.tied false in truth?"}.get(name, "")
        problem = f"has no {name}" if not found else f"does not make up {name}, or has it twice"
        raise CheckpointError(f"{path / METADATA}: {problem}, which the config's model has{hint}")
