"""fit(): one training run, from the newest valid checkpoint to the last step or the request to stop."""

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
from mikoshi.parallel.process.heartbeat import beat, limits
from mikoshi.parallel.process.process_group import World
from mikoshi.trainer.chaos.inject import inject
from mikoshi.trainer.chaos.plan import Plan
from mikoshi.trainer.checkpoint.agree import on_first_rank
from mikoshi.trainer.checkpoint.of_run import checkpoints_of, keep_of
from mikoshi.trainer.checkpoint.saver import Saver
from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.base import Engine, StepResult
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.optim import learning_rate
from mikoshi.trainer.engines.precision import settled
from mikoshi.trainer.errors import DivergedError, SpoiledError
from mikoshi.trainer.feed.feed import Feed
from mikoshi.trainer.guard.loss_guard import LossGuard
from mikoshi.trainer.guard.straggler import Stragglers
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.signals import StopRequest, agree
from mikoshi.trainer.train.resume import Going, go_back, resume
from mikoshi.trainer.train.saves import Saves
from mikoshi.trainer.train.step_log import RunLog


def fit(config: RunConfig, world: World, device: torch.device, plan: Plan | None = None) -> bool:
    """Train to the last step; True when it is reached, False when stopped by a signal and saved. Collective.

    Preflight has passed and the process group exists. `plan`: faults to be suffered on the way. Raises CheckpointError,
    DataError, LayoutError or RunError; DivergedError or SpoiledError where starting again from a checkpoint may help.
    """
    with contextlib.ExitStack() as held:
        on_first_rank(lambda: held.enter_context(RunFolder(config.run.path).lock()) and None)
        config, precision = settled(config, layout_of(config, world.size), device, RunFolder(config.run.path))
        run = _begin(config, world, device, plan, held)
        if precision:
            run.log.console.say(precision)
        with run.log.console, StopRequest() as stop:
            for number in itertools.count():
                going = resume(config, run.engine, run.layout, world.rank, run.store, device, fresh=not number)
                ended = _train(run, going, stop)
                if ended is not None:
                    return ended
    raise AssertionError("an endless count has ended")


@dataclass(frozen=True)
class _Run:
    """What stays the same when a run goes back to a checkpoint."""

    config: RunConfig
    layout: Layout
    rank: int
    device: torch.device
    engine: Engine
    store: Store
    saves: Saves
    log: RunLog
    stragglers: Stragglers


def _begin(config: RunConfig, world: World, device: torch.device, plan: Plan | None, held: contextlib.ExitStack) -> _Run:
    """`held`: what the engine keeps outside of memory goes with it."""
    beat("start")
    folder, layout = RunFolder(config.run.path), layout_of(config, world.size)
    engine = build_engine(config, layout, device)
    held.callback(engine.close)
    if plan is not None:
        inject(plan, world.rank, folder, lambda: engine.parameters)
    log = RunLog(config, folder, layout, device, silent=world.rank > 0)
    store = checkpoints_of(folder, config)
    saver = Saver(store, keep_of(config), config.checkpoint.background)
    saves = Saves(config, saver, log, engine.state, lambda done: _compare(engine, log, done) if config.guard.compare else None)
    stragglers = Stragglers(device, [layout.coordinates(rank).pp for rank in range(world.size)])
    return _Run(config, layout, world.rank, device, engine, store, saves, log, stragglers)


def _train(run: _Run, going: Going, stop: StopRequest) -> bool | None:
    """From a checkpoint to the last step (True) or the request to stop (False); None where the run has to go back."""
    config, log, saves, steps, start = run.config, run.log, run.saves, run.config.train.steps, going.start
    log.begin(start, going.feed, going.refused, going.changed)
    saves.begin_at(start)
    log.plan_of_saves(*saves.schedule.at_start())
    expect_silence(config, going.feed)
    other_kinds = {step + 1 for step, _ in config.data.warmup}  # the first to be read in pieces of another length
    # Where a stop came before the evaluation of the step, or within it, it is made now.
    owed = start > 0 and _to_be_evaluated(config, start) and not log.evaluated(start)
    stopped = owed and not _evaluate(run, going, start, stop)
    with contextlib.closing(going.loader.stream(start, steps, pinned(run.device), config.data.prefetch)) as batches:
        for done in () if stopped else range(start + 1, steps + 1):
            if done in other_kinds:
                expect_silence(config, going.feed)
            beat("data", done)
            log.ask_for_batch()
            rows = next(batches)
            log.begin_step()
            run.stragglers.begin()
            lr = learning_rate(config.optim.lr, config.optim.schedule, done - 1, steps)
            result = _step(run, going.guard, rows, lr, done)
            run.stragglers.end()
            log.step(done, result, lr)
            if not _sound(run, going, result, done):
                return None
            stopped = _stopped_after(run, going, done, stop, sound=not going.guard.left)
            if stopped:
                break
    if stopped:
        log.event("stop", step=saves.saved, asked=stop.asked or "another rank")
    beat("end")
    log.finish(saves.saved, getattr(going.loader, "names", []), finished=not stopped)
    return not stopped


def _stopped_after(run: _Run, going: Going, done: int, stop: StopRequest, sound: bool) -> bool:
    """What follows step `done`; whether the run, asked to stop, is to end here, saved.

    The save of a step comes before its evaluation: what ends a long evaluation ends nothing else."""
    saves, last = run.saves, done == run.config.train.steps
    beat("agree")
    agreed = agree(bool(stop.asked), *saves.flags(done))
    _look_around(run, done)
    if agreed.stop or last:
        saves.now(done, going.record, sound)
    else:
        saves.after(done, agreed, going.record, sound)
    if agreed.stop and not last:
        return True
    if _to_be_evaluated(run.config, done) and not _evaluate(run, going, done, stop):
        saves.now(done, going.record, sound)
        return True
    return False


def expect_silence(config: RunConfig, feed: Feed) -> None:
    """Have this rank's silence judged as that of one whose next steps are not like those before, or are the first."""
    # Data from afar may be waited for; how long is its store's affair.
    limits(config.recovery.silence, config.recovery.patience, slow=("data",) if feed.distant else ())


def _step(run: _Run, guard: LossGuard, rows: Batch, lr: float, done: int) -> StepResult:
    """One step; where its figures cannot be trusted, tried once more from the same weights and the same batch."""
    most = guard.limits()
    result = run.engine.step(rows, lr, most)
    if result.applied or result.loss is None or result.grad_norm is None or not run.config.guard.retry:
        return result
    begun, why = time.perf_counter(), guard.judge(result.loss, result.grad_norm).why
    again = run.engine.step(rows, lr, most)
    run.log.retried(done, why, again.applied, time.perf_counter() - begun)
    return again


def _sound(run: _Run, going: Going, result: StepResult, done: int) -> bool:
    """What the loss guard makes of a step; False where the run has gone back. Raises SpoiledError when nothing changes."""
    guard, loss, norm = going.guard, result.loss, result.grad_norm
    if loss is None or norm is None:  # the batch's nature and no fault: the guard learns nothing from it
        run.log.predicted_nothing(done, going.positions(done - 1, done))
        return True
    verdict = guard.judge(loss, norm)
    if result.applied:
        guard.accept(loss, norm)
        if verdict.kind:
            run.log.spiked(done, verdict.why, going.positions(done - 1, done))
        return True
    if verdict.kind == "spike" and run.config.guard.spike == "rewind":
        run.saves.abandon()  # what is under way is committed now, and not when the history that is left is removed
        if go_back(run.config, going, done, run.store):
            run.log.warn(f"step {done}: {verdict.why}: going back")
            return False
    run.log.left(done, verdict.why, going.positions(done - 1, done))
    guard.leave()
    if guard.left >= run.config.guard.give_up:
        raise SpoiledError(f"step {done}: the weights did not change for {guard.left} steps in a row (guard.give_up)")
    return True


def _look_around(run: _Run, done: int) -> None:
    """The ranks compare their replicas and their speed, now and then."""
    every = run.config.guard.compare
    if every and done % every == 0:
        _compare(run.engine, run.log, done)
    if run.stragglers.due(done):
        for slow in run.stragglers.named():
            run.log.event("straggler", step=done, rank=slow.rank, ratio=round(slow.ratio, 2))
            run.log.warn(f"step {done}: rank {slow.rank} takes {slow.ratio:.1f} times as long as its peers for the same work")


def _compare(engine: Engine, log: RunLog, done: int) -> None:
    """Raises DivergedError where ranks that hold the same piece of the state do not hold the same bits."""
    found = engine.differing()
    if found:
        told = "; ".join(map(str, found[:5]))
        ranks = sorted({rank for difference in found for rank in difference.ranks})
        log.event("diverged", step=done, ranks=ranks, what=told)
        raise DivergedError(f"step {done}: replicas have come apart: {told}")


def _to_be_evaluated(config: RunConfig, done: int) -> bool:
    return done == config.train.steps or (config.eval.every > 0 and done % config.eval.every == 0)


def _evaluate(run: _Run, going: Going, done: int, stop: StopRequest) -> bool:
    """Whether it came to its end. Between two batches all ranks agree whether any was asked to stop: then there is no result.
    A save under way goes on meanwhile."""
    beat("evaluate")
    begun, stopped = time.perf_counter(), False

    def until_stopped(batches: Iterable[Batch]) -> Iterator[Batch]:
        nonlocal stopped
        for rows in batches:
            agreed = agree(bool(stop.asked), *run.saves.saver.flags())
            if agreed.stop:
                stopped = True
                return
            run.saves.go_on(agreed)
            beat("evaluate")
            yield rows

    losses = {}
    known = going.feed.tokenizer.vocab  # the rows beyond pad the model's vocabulary: nothing is ever predicted to be one
    for name, batches in going.feed.evaluation(run.layout, run.layout.coordinates(run.rank)).items():
        losses[name] = run.engine.evaluate(until_stopped(batches), known)
        if stopped:
            return False
    run.log.evaluation(done, losses, going.feed.weights(going.continued, done), time.perf_counter() - begun)
    return True


def pinned(device: torch.device) -> Callable[[Batch], Batch]:
    """What makes a batch ready for its way to the device while the step before it runs: page-locked memory for a GPU."""
    if device.type == "cpu":
        return lambda batch: batch

    def pin(array: Any) -> Any:
        return None if array is None else torch.from_numpy(array).pin_memory().numpy()

    return lambda batch: Batch(pin(batch.tokens), pin(batch.labels), pin(batch.docs), pin(batch.positions), pin(batch.padding))
