"""fit(): one training run, from the newest valid checkpoint to the last step or a stop signal."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mikoshi.data.dataset.rows import Batch
from mikoshi.parallel.layout import Layout
from mikoshi.parallel.process.heartbeat import send_heartbeat, set_limits
from mikoshi.parallel.process.process_group import World
from mikoshi.trainer.chaos.inject import inject
from mikoshi.trainer.chaos.plan import FaultPlan
from mikoshi.trainer.checkpoint.agree import on_first_rank
from mikoshi.trainer.checkpoint.of_run import checkpoints_of, retention_of
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import Engine, StepResult
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.optim import learning_rate
from mikoshi.trainer.engines.precision import resolve_precision
from mikoshi.trainer.errors import DivergedError, SpoiledError
from mikoshi.trainer.feed.feed import Feed
from mikoshi.trainer.guard.loss_guard import LossGuard
from mikoshi.trainer.guard.straggler import Stragglers
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.signals import StopRequest, agree
from mikoshi.trainer.train.resume import ResumePoint, resume, rewind
from mikoshi.trainer.train.saves import Saves
from mikoshi.trainer.train.step_log import RunLog


def fit(config: RunConfig, world: World, device: torch.device, plan: FaultPlan | None = None) -> bool:
    """Train to the last step; True when it is reached, False when stopped by a signal and saved. Collective.

    Preflight has passed and the process group exists. `plan`: faults to inject. Raises CheckpointError,
    DataError, LayoutError or RunError; DivergedError or SpoiledError where starting again from a checkpoint may help.
    """
    with contextlib.ExitStack() as resources:

        def lock() -> None:
            resources.enter_context(RunFolder(config.run.path).lock())

        on_first_rank(lock)
        config, precision = resolve_precision(config, layout_of(config, world.size), device, RunFolder(config.run.path))
        run = _begin(config, world, device, plan, resources)
        if precision:
            run.log.console.print(precision)
        with run.log.console, StopRequest() as stop:
            for number in itertools.count():
                point = resume(config, run.engine, run.layout, world.rank, run.store, device, fresh=not number)
                ended = _train(run, point, stop)
                if ended is not None:
                    return ended
    raise AssertionError("an endless count has ended")


@dataclass(frozen=True)
class _Run:
    """What stays the same when a run rewinds to a checkpoint."""

    config: RunConfig
    layout: Layout
    rank: int
    device: torch.device
    engine: Engine
    store: Store
    saves: Saves
    log: RunLog
    stragglers: Stragglers


def _begin(
    config: RunConfig, world: World, device: torch.device, plan: FaultPlan | None, resources: contextlib.ExitStack
) -> _Run:
    """Build everything that outlives a rewind. `resources` closes the engine in the end."""
    send_heartbeat("start")
    folder, layout = RunFolder(config.run.path), layout_of(config, world.size)
    engine = build_engine(config, layout, device)
    resources.callback(engine.close)
    if plan is not None:
        inject(plan, world.rank, folder, lambda: engine.parameters)
    log = RunLog(config, folder, layout, device, silent=world.rank > 0)
    store = checkpoints_of(folder, config)
    saver = Saver(store, retention_of(config), config.checkpoint.background)
    saves = Saves(config, saver, log, engine.state, lambda done: _compare(engine, log, done) if config.guard.compare else None)
    stragglers = Stragglers(device, [layout.coordinates(rank).pp for rank in range(world.size)])
    return _Run(config, layout, world.rank, device, engine, store, saves, log, stragglers)


def _train(run: _Run, point: ResumePoint, stop: StopRequest) -> bool | None:
    """Train from a checkpoint to the last step (True) or a stop signal (False); None where the run has to rewind."""
    config, log, saves, steps, start = run.config, run.log, run.saves, run.config.train.steps, point.start
    log.begin(start, point.feed, point.refused, point.changed)
    saves.start_at(start)
    log.save_plan(*saves.schedule.at_start())
    expect_silence(config, point.feed)
    other_kinds = {step + 1 for step, _ in config.data.warmup}  # the first to be read in pieces of another length
    # A stop may have come before or during the evaluation of this step: evaluate now.
    overdue = start > 0 and _to_be_evaluated(config, start) and not log.evaluated(start)
    stopped = overdue and not _evaluate(run, point, start, stop)
    with contextlib.closing(point.loader.stream(start, steps, pinned(run.device), config.data.prefetch)) as batches:
        for done in () if stopped else range(start + 1, steps + 1):
            if done in other_kinds:
                expect_silence(config, point.feed)
            send_heartbeat("data", done)
            log.start_waiting()
            rows = next(batches)
            log.begin_step()
            run.stragglers.begin()
            lr = learning_rate(config.optim.lr, config.optim.schedule, done - 1, steps)
            result = _step(run, point.guard, rows, lr, done)
            run.stragglers.end()
            log.step(done, result, lr)
            if not _sound(run, point, result, done):
                return None
            stopped = _stopped_after(run, point, done, stop, sound=not point.guard.left)
            if stopped:
                break
    if stopped:
        log.event("stop", step=saves.saved, asked=stop.received or "another rank")
    send_heartbeat("end")
    log.finish(saves.saved, getattr(point.loader, "names", []), finished=not stopped)
    return not stopped


def _stopped_after(run: _Run, point: ResumePoint, done: int, stop: StopRequest, sound: bool) -> bool:
    """Save and evaluate after step `done`. Returns whether the run, now saved, stops here on request.

    The save comes before the evaluation, so that a long evaluation that is killed costs nothing else.
    """
    saves, last = run.saves, done == run.config.train.steps
    send_heartbeat("agree")
    agreed = agree(bool(stop.received), *saves.flags(done))
    _look_around(run, done)
    if agreed.stop or last:
        saves.save_now(done, point.record, sound)
    else:
        saves.after_step(done, agreed, point.record, sound)
    if agreed.stop and not last:
        return True
    if _to_be_evaluated(run.config, done) and not _evaluate(run, point, done, stop):
        saves.save_now(done, point.record, sound)
        return True
    return False


def expect_silence(config: RunConfig, feed: Feed) -> None:
    """Reset the hang detection limits of this rank, before its first step and before steps of another kind."""
    # Remote data may be slow: its store has its own timeout.
    set_limits(config.recovery.silence, config.recovery.patience, slow=("data",) if feed.distant else ())


def _step(run: _Run, guard: LossGuard, rows: Batch, lr: float, done: int) -> StepResult:
    """One step; if its loss or norm cannot be trusted, computed once more from the same weights and batch."""
    bounds = guard.limits()
    result = run.engine.step(rows, lr, bounds)
    if result.applied or result.loss is None or result.grad_norm is None or not run.config.guard.retry:
        return result
    begun, why = time.perf_counter(), guard.judge(result.loss, result.grad_norm).why
    again = run.engine.step(rows, lr, bounds)
    run.log.step_retried(done, why, again.applied, time.perf_counter() - begun)
    return again


def _sound(run: _Run, point: ResumePoint, result: StepResult, done: int) -> bool:
    """Let the loss guard judge the step. Returns False where the run has rewound.

    Raises SpoiledError after guard.give_up steps in a row that were not applied.
    """
    guard, loss, norm = point.guard, result.loss, result.grad_norm
    if loss is None or norm is None:  # the batch's nature and no fault: the guard learns nothing from it
        run.log.step_empty(done, point.positions(done - 1, done))
        return True
    verdict = guard.judge(loss, norm)
    if result.applied:
        guard.accept(loss, norm)
        if verdict.kind:
            run.log.loss_spiked(done, verdict.why, point.positions(done - 1, done))
        return True
    if verdict.kind == "spike" and run.config.guard.spike == "rewind":
        run.saves.wait_for_save()  # what is under way is committed now, and not when the history that is left is removed
        if rewind(run.config, point, done, run.store):
            run.log.warn(f"step {done}: {verdict.why}: going back")
            return False
    run.log.step_skipped(done, verdict.why, point.positions(done - 1, done))
    guard.leave()
    if guard.left >= run.config.guard.give_up:
        raise SpoiledError(f"step {done}: the weights did not change for {guard.left} steps in a row (guard.give_up)")
    return True


def _look_around(run: _Run, done: int) -> None:
    """Compare replicas and speed over the ranks, at their intervals."""
    every = run.config.guard.compare
    if every and done % every == 0:
        _compare(run.engine, run.log, done)
    if run.stragglers.due(done):
        for slow in run.stragglers.slow_ranks():
            run.log.event("straggler", step=done, rank=slow.rank, ratio=round(slow.ratio, 2))
            run.log.warn(f"step {done}: rank {slow.rank} takes {slow.ratio:.1f} times as long as its peers for the same work")


def _compare(engine: Engine, log: RunLog, done: int) -> None:
    """Raises DivergedError where ranks that hold the same piece of the state do not hold the same bits."""
    found = engine.replica_differences()
    if found:
        text = "; ".join(map(str, found[:5]))
        ranks = sorted({rank for difference in found for rank in difference.ranks})
        log.event("diverged", step=done, ranks=ranks, what=text)
        raise DivergedError(f"step {done}: replicas have come apart: {text}")


def _to_be_evaluated(config: RunConfig, done: int) -> bool:
    return done == config.train.steps or (config.eval.every > 0 and done % config.eval.every == 0)


def _evaluate(run: _Run, point: ResumePoint, done: int, stop: StopRequest) -> bool:
    """Whether it came to its end. Between two batches all ranks agree whether any was asked to stop: then there is no result.
    A save under way goes on meanwhile."""
    send_heartbeat("evaluate")
    begun, stopped = time.perf_counter(), False

    def until_stopped(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal stopped
        for rows in batches:
            agreed = agree(bool(stop.received), *run.saves.saver.flags())
            if agreed.stop:
                stopped = True
                return
            run.saves.advance(agreed)
            send_heartbeat("evaluate")
            yield rows

    losses = {}
    known = point.feed.tokenizer.vocab  # the rows beyond pad the model's vocabulary: nothing is ever predicted to be one
    for name, batches in point.feed.evaluation(run.layout, run.layout.coordinates(run.rank)).items():
        losses[name] = run.engine.evaluate(until_stopped(batches), known)
        if stopped:
            return False
    run.log.evaluation(done, losses, point.feed.weights(point.continued, done), time.perf_counter() - begun)
    return True


def pinned(device: torch.device) -> Callable[[Batch], Batch]:
    """A function that copies a batch to page-locked memory, so that its transfer overlaps with the step; identity on CPU."""
    if device.type == "cpu":
        return lambda batch: batch

    def pin(array: Any) -> Any:
        return None if array is None else torch.from_numpy(array).pin_memory().numpy()

    return lambda batch: Batch(pin(batch.tokens), pin(batch.labels), pin(batch.docs), pin(batch.positions), pin(batch.padding))
