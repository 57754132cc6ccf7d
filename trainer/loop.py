"""fit(): one training run, from the newest valid checkpoint to the last step or the request to stop."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from data.atomic import write_file
from data.loader import Loader, evaluation_batches, open_split
from data.prepare import HELD_OUT, TRAIN
from data.shards import TOKENIZER, DatasetInfo
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
from trainer.metrics import MetricLog, flops_per_token, memory_bytes, peak_flops
from trainer.optim import learning_rate
from trainer.runfolder import RunFolder, read_jsonl
from trainer.stop import StopRequest

# What makes a run this run: a checkpoint of another value of these cannot be gone on with.
_IDENTITY = ("model.", "run.seed", "train.global_batch", "train.context", "data.document_mask", "optim.kind")


def fit(config: RunConfig, world: World, device: torch.device) -> bool:
    """Train to the last step; True when it is reached, False when stopped by a signal and saved. Collective.

    Preflight has passed and the process group exists. Raises CheckpointError, DataError, LayoutError or RunError.
    """
    with contextlib.ExitStack() as held:
        on_first_rank(lambda: held.enter_context(RunFolder(config.run.path).lock()) and None)
        return _fit(config, world, device)


def _fit(config: RunConfig, world: World, device: torch.device) -> bool:
    folder, layout, steps = RunFolder(config.run.path), layout_of(config, world.size), config.train.steps
    split, info = open_split(config.data.path, TRAIN, config.train.context)
    held_out, _ = open_split(config.data.path, HELD_OUT, config.train.context)
    mask, batch = config.data.document_mask, config.train.global_batch
    data_rank = layout.coordinates(world.rank).data
    loader = Loader(split, config.run.seed, batch, data_rank, layout.data_ranks, mask)
    engine = build_engine(config, layout, device)
    start, refused = resume(config, engine, info, folder)
    log = RunLog(config, folder, layout, device, info, start, silent=world.rank > 0)
    log.told(start, refused)
    saved = start

    def evaluate(done: int) -> None:
        batches = evaluation_batches(held_out, batch, config.eval.batches, data_rank, layout.data_ranks, mask)
        log.evaluation(done, engine.evaluate(batches))

    with log.console, StopRequest() as stop:
        if start and config.eval.every and start % config.eval.every == 0 and not log.evaluated(start):
            evaluate(start)  # a stop came first
        for done, rows in enumerate(loader.stream(start, steps), start + 1):
            lr = learning_rate(config.optim.lr, config.optim.schedule, done - 1, steps)
            log.begin_step()
            log.step(done, engine.step(rows, lr), lr)
            stopping = stop.agreed() and done < steps
            if done == steps or (config.eval.every and done % config.eval.every == 0 and not stopping):
                evaluate(done)
            if stopping or done == steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                record = {"config": to_toml(config), "fingerprint": info.fingerprint, "samples": done * batch}
                path = checkpoint.save(folder.checkpoints, done, engine.state(), record, config.checkpoint.keep)
                log.event("save", step=done, path=path.name)
                saved = done
            if stopping:
                log.event("stop", step=done, asked=stop.asked or "another rank")
                break
        log.finish(saved, steps)
    return saved == steps


def resume(config: RunConfig, engine: Engine, info: DatasetInfo, folder: RunFolder) -> tuple[int, list[str]]:
    """Bring the engine to the newest valid checkpoint; its step (0 if there is none) and why newer ones were refused.
    Collective."""
    found = checkpoint.newest_valid(folder.checkpoints)
    if found is None:
        return 0, []
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
    if manifest.record["fingerprint"] != info.fingerprint:
        raise CheckpointError(
            f"data.path: the data at {config.data.path} is not what the run at {folder.path} was begun with "
            f"(fingerprint {info.fingerprint[:12]}, was {manifest.record['fingerprint'][:12]}): give another run.name"
        )
    state = engine.state()
    checkpoint.load(path, manifest, state)
    engine.load_state(state)
    changed = {key: {"was": before, "now": now} for key, (before, now) in changes.items()}
    on_first_rank(lambda: folder.event("resume", step=manifest.step, refused=rejected, changed=changed))
    return manifest.step, rejected


class RunLog:
    """Everything that a run tells: console, metrics, events. Only rank 0 says and writes anything."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, layout: Layout, device: torch.device, info: DatasetInfo, start: int,
        silent: bool,
    ) -> None:  # fmt: skip
        self.folder, self.device, self.silent = folder, device, silent
        self.console = TrainConsole(config.train.steps, config.log.every, silent)
        self.started = time.perf_counter()
        self.skipped = 0
        if silent:
            return
        write_file(folder.config, to_toml(config).encode())
        write_file(folder.tokenizer, (config.data.path / TOKENIZER).read_bytes())
        self.metrics = MetricLog(folder, config, start)
        self.flops = flops_per_token(config.model, config.train.context)
        peak = peak_flops(device, config.engine.precision)
        self.peak = peak * layout.world if peak else None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.event(
            "start", step=start, ranks=layout.world, zero=layout.zero, device=name, torch=torch.__version__,
            unigram_nats=info.unigram_nats,
        )  # fmt: skip
        self.console.say(
            f"{config.run.name}: {info.tokens(TRAIN):,} training tokens, {layout.world} rank(s) on {name}, "
            f"ZeRO {layout.zero}, {config.engine.precision}"
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

    def evaluation(self, done: int, loss: float) -> None:
        self.started = time.perf_counter()
        if not self.silent:
            self.metrics.record(done, {"eval_loss": loss})
            self.event("eval", step=done, loss=loss)
            self.console.say(f"step {done}: held-out loss {loss:.4f}")

    def event(self, kind: str, **fields: Any) -> None:
        self.started = time.perf_counter()
        if not self.silent:
            self.folder.event(kind, **fields)

    def finish(self, saved: int, steps: int) -> None:
        if not self.silent:
            self.metrics.close()
            self.event("end", step=saved, finished=saved == steps)
            done = f"finished {steps} steps" if saved == steps else f"stopped and saved after step {saved} of {steps}"
            self.console.say(f"{done}: {self.folder.path}")
            if self.skipped:
                self.console.say(f"warning: {self.skipped} step(s) changed nothing: the gradient norm was not finite")
