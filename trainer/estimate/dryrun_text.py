"""Dry runs of several ranks, each in a process of its own, and what they found as tables."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.table import Table

from mikoshi.data.io.cores import cores
from mikoshi.trainer.config.run import RunConfig, parse_config, to_toml
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.estimate.dryrun import KINDS, DryRun, dry_run, ranks_of

_GIB = 2**30
_LABELS = {
    "parameters": "parameters, own share",
    "gathered": "parameters, gathered",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "buffers": "communication buffers",
}


def run_ranks(config: RunConfig, world: int, which: str) -> list[DryRun]:
    """Dry runs of the ranks that `which` means (see ranks_of), as many at once as there are cores. Raises LayoutError."""
    ranks = ranks_of(layout_of(config, world), which)
    if len(ranks) == 1:
        return [dry_run(config, world, ranks[0])]
    text, at_once = to_toml(config), min(len(ranks), cores())
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_in_process, [text] * len(ranks), [world] * len(ranks), ranks))


def _in_process(text: str, world: int, rank: int) -> DryRun:
    return dry_run(parse_config(text, "config"), world, rank)


def print_dry_runs(results: list[DryRun], memory: float | None, console: Console) -> None:
    """Memory by kind, FLOPs, and the collectives of every rank given. `memory`: GiB of a GPU to compare with."""
    table = Table("at the peak, GiB", box=None, pad_edge=False)
    for r in results:
        table.add_column(f"rank {r.rank} (stage {r.pp}, layers {' and '.join(r.stages)})", justify="right")
    for kind in KINDS:
        table.add_row(_LABELS[kind], *(f"{r.memory[kind] / _GIB:.3f}" for r in results))
    if any(r.offloaded for r in results):
        table.add_row("of these in the host's memory", *(f"-{r.offloaded / _GIB:.3f}" for r in results))
    table.add_row("a GPU's memory", *(f"{r.device_peak / _GIB:.3f}{_fits(r, memory)}" for r in results))
    table.add_row("")
    table.add_row("parameters of its layers", *(f"{r.parameters:,}" for r in results))
    table.add_row("TFLOPs a step", *(f"{r.flops / 1e12:,.2f}" for r in results))
    table.add_row("this dry run took", *(f"{r.seconds:.0f} s, {r.host_bytes / _GIB:.1f} GiB" for r in results))
    console.print(table)
    console.print("\na step's collectives: axis, calls, GiB that the rank puts in", markup=False)
    traffic = Table("", box=None, pad_edge=False)
    for r in results:
        traffic.add_column(f"rank {r.rank}", justify="right")
    for axis, name in dict.fromkeys((c.axis, c.name) for r in results for c in r.collectives):
        cells = []
        for r in results:
            found = next((c for c in r.collectives if (c.axis, c.name) == (axis, name)), None)
            cells.append(f"{found.calls:,} x, {found.bytes / _GIB:.3f}" if found else "-")
        traffic.add_row(f"{axis} {name}", *cells)
    console.print(traffic)


def _fits(result: DryRun, memory: float | None) -> str:
    if memory is None:
        return ""
    return " fits" if result.device_peak <= memory * _GIB else f" > {memory:g}"
