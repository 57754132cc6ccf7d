"""fit(): one training run, from the newest valid checkpoint to the last step or the request to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from data.atomic import write_file
from data.record import Continued, Reader, Total, make_record
from data.rows import Batch
from parallel.layout import Layout
from parallel.world import World
from trainer import checkpoint
from trainer.checkpoint import on_first_rank
from trainer.config import RunConfig, differences, parse_config, to_toml
from trainer.console import TrainConsole
from trainer.engines import build_engine
from trainer.engines.base import Engine, StepResult
from trainer.engines.carry import layout_of
from trainer.errors import CheckpointError
from trainer.feed import Feed, open_feed
from trainer.metrics import MetricLog, flops_per_token, memory_bytes, peak_flops
from trainer.optim import learning_rate
from trainer.runfolder import RunFolder, read_jsonl
from trainer.stop import StopRequest

# What makes a run this run: a checkpoint of another value of these cannot be gone on with.
_IDENTITY = ("model.", "run.seed", "train.global_batch", "train.context", "optim.kind")


def fit(config: RunConfig, world: World, device: torch.device) -> bool:
    """Train to the last step; True when it is reached, False when stopped by a signal and saved. Collective.

    Preflight has passed and the process group exists. Raises CheckpointError, DataError, LayoutError or RunError.
    """
    with contextlib.ExitStack() as held:
        on_first_rank(lambda: held.enter_context(RunFolder(config.run.path).lock()) and None)
        return _fit(config, world, device)


def _fit(config: RunConfig, world: World, device: torch.device) -> bool:
    folder, layout, steps = RunFolder(config.run.path), layout_of(config, world.size), config.train.steps
    feed, here = open_feed(config), layout.coordinates(world.rank)
    engine = build_engine(config, layout, device)
    start, loader, continued, refused = resume(config, engine, feed, layout, world.rank, folder)
    log = RunLog(config, folder, layout, device, feed, start, silent=world.rank > 0)
    log.told(start, refused)
    saved = start

    def evaluate(done: int) -> None:
        losses = {name: engine.evaluate(batches) for name, batches in feed.evaluation(layout, here).items()}
        log.evaluation(done, losses, feed.weights(continued, done))

    def record(done: int) -> dict[str, Any]:
        told = make_record(loader, done, feed.identity, continued.history, total_of_rows(layout, world.rank, device))
        return {"config": to_toml(config), "data": told}

    with log.console, StopRequest() as stop:
        if start and config.eval.every and start % config.eval.every == 0 and not log.evaluated(start):
            evaluate(start)  # a stop came first
        batches = loader.stream(start, steps, pinned(device), config.data.prefetch)
        for done, rows in enumerate(batches, start + 1):
            lr = learning_rate(config.optim.lr, config.optim.schedule, done - 1, steps)
            log.begin_step()
            log.step(done, engine.step(rows, lr), lr)
            stopping = stop.agreed() and done < steps
            if done == steps or (config.eval.every and done % config.eval.every == 0 and not stopping):
                evaluate(done)
            if stopping or done == steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                told = record(done)
                path = checkpoint.save(folder.checkpoints, done, engine.state(), told, config.checkpoint.keep)
                log.saved(done, path.name, told["data"]["state"].get("left_out"))
                saved = done
            if stopping:
                log.event("stop", step=done, asked=stop.asked or "another rank")
                break
        log.finish(saved, steps, getattr(loader, "names", []))
    return saved == steps


def pinned(device: torch.device) -> Callable[[Batch], Batch]:
    """What makes a batch ready for its way to the device while the step before it runs: page-locked memory for a GPU."""
    if device.type == "cpu":
        return lambda batch: batch

    def pin(array: Any) -> Any:
        return None if array is None else torch.from_numpy(array).pin_memory().numpy()

    return lambda batch: Batch(pin(batch.tokens), pin(batch.labels), pin(batch.docs), pin(batch.positions))


def total_of_rows(layout: Layout, rank: int, device: torch.device) -> Total:
    """Adds up over the ranks, of which those that read the same rows count once. Collective."""
    here = layout.coordinates(rank)
    counts = here.tp == here.cp == here.pp == 0

    def total(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        mine = torch.from_numpy(numbers if counts else np.zeros_like(numbers)).to(device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(mine)
        told: npt.NDArray[np.int64] = mine.cpu().numpy()
        return told

    return total


def resume(
    config: RunConfig, engine: Engine, feed: Feed, layout: Layout, rank: int, folder: RunFolder
) -> tuple[int, Reader, Continued, list[str]]:
    """Bring the engine and the data to the newest valid checkpoint: its step (0 if there is none), the loader that goes on
    from there, how the data goes on, and why newer checkpoints were refused. Collective."""
    here, found = layout.coordinates(rank), checkpoint.newest_valid(folder.checkpoints)
    if found is None:
        continued = feed.continued(None)
        return 0, feed.loader(layout, here, continued), continued, []
    path, manifest, rejected = found
    if manifest.step > config.train.steps:
        raise CheckpointError(
            f"train.steps = {config.train.steps}: the run at {folder.path} is at step {manifest.step} already: "
            "raise train.steps, or give another run.name"
        )
    changes = differences(parse_config(manifest.record["config"], str(path)), config)
    for key, (before, now) in changes.items():
        if key.startswith(_IDENTITY):
            raise CheckpointError(
                f"{key} = {now}: the run at {folder.path} was begun with {before}: set it back, or give another run.name"
            )
    data = manifest.record.get("data")
    if data is None:
        raise CheckpointError(f"{path}: does not say how its data goes on: another version wrote it; give another run.name")
    continued = feed.continued(data)
    loader = feed.loader(layout, here, continued)
    loader.follow(data["state"], manifest.step)
    state = engine.state()
    checkpoint.load(path, manifest, state)
    engine.load_state(state)
    changed = {key: {"was": before, "now": now} for key, (before, now) in changes.items()}
    on_first_rank(
        lambda: folder.event("resume", step=manifest.step, refused=rejected, changed=changed, data=list(continued.changes))
    )
    return manifest.step, loader, continued, rejected


class RunLog:
    """Everything that a run tells: console, metrics, events. Only rank 0 says and writes anything."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, layout: Layout, device: torch.device, feed: Feed, start: int,
        silent: bool,
    ) -> None:  # fmt: skip
        self.folder, self.device, self.silent = folder, device, silent
        self.console = TrainConsole(config.train.steps, config.log.every, silent)
        self.started = time.perf_counter()
        self.skipped = 0
        self.left_out: dict[str, int] = {}
        if silent:
            return
        write_file(folder.config, to_toml(config).encode())
        feed.tokenizer.save(folder.tokenizer)
        self.metrics = MetricLog(folder, config, start)
        self.flops = flops_per_token(config.model, config.train.context)
        peak = peak_flops(device, config.engine.precision)
        self.peak = peak * layout.world if peak else None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.event(
            "start", step=start, ranks=layout.world, zero=layout.zero, device=name, torch=torch.__version__,
            unigram_nats=feed.unigram_nats,
        )  # fmt: skip
        self.console.say(
            f"{config.run.name}: {feed.told}, {layout.world} rank(s) on {name}, ZeRO {layout.zero}, {config.engine.precision}"
        )

    def told(self, start: int, refused: list[str]) -> None:
        for reason in refused:
            self.console.say(f"checkpoint refused: {reason}")
        if start:
            self.console.say(f"resumed after step {start}")

    def evaluated(self, step: int) -> bool:
        """Whether this step's evaluation is on record. Collective."""
        records = on_first_rank(lambda: [r["step"] for r in read_jsonl(self.folder.metrics) if "eval_loss" in r])
        return step in records

    def begin_step(self) -> None:
        """The batch is here: what passed since the last step's end was waiting for data."""
        self.waited = time.perf_counter() - self.started

    def step(self, done: int, result: StepResult, lr: float) -> None:
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        if self.silent:
            return
        values: dict[str, Any] = {
            "loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "tokens": result.tokens,
            "step_seconds": seconds, "data_seconds": self.waited, "tokens_per_second": result.tokens / seconds,
            "memory_bytes": memory_bytes(self.device), **result.more,
        }  # fmt: skip
        if self.peak:
            values["mfu"] = self.flops * values["tokens_per_second"] / self.peak
        self.metrics.record(done, values)
        self.console.step(done, values)
        if not result.applied:
            self.skipped += 1
            self.event("skip", step=done, why="the gradient norm is not finite")
            self.console.say(f"step {done}: the gradient norm is not finite: no rank changed its weights")

    def evaluation(self, done: int, losses: dict[str, float], weights: dict[str, float]) -> None:
        """Of several sources, the loss that is told is the mean by their weights."""
        self.started = time.perf_counter()
        if self.silent:
            return
        loss = sum(losses[name] * weight for name, weight in weights.items()) / sum(weights.values())
        each = {f"eval_loss.{name}": value for name, value in losses.items() if name}
        self.metrics.record(done, {"eval_loss": loss, **each})
        self.event("eval", step=done, loss=loss)
        parts = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if name)
        self.console.say(f"step {done}: held-out loss {loss:.4f}" + (f" ({parts})" if parts else ""))

    def event(self, kind: str, **fields: Any) -> None:
        self.started = time.perf_counter()
        if not self.silent:
            self.folder.event(kind, **fields)

    def saved(self, done: int, name: str, left_out: dict[str, int] | None) -> None:
        """`left_out`: of a stream, how many documents were used and how many left out by reason."""
        self.left_out = left_out or {}
        self.event("save", step=done, path=name, **({"documents": left_out} if left_out else {}))

    def finish(self, saved: int, steps: int, unreadable: list[str]) -> None:
        if not self.silent:
            self.metrics.close()
            self.event("end", step=saved, finished=saved == steps)
            done = f"finished {steps} steps" if saved == steps else f"stopped and saved after step {saved} of {steps}"
            self.console.say(f"{done}: {self.folder.path}")
            if self.left_out.get("unreadable"):
                told = ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
                self.console.say(f"warning: documents of the stream that cannot be read were left out ({told})")
                for name in unreadable[:5]:
                    self.console.say(f"  {name}")
            if self.skipped:
                self.console.say(f"warning: {self.skipped} step(s) changed nothing: the gradient norm was not finite")
