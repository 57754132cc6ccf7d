"""Runs the first steps of a run without evaluation or checkpoint, and records each rank's peak memory."""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from mikoshi.parallel.process.heartbeat import send_heartbeat
from mikoshi.parallel.process.process_group import World, join, leave, pick_device, wait_for_all, world_from
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.build import build_engine
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.engines.optim import learning_rate
from mikoshi.trainer.engines.precision import resolve_precision
from mikoshi.trainer.exit_codes import DONE
from mikoshi.trainer.record.metrics import memory_bytes
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.signals import exit_on_stop_signal
from mikoshi.trainer.train.loop import expect_silence, pinned
from mikoshi.trainer.train.rank import report_error
from mikoshi.trainer.train.resume import resume
from mikoshi.trainer.train.step_log import RunLog


def trial_rank(run: RunConfig, steps: int) -> int:
    """The part of a trial of the rank that the environment says, under controller.supervisor; its exit code."""
    world = world_from(os.environ)
    assert world is not None, "a supervisor says which rank this is"
    with exit_on_stop_signal():
        try:
            device = pick_device(run.engine.device, world)
            join(world, device, timedelta(seconds=run.recovery.patience + 60))
            trial(run, world, device, steps)
            wait_for_all()
            leave()
            return DONE
        except Exception as error:
            return report_error(error, world.rank)


def trial(config: RunConfig, world: World, device: torch.device, steps: int) -> None:
    """Train `steps` steps of a run that has no checkpoint, its learning rates those of the whole run. Collective.

    The metrics go into its folder; its event `end` has `memory` and, on CUDA, `reserved`: each rank's peak in bytes.
    """
    send_heartbeat("start")
    folder, layout = RunFolder(config.run.path), layout_of(config, world.size)
    config, _ = resolve_precision(config, layout, device)
    engine = build_engine(config, layout, device)
    log = RunLog(config, folder, layout, device, silent=world.rank > 0)
    point = resume(config, engine, layout, world.rank, checkpoints_of(folder, config), device, fresh=True)
    log.begin(point.start, point.feed, point.refused)
    expect_silence(config, point.feed)
    stream = point.loader.stream(0, steps, pinned(device), config.data.prefetch)
    with contextlib.closing(engine), log.console, contextlib.closing(stream) as batches:
        for done in range(1, steps + 1):
            send_heartbeat("data", done)
            log.start_waiting()
            rows = next(batches)
            log.begin_step()
            lr = learning_rate(config.optim.lr, config.optim.schedule, done - 1, config.train.steps)
            log.step(done, engine.step(rows, lr), lr)
    send_heartbeat("end")
    log.event("end", step=steps, **_memory_peaks(device, world))
    if not log.silent:
        log.metrics.close()


def _memory_peaks(device: torch.device, world: World) -> dict[str, list[int]]:
    """The peaks of all ranks, in their order. Collective."""
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    everyone = [torch.empty(2, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(everyone, torch.tensor([memory_bytes(device), reserved]))
    memory, kept = ([int(rank[column]) for rank in everyone] for column in (0, 1))
    return {"memory": memory, "reserved": kept} if device.type == "cuda" else {"memory": memory}
