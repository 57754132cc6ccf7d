"""A run resumes from its newest valid checkpoint with the very next sample, and skips the batches that rewinds left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mikoshi.data.loader.resume_state import DataResumePoint, SumOverRanks, TrainingLoader, make_record
from mikoshi.parallel.layout import Layout
from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.parallel.sharding import local
from mikoshi.trainer.checkpoint.agree import all_gather_json, on_first_rank
from mikoshi.trainer.checkpoint.manifest import Manifest
from mikoshi.trainer.checkpoint.restore import load, newest_valid, problem_of
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.config.run import RunConfig, differences, parse_config, to_toml
from mikoshi.trainer.engines.base import Engine
from mikoshi.trainer.errors import USER_ERRORS, CheckpointError, RunError, SpoiledError
from mikoshi.trainer.feed.feed import Feed, open_feed
from mikoshi.trainer.guard.loss_guard import LossGuard, Rewind, abandoned, add_rewind, read_rewinds
from mikoshi.trainer.record.goodput import repetition
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.train.changed_settings import describe_changes, describe_reset_moments, reset_moments

# What makes a run this run: a checkpoint of another value of these cannot be gone on with.
_IDENTITY = ("model.", "run.seed", "train.global_batch", "train.context", "optim.kind")


@dataclass(frozen=True)
class ResumePoint:
    """Where a run continues: after step `start`, with this data and this guard.

    refused: why newer checkpoints were refused. changed: lines about settings that differ from the checkpoint's.
    """

    start: int
    feed: Feed
    loader: TrainingLoader
    continued: DataResumePoint
    guard: LossGuard
    refused: list[str]
    changed: list[str]
    record: Callable[[int], dict[str, Any]]
    """What a checkpoint of a step says beside its tensors. Collective."""

    def positions(self, first: int, stop: int) -> list[int]:
        """Where the batches of steps first..stop-1 (0 is the first) stand in the order of the data: [first, one past]."""
        size = self.loader.global_batch
        ends = self.loader.skips.positions(np.array([first * size, stop * size - 1]))
        return [int(ends[0]), int(ends[1]) + 1]


def resume(
    config: RunConfig, engine: Engine, layout: Layout, rank: int, store: Store, device: torch.device, fresh: bool
) -> ResumePoint:
    """Bring the engine and the data to the newest valid checkpoint. `fresh`: the engine has its initial weights. Collective.
    Raises CheckpointError, DataError or RunError; SpoiledError where there is nothing to bring a used engine to."""
    send_heartbeat("load")
    folder, coordinates = RunFolder(config.run.path), layout.coordinates(rank)
    rewinds = _rewinds(folder)
    on_first_rank(lambda: _remove_abandoned(store, rewinds))
    feed = open_feed(without_rewound(config, rewinds))
    found = newest_valid(store, digests=config.checkpoint.verify == "digests")
    if found is None and not fresh:
        raise SpoiledError(f"{store.address}: no checkpoint is left to go back to: the run begins anew")
    manifest, refused = (None, []) if found is None else (found[1], found[2])
    start = 0 if manifest is None else manifest.step
    with _read_from(store.describe(start) if manifest is not None else "the data"):
        changes, told, data = ({}, [], None) if manifest is None else _checked(config, manifest, folder, store)
        continued = feed.continued(data)
        loader = feed.loader(layout, coordinates, continued)
        guard = LossGuard(config.guard, None if manifest is None else manifest.record.get("guard"))
        if data is not None:
            loader.replay(data["state"], start)

    def record(done: int) -> dict[str, Any]:
        told = make_record(loader, done, feed.identity, continued.history, row_totals(layout, rank, device))
        return {"config": to_toml(config), "data": told, "guard": guard.state()}

    if found is not None and manifest is not None and data is not None:
        state = engine.state()
        anew = reset_moments(state, manifest.tensors)
        load(store, manifest, {name: tensor for name, tensor in state.items() if name not in anew})
        for name in anew:
            local(state[name]).zero_()
        engine.load_state(state)
        told += [describe_reset_moments(anew)] if anew else []
        told += [f"changed since step {start}: {what}" for what in continued.changes if not what.startswith("data.skip")]
        all_gather_json(None)  # none still reads what was fetched from afar
        store.release()
        changed = {key: {"was": before, "now": now} for key, (before, now) in changes.items()}
        on_first_rank(
            lambda: folder.event(
                "resume",
                step=start,
                refused=refused,
                changed=changed,
                data=list(continued.changes),
                **repetition(folder, start),
            )
        )
    return ResumePoint(start, feed, loader, continued, guard, refused, told, record)


@contextlib.contextmanager
def _read_from(where: str) -> Iterator[None]:
    """What a record says is another's word: where it is not of the shape that it should be, it is refused by name."""
    try:
        yield
    except USER_ERRORS:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{where}: its record of the run cannot be read ({type(error).__name__}: {error}): it was altered, or made by "
            "another version: remove it, or give another run.name"
        ) from error


def _checked(
    config: RunConfig, manifest: Manifest, folder: RunFolder, store: Store
) -> tuple[dict[str, tuple[Any, Any]], list[str], dict[str, Any]]:
    """What has changed since a checkpoint, the same in words, and its record of the data. Raises CheckpointError where it is
    of another run."""
    where = store.describe(manifest.step)
    if manifest.step > config.train.steps:
        raise CheckpointError(
            f"train.steps = {config.train.steps}: the run at {folder.path} is at step {manifest.step} already: "
            "raise train.steps, or give another run.name"
        )
    saved = parse_config(manifest.record["config"], where)
    changes = differences(saved, config)
    if "run.name" in changes and config.checkpoint.folder:
        raise CheckpointError(
            f"checkpoint.folder = {config.checkpoint.folder}: holds the checkpoints of the run {changes['run.name'][0]!r}: "
            "give every run a folder of its own"
        )
    for key, (before, now) in changes.items():
        if key.startswith(_IDENTITY):
            raise CheckpointError(
                f"{key} = {now}: the run at {folder.path} was begun with {before}: set it back, or give another run.name"
            )
    data = manifest.record.get("data")
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: does not say how its data goes on: another version wrote it; give another run.name")
    return changes, describe_changes(saved, config, changes, manifest.step), data


def _rewinds(folder: RunFolder) -> list[Rewind]:
    """As rank 0 reads them."""
    told = on_first_rank(lambda: [[r.at, r.to, *r.span] for r in read_rewinds(folder.rewinds)])
    return [Rewind(at, to, (first, stop)) for at, to, first, stop in told]


def without_rewound(config: RunConfig, rewinds: list[Rewind]) -> RunConfig:
    """The config that also skips the batches which earlier rewinds left out."""
    spans = (*config.data.skip, *(rewind.span for rewind in rewinds))
    return config.model_copy(update={"data": config.data.model_copy(update={"skip": spans})})


def _remove_abandoned(store: Store, rewinds: list[Rewind]) -> None:
    """Remove checkpoints of a history that the run has gone back before: a kill came in between."""
    for step in store.steps() if rewinds else []:
        try:
            left = abandoned(rewinds, step, read_manifest(store, step).record["data"]["skipped"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue  # damaged or altered: told as such when it is gone on with
        if left:
            store.remove(step)


def rewind(config: RunConfig, point: ResumePoint, done: int, store: Store) -> bool:
    """Rewind the run to before the batch of step `done`, whose loss spiked. Collective.

    The next `resume` continues from the newest regular checkpoint at least guard.rewind steps earlier and skips the batches in
    between; the choice does not depend on earlier restarts. Returns False where there is no such checkpoint. No save may be in
    progress. Raises RunError where the run has used up guard.rewinds.
    """
    send_heartbeat("load")
    folder, asked, every = RunFolder(config.run.path), config.guard, config.checkpoint.regular
    rewinds = _rewinds(folder)
    if len(rewinds) >= asked.rewinds:
        raise RunError(
            f"step {done}: the loss spiked again after the run has gone back {len(rewinds)} times (guard.rewinds): lower "
            "optim.lr, or look at the batches that its events name"
        )
    early = [step for step in on_first_rank(store.steps) if step <= done - asked.rewind and step % every == 0]
    to = next((step for step in early if problem_of(store, step) is None), None)
    if to is None:
        return False
    first, stop = point.positions(to, done + asked.skip)

    def leave() -> None:
        add_rewind(folder.rewinds, Rewind(done, to, (first, stop)))  # first: a kill from here on goes back all the same
        for step in store.steps():
            if step > to:
                store.remove(step)
        folder.event("rewind", step=done, to=to, skipped=[first, stop])

    on_first_rank(leave)
    return True


def row_totals(layout: Layout, rank: int, device: torch.device) -> SumOverRanks:
    """A function that sums row counts over the ranks; ranks that read the same rows count once. Collective."""
    coordinates = layout.coordinates(rank)
    counts = coordinates.tp == coordinates.cp == coordinates.pp == 0

    def total(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        mine = torch.from_numpy(numbers if counts else np.zeros_like(numbers)).to(device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(mine)
        told: npt.NDArray[np.int64] = mine.cpu().numpy()
        return told

    return total
