"""Console, metrics and events of a run. Only rank 0 prints and writes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mikoshi.data.io.atomic import write_file
from mikoshi.data.io.json import non_finite
from mikoshi.data.sources.chat import dump_chat_template
from mikoshi.parallel.layout import Layout
from mikoshi.trainer.checkpoint.agree import on_first_rank
from mikoshi.trainer.checkpoint.saver import Outcome
from mikoshi.trainer.config.run import RunConfig, to_toml
from mikoshi.trainer.engines.base import StepResult
from mikoshi.trainer.feed.feed import Feed
from mikoshi.trainer.generation.prompt import chat_of
from mikoshi.trainer.hardware import gpu_named
from mikoshi.trainer.record.console import TrainConsole, format_loss
from mikoshi.trainer.record.goodput import goodput, process_began, repetition
from mikoshi.trainer.record.metrics import MetricLog, flops_per_token, memory_bytes, peak_flops
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl

_MAX_EMPTY_WARNINGS = 3
"""Steps that predict nothing and are said one by one: of some data most are."""


def mean_loss(losses: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The mean by weight over the sources that have a loss; None where none has, or one of weight 0 alone."""
    known = [(loss, weight) for name, weight in weights.items() if weight and (loss := losses.get(name)) is not None]
    return sum(loss * weight for loss, weight in known) / sum(weight for _, weight in known) if known else None


class RunLog:
    """A run's log on this rank. Only rank 0 writes; on other ranks it is silent. Call `begin` before use."""

    def __init__(self, config: RunConfig, folder: RunFolder, layout: Layout, device: torch.device, silent: bool) -> None:
        self.config, self.folder, self.layout, self.device, self.silent = config, folder, layout, device, silent
        self.console = TrainConsole(config.train.steps, config.log.every, silent, config.optim.clip)
        self.started = time.perf_counter()
        self.computed = config.train.global_batch * config.train.context
        """Tokens that a step computes, predicted or not: every place of the global batch's rows."""
        self.skipped, self.empty = 0, 0
        self.left_out: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.begun = False
        self.metrics: MetricLog
        if silent:
            return
        self.flops = flops_per_token(config.model, config.train.context)
        peak = peak_flops(device, config.engine.precision)
        self.peak = peak * layout.world if peak else None

    def begin(self, start: int, feed: Feed, refused: list[str], changed: Sequence[str] = ()) -> None:
        """Go on after step `start`, for the first time in this process or after going back. `changed`: lines about what is
        not as it was saved."""
        if not self.silent:
            if self.begun:
                self.metrics.close()
            else:
                self._begin_first(start, feed)
            self.metrics = MetricLog(self.folder, self.config, start)
        self.begun = True
        for reason in refused:
            self.console.print(f"checkpoint refused: {reason}")
        if start:
            self.console.print(f"resumed after step {start}")
            for line in changed:
                self.console.print(line)
        self.started = time.perf_counter()

    def _begin_first(self, start: int, feed: Feed) -> None:
        config, device = self.config, self.device
        write_file(self.folder.config, to_toml(config).encode())
        feed.tokenizer.save(self.folder.tokenizer)
        if (template := chat_of(config.data)) is not None:
            write_file(self.folder.chat, dump_chat_template(template).encode())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.event(
            "start", step=start, ranks=self.layout.world, zero=self.layout.zero, device=name, torch=torch.__version__,
            unigram_nats=feed.unigram_nats, began=round(process_began(), 3),
            **({} if start else repetition(self.folder, 0)),
        )  # fmt: skip
        self.console.print(
            f"{config.run.name}: {feed.description}, {self.layout.world} rank(s) on {name}, ZeRO {self.layout.zero}, "
            f"{config.engine.precision}"
        )
        if device.type == "cuda" and gpu_named(name) is None:
            self.console.print(f"{name}: its peak is not known, so MFU is not told (configs/hardware/gpus.toml)")

    def evaluated(self, step: int) -> bool:
        """Whether this step's evaluation is on record. Collective."""
        records = on_first_rank(lambda: [r["step"] for r in read_jsonl(self.folder.metrics) if "eval_loss" in r])
        return step in records

    def start_waiting(self) -> None:
        """Start to measure how long the step waits for its batch."""
        self.wait_started = time.perf_counter()

    def begin_step(self) -> None:
        """The batch has arrived: record the time since `start_waiting`."""
        self.waited = time.perf_counter() - self.wait_started

    def step(self, done: int, result: StepResult, lr: float) -> None:
        """Record a finished step and show it on the console."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        if self.silent:
            return
        values: dict[str, Any] = {
            "loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "tokens": result.tokens,
            "computed_tokens": self.computed, "applied": result.applied, "step_seconds": seconds, "data_seconds": self.waited,
            "tokens_per_second": self.computed / seconds, "memory_bytes": memory_bytes(self.device), **result.more,
        }  # fmt: skip
        if self.peak:
            values["mfu"] = self.flops * values["tokens_per_second"] / self.peak
        self._record(done, values)
        self.console.step(done, values)

    def _record(self, done: int, values: dict[str, Any]) -> None:
        self.metrics.record(done, values)
        if found := non_finite(values):  # null in the metrics
            self.folder.event("non-finite", step=done, values=found)

    def step_retried(self, done: int, why: str, cured: bool, seconds: float) -> None:
        """Record that a step was computed again.

        cured: whether the second try gave valid results. seconds: time of the second try.
        """
        if not self.silent:  # within the step: its clock goes on
            self.folder.event("retry", step=done, why=why, cured=cured, seconds=round(seconds, 6))
        if cured:
            self.warn(f"step {done}: {why}; computed again from the same batch it was sound: a passing fault of a device")

    def step_skipped(self, done: int, why: str, positions: list[int]) -> None:
        """Record a step that no rank applied, even after a retry.

        positions: of its batch in the order of the data.
        """
        self.skipped += 1
        self.event("skip", step=done, why=why, positions=positions)
        self.warn(f"step {done}: {why}: no rank changed its weights; its batch: `mikoshi data inspect {self.folder.path} "
                  f"--step {done}`")  # fmt: skip

    def step_empty(self, done: int, positions: list[int]) -> None:
        """Record a step whose batch predicts no token.

        positions: of its batch in the order of the data.
        """
        self.empty += 1
        self.event("empty", step=done, positions=positions)
        if self.empty <= _MAX_EMPTY_WARNINGS:
            self.warn(
                f"step {done}: no token of its batch is predicted: there is no loss, and no rank changed its weights; `mikoshi "
                "data stats` tells how many rows are like that"
                + ("; further such steps are in the events alone" if self.empty == _MAX_EMPTY_WARNINGS else "")
            )

    def loss_spiked(self, done: int, why: str, positions: list[int]) -> None:
        """Record a spike of the loss or gradient norm in a step that was applied."""
        self.event("spike", step=done, why=why, positions=positions)
        self.warn(f"step {done}: {why}")

    def evaluation(self, done: int, losses: Mapping[str, float | None], weights: Mapping[str, float], seconds: float) -> None:
        """Of several sources, the loss that is told is the mean by their weights, of those whose text predicts anything.
        `seconds`: what it took."""
        self.started = time.perf_counter()
        if self.silent:
            return
        loss = mean_loss(losses, weights)
        each = {f"eval_loss.{name}": value for name, value in losses.items() if name}
        self._record(done, {"eval_loss": loss, **each})
        self.event("eval", step=done, loss=loss, seconds=round(seconds, 6))
        parts = ", ".join(f"{name} {format_loss(value)}" for name, value in losses.items() if name)
        why = "" if loss is not None else ": no token of the held-out text that was read is predicted"
        self.console.print(f"step {done}: held-out loss {format_loss(loss)}" + (f" ({parts})" if parts else "") + why)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event to the run folder."""
        self.started = time.perf_counter()
        if not self.silent:
            self.folder.event(kind, **fields)

    def save_plan(self, text: str, figures: Mapping[str, float]) -> None:
        """Report how often the run is saved, and how much work a fault could lose."""
        self.console.print(text)
        self.event("save-plan", told=text, **figures)

    def restart_clock(self) -> None:
        """Start the next step's time now: what passed since the last step was no part of it."""
        self.started = time.perf_counter()

    def warn(self, text: str) -> None:
        """Print a warning on the console."""
        self.console.print(f"warning: {text}")

    def saved(self, outcome: Outcome, stall: float, record: Mapping[str, Any]) -> None:
        """A save that has ended, well or not, for which training stood still `stall` seconds. Of a stream it tells how many
        documents were used and left out, by reason, and how many rows were read and predicted nothing."""
        if outcome.error is not None:
            self.event("save-failed", step=outcome.step, why=outcome.error, stall_seconds=round(stall, 6))
            self.warn(f"step {outcome.step}: {outcome.error}; training goes on and it is tried again")
            return
        state = record["data"]["state"]
        self.left_out, self.rows = state.get("left_out") or {}, state.get("rows") or {}
        self.event(
            "save", step=outcome.step, path=outcome.path, stall_seconds=round(stall, 6),
            seconds=round(outcome.seconds, 6), **({"documents": self.left_out, "rows": self.rows} if self.left_out else {}),
        )  # fmt: skip

    def finish(self, saved: int, unreadable: list[str], finished: bool) -> None:
        """Record the end of the run and print its summary.

        saved: step of the newest checkpoint. unreadable: names of documents that could not be read.
        """
        if self.silent:
            return
        steps = self.config.train.steps
        self.metrics.close()
        self.event("end", step=saved, finished=finished)
        spent = goodput(self.folder)
        done = f"finished {steps} steps" if finished else f"stopped and saved after step {saved} of {steps}"
        self.console.print(f"{done}: {self.folder.path}")
        if spent.starts > 1 or spent.wall > 60:  # else there is nothing to be learned from it
            self.console.print(spent.words())
        if self.left_out.get("unreadable"):
            told = ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
            self.console.print(f"warning: documents of the stream that cannot be read were left out ({told})")
            for name in unreadable[:5]:
                self.console.print(f"  {name}")
        if self.rows.get("nothing"):
            share = self.rows["nothing"] / self.rows["read"]
            self.console.print(
                f"warning: {share:.1%} of the {self.rows['read']:,} rows read from the stream predicted no token"
            )
        if self.empty:
            self.console.print(
                f"warning: {self.empty} step(s) predicted no token and changed nothing: see the events of the run"
            )
        if self.skipped:
            self.console.print(f"warning: {self.skipped} step(s) changed nothing: see the events of the run")
