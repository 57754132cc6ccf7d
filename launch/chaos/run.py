"""Trains while planned faults strike: the same command is launched again whenever a fault has ended it.

The run, and the quiet one that it is compared with, have folders of their own (NAME-chaos, NAME-quiet). No other folder is
touched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.chaos.verdict import FaultRow, Launch, fault_rows
from mikoshi.launch.host.session import run_in_session
from mikoshi.parallel.process.parent_death import die_with_parent
from mikoshi.trainer.chaos.inject import LOG, fired
from mikoshi.trainer.chaos.plan import Fault, FaultPlan, FaultSetting, read_fault_plan, write_fault_plan
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.checkpoint.restore import problem_of
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.config.run import RunConfig, differences, load_config, to_toml
from mikoshi.trainer.engines.layout import layout_of
from mikoshi.trainer.errors import ConfigError, RunError
from mikoshi.trainer.exit_codes import DONE, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.goodput import Goodput, goodput
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.streams import open_streams
from mikoshi.trainer.train.preflight import preflight

PLAN = "chaos-plan.toml"
OUTPUT = "chaos-output.txt"


@dataclass(frozen=True)
class ChaosProgress:
    """The progress of a run. struck: the faults so far, in order."""

    name: str
    step: int
    steps: int
    struck: list[Fault]


Show = Callable[[ChaosProgress], None]


@dataclass(frozen=True)
class ChaosOutcome:
    """The outcome of a plan of faults.

    code: exit code of the last launch
    processes, files: what was left behind
    quiet: goodput of the quiet run, if it was compared
    weights: whether the final weights equal the quiet run's to the bit; None if they were not compared
    """

    folder: RunFolder
    rows: list[FaultRow]
    launches: list[Launch]
    code: int
    processes: list[str]
    files: list[str]
    goodput: Goodput
    quiet: Goodput | None
    weights: bool | None

    @property
    def good(self) -> bool:
        """Whether everything was handled as promised."""
        clean = self.code == DONE and not self.processes and not self.files
        return clean and self.weights is not False and all(row.good for row in self.rows)


def setting_of(run: RunConfig, ranks: int) -> FaultSetting:
    """Return what a plan must know of a run. Raises LayoutError if the run has no layout on `ranks` ranks."""
    layout = layout_of(run, ranks)
    several = layout.state_grid[0] > 1 or layout.tp > 1
    guard, recovery = run.guard, run.recovery
    own = run.engine.kind != "deepspeed"
    return FaultSetting(run.train.steps, ranks, run.checkpoint.regular, guard.compare, several, recovery.restarts, own)


def sibling_run(run: RunConfig, kind: str) -> RunConfig:
    """The same run in a folder of its own, without external services."""
    return run.model_copy(
        update={
            "run": run.run.model_copy(update={"name": f"{run.run.name}-{kind}"}),
            "checkpoint": run.checkpoint.model_copy(update={"folder": ""}),
            "log": run.log.model_copy(update={"wandb": ""}),
        }
    )


def run_with_faults(run: RunConfig, ranks: int, plan: FaultPlan, compare: bool, show: Show) -> ChaosOutcome:
    """Train through all faults of the plan, then without faults if the runs are to be compared.

    Raises what preflight does, RunError or ConfigError.
    """
    faulty, quiet = sibling_run(run, "chaos"), sibling_run(run, "quiet")
    folder = RunFolder(faulty.run.path)
    if folder.path.exists():
        raise ConfigError(f"{folder.path}: exists already: remove it, or give another run.name")
    known = _has_reference(quiet, ranks) if compare else True
    preflight(faulty, ranks)
    launches, survivors = _launch_until_done(faulty, ranks, plan, show)
    weights = None
    if compare and launches[-1].code == DONE:
        if not known:
            launches_quiet, _ = _launch_until_done(quiet, ranks, FaultPlan(()), show)
            _check_launch(launches_quiet[-1], RunFolder(quiet.run.path))
        weights = same_weights(faulty, quiet)
    found = fault_rows(plan, fired(folder.path / LOG), read_jsonl(folder.events), launches, folder.stacks)
    return ChaosOutcome(
        folder, found, launches, launches[-1].code, survivors,
        sorted(map(str, folder.path.rglob(".*.partial"))), goodput(folder),
        goodput(RunFolder(quiet.run.path)) if compare and weights is not None else None, weights,
    )  # fmt: skip


def comparable(run: RunConfig, plan: FaultPlan) -> bool:
    """Whether the run can end with the quiet run's weights: not if it skips a step that a retry would cure."""
    return run.guard.retry or all(fault.kind != "nan" for fault in plan.faults)


def _has_reference(quiet: RunConfig, ranks: int) -> bool:
    """Whether the quiet run exists, on as many ranks; on others, sums are rounded differently.

    Raises ConfigError if its folder holds another run.
    """
    folder = RunFolder(quiet.run.path)
    if not folder.path.exists():
        return False
    events = read_jsonl(folder.events)
    ended = [e.get("finished") for e in events if e["event"] == "end"]
    others = {e.get("ranks") for e in events if e["event"] == "start"} - {ranks}
    if others:
        counts = ", ".join(map(str, others))
        raise ConfigError(f"{folder.path}: was made on {counts} ranks, not {ranks}: remove it, or use --no-compare")
    if ended and ended[-1] and not differences(load_config(folder.path), quiet):
        return True
    raise ConfigError(f"{folder.path}: holds another run: remove it, give another run.name, or use --no-compare")


def _launch_until_done(run: RunConfig, ranks: int, plan: FaultPlan, show: Show) -> tuple[list[Launch], list[str]]:
    """Launch a run until it ends by itself; returns all launches, and the processes that outlived one for too long."""
    folder = RunFolder(run.run.path)
    folder.make()
    write_file(folder.config, to_toml(run).encode())
    if plan.faults:
        write_file(folder.path / PLAN, write_fault_plan(plan).encode())
    launches, survivors = list[Launch](), list[str]()
    while True:
        before = fired(folder.path / LOG).keys()
        launch, outlived = _launch(run, ranks, plan, show)
        launches.append(launch)
        survivors += outlived
        struck = [plan.faults[number] for number in fired(folder.path / LOG).keys() - before]
        expected = {fault.kind for fault in struck} & {"launcher", "node", "preempt"}
        if launch.code == USER_ERROR:
            _check_launch(launch, folder)
        if not expected or launch.code not in (PREEMPTED, -9):
            return launches, survivors


def _launch(run: RunConfig, ranks: int, plan: FaultPlan, show: Show) -> tuple[Launch, list[str]]:
    folder = RunFolder(run.run.path)
    command = [sys.executable, "-P", "-m", "mikoshi.launch.chaos.run", str(folder.config), str(ranks)]
    command += [str(folder.path / PLAN)] if plan.faults else []
    ran = run_in_session(command, folder.path / OUTPUT, lambda: show(_progress(run, plan)))
    return Launch(ran.began, ran.ended, ran.code, ran.emptied), ran.outlived


def _progress(run: RunConfig, plan: FaultPlan) -> ChaosProgress:
    folder = RunFolder(run.run.path)
    struck = [plan.faults[number] for number in fired(folder.path / LOG)] if plan.faults else []
    return ChaosProgress(run.run.name, _last_step(folder.metrics), run.train.steps, struck)


def _last_step(metrics: Path) -> int:
    """The step of the last whole record, read from the file's end."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8192))
        lines = file.read().splitlines()[:-1] if size > 8192 else file.read().splitlines()
    for line in reversed(lines):
        _, found, rest = line.partition(b'"step": ')
        number = rest.split(b",")[0]
        if found and number.isdigit():
            return int(number)
    return 0


def _check_launch(launch: Launch, folder: RunFolder) -> None:
    """Raise RunError, with the last error of its output, if a launch failed."""
    if launch.code != DONE:
        output = (folder.path / OUTPUT).read_text(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in output if line.startswith("error: ")]
        raise RunError(f"{folder.path}: ended with exit code {launch.code}: {(errors or output or ['it said nothing'])[-1]}")


def same_weights(one: RunConfig, other: RunConfig) -> bool:
    """Whether the newest checkpoints of two runs are of their last step, sound, and equal to the bit."""
    stores = [checkpoints_of(RunFolder(run.run.path), run) for run in (one, other)]
    last = one.train.steps
    if any(store.steps()[:1] != [last] or problem_of(store, last) for store in stores):
        return False
    ours, theirs = (read_manifest(store, last).files for store in stores)
    return ours == theirs


def main() -> int:
    """Run one launch: CONFIG RANKS [PLAN]. It dies with the command that started it."""
    from mikoshi.launch.controller.supervisor import Job, supervise
    from mikoshi.trainer.train.rank import train_supervised

    open_streams(unread=True)
    die_with_parent()
    run, ranks = load_config(Path(sys.argv[1])), int(sys.argv[2])
    plan = read_fault_plan(Path(sys.argv[3]), ranks) if len(sys.argv) > 3 else None
    return supervise(Job(ranks, train_supervised, (run, plan), RunFolder(run.run.path), run.recovery))


if __name__ == "__main__":
    sys.exit(main())
