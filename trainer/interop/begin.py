"""Starts a run with weights from elsewhere: writes a committed checkpoint of step 0, from which `mikoshi train` continues.

One process does it with one tensor in memory at a time, so a model may be larger than the host's memory. Any layout and
engine continues from it, at the beginning of the run's data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mikoshi.data.io.atomic import write_file
from mikoshi.data.loader.resume_state import make_record
from mikoshi.trainer.checkpoint.manifest import FileEntry, Manifest, encode, provenance
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.checkpoint.pieces import bytes_of, write
from mikoshi.trainer.checkpoint.plan import plan_save
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.config.run import RunConfig, to_toml
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.optim import Optimizers
from mikoshi.trainer.errors import CheckpointError
from mikoshi.trainer.feed.feed import Feed, open_feed
from mikoshi.trainer.generation.generate import forward_config
from mikoshi.trainer.guard.loss_guard import LossGuard
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.record.run_folder import RunFolder

Weights = Callable[[str], Tensor] | Mapping[str, Tensor]
"""Whole tensors by canonical name, of any floating dtype. Each is read once."""


def begin_run(config: RunConfig, weights: Weights, optimizer: Weights | None = None, *, source: str) -> str:
    """Write the checkpoint of step 0 of the run that `config` describes; returns its path or URL.

    Raises CheckpointError if the run has checkpoints already or a tensor is missing or has another shape, and then leaves
    nothing; DataError if the run's data is missing; RunError while the run trains.

    weights: such as `blocks.0.attn.q.weight`.
    optimizer: such as `blocks.0.attn.q.weight.exp_avg`; None means zeros, as at the beginning of a run.
    source: where they come from, for messages and the run's events.
    """
    feed, folder = open_feed(config), RunFolder(config.run.path)
    folder.make()
    store = checkpoints_of(folder, config)
    with folder.lock(patience=0):
        if steps := store.steps():
            raise CheckpointError(
                f"{store.address}: the run has checkpoints already, the newest of step {steps[0]}: give another run.name"
            )
        state = expected_state(config)
        record = {"step": 0, "config": to_toml(config), "data": data_record(config, feed)}
        record["guard"] = LossGuard(config.guard, None).state()
        _write(store, state, _reader(weights, optimizer, source), record)
        write_file(folder.config, to_toml(config).encode())
        feed.tokenizer.save(folder.tokenizer)
        folder.event("import", step=0, source=source, optimizer=optimizer is not None)
    return store.describe(0)


def expected_state(config: RunConfig) -> dict[str, Tensor]:
    """Returns every tensor of a run's checkpoint under its canonical name, whole, on the meta device."""
    with FakeTensorMode():
        model = GPT(config.model)
        named = list(model.named_parameters())
        state = {**{f"model.{name}": p for name, p in named}, **dict(Optimizers(named, config.optim).state())}
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def data_record(config: RunConfig, feed: Feed) -> dict[str, Any]:
    """How the data of a run go on from its beginning."""
    layout = layout_of(forward_config(config, {"tp": 1, "pp": 1}, 1), 1)  # the record is the same in any
    continued = feed.continued(None)
    loader = feed.loader(layout, layout.coordinates(0), continued)
    return make_record(loader, 0, feed.identity, continued.history, lambda numbers: numbers)


def _reader(weights: Weights, optimizer: Weights | None, source: str) -> Callable[[str, Tensor], Tensor]:
    """Returns the function that reads a tensor of the state. It raises CheckpointError if the tensor does not fit."""

    def look_up(tensors: Weights, name: str) -> Tensor:
        try:
            return tensors(name) if callable(tensors) else tensors[name]
        except KeyError:
            raise CheckpointError(f"{source}: it has no {name}: import into the config it was made by") from None

    def read(name: str, like: Tensor) -> Tensor:
        kind, _, rest = name.partition(".")
        if kind == "optim" and optimizer is None:
            return torch.zeros(like.shape, dtype=like.dtype)
        tensor = look_up(weights if kind == "model" or optimizer is None else optimizer, rest)
        if tensor.shape != like.shape:
            raise CheckpointError(
                f"{source}: {rest} is of shape {list(tensor.shape)}, the config's model has {list(like.shape)}: import into "
                "the config it was made by"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {rest} is {str(tensor.dtype).removeprefix('torch.')}, not floating point")
        return tensor.to(like.dtype)

    return read


def _write(store: Store, state: dict[str, Tensor], read: Callable[[str, Tensor], Tensor], record: dict[str, Any]) -> None:
    """Write step 0: committed, or not there."""
    share = plan_save(state)
    store.begin(0)
    try:
        files: dict[str, FileEntry] = {}
        for file in share.files:
            parts = (bytes_of(read(box.name, state[box.name])) for box in file.boxes)
            with store.create(0, file.contents.name) as out:
                digests = write(out, file.contents.header, parts, threading.Event())
            files[file.contents.name] = {"size": len(file.contents.header) + file.contents.bytes, **digests}
        store.commit(0, encode(Manifest(record, files, share.tensors, provenance(record, 1))))
    except BaseException:
        store.abandon(0)
        raise
