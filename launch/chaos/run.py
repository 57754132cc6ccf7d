"""A run that suffers a plan of faults, and what became of it: the same command, launched again whenever a fault ended it.

The run, and the quiet one it is compared with, have folders of their own (NAME-chaos, NAME-quiet): nothing that is there
already is touched.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.chaos.verdict import Launch, Row, rows
from mikoshi.launch.host.session import run_apart
from mikoshi.parallel.process.parent_death import die_with_parent
from mikoshi.trainer.chaos.inject import LOG, fired
from mikoshi.trainer.chaos.plan import Fault, Plan, Setting, read_plan, write_plan
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
class Progress:
    """How far a run has come. `struck`: the faults so far, in their order."""

    name: str
    step: int
    steps: int
    struck: list[Fault]


Show = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """code: exit code of the last launch. processes, files: what was left behind. weights: whether the final ones are those
    of the quiet run to the bit, None where they were not compared."""

    folder: RunFolder
    rows: list[Row]
    launches: list[Launch]
    code: int
    processes: list[str]
    files: list[str]
    goodput: Goodput
    quiet: Goodput | None
    weights: bool | None

    @property
    def good(self) -> bool:
        """Whether all of it is as promised."""
        clean = self.code == DONE and not self.processes and not self.files
        return clean and self.weights is not False and all(row.good for row in self.rows)


def setting_of(run: RunConfig, ranks: int) -> Setting:
    """What a plan must know of a run. Raises LayoutError where it cannot be laid out so."""
    layout = layout_of(run, ranks)
    several = layout.state_grid[0] > 1 or layout.tp > 1
    guard, recovery = run.guard, run.recovery
    own = run.engine.kind != "deepspeed"
    return Setting(run.train.steps, ranks, run.checkpoint.regular, guard.compare, several, recovery.restarts, own)


def beside(run: RunConfig, kind: str) -> RunConfig:
    """The same run in a folder of its own, and with no word to services outside."""
    return run.model_copy(
        update={
            "run": run.run.model_copy(update={"name": f"{run.run.name}-{kind}"}),
            "checkpoint": run.checkpoint.model_copy(update={"folder": ""}),
            "log": run.log.model_copy(update={"wandb": ""}),
        }
    )


def suffer(run: RunConfig, ranks: int, plan: Plan, compare: bool, show: Show) -> Outcome:
    """Train through all faults of the plan, then quietly if it is to be compared. Raises what preflight does, RunError
    or ConfigError."""
    hurt, quiet = beside(run, "chaos"), beside(run, "quiet")
    folder = RunFolder(hurt.run.path)
    if folder.path.exists():
        raise ConfigError(f"{folder.path}: exists already: remove it, or give another run.name")
    known = _known(quiet, ranks) if compare else True
    preflight(hurt, ranks)
    launches, left = _through(hurt, ranks, plan, show)
    weights = None
    if compare and launches[-1].code == DONE:
        if not known:
            quietly, _ = _through(quiet, ranks, Plan(()), show)
            _checked(quietly[-1], RunFolder(quiet.run.path))
        weights = same_weights(hurt, quiet)
    found = rows(plan, fired(folder.path / LOG), read_jsonl(folder.events), launches, folder.stacks)
    return Outcome(
        folder, found, launches, launches[-1].code, left, sorted(map(str, folder.path.rglob(".*.partial"))), goodput(folder),
        goodput(RunFolder(quiet.run.path)) if compare and weights is not None else None, weights,
    )  # fmt: skip


def comparable(run: RunConfig, plan: Plan) -> bool:
    """Whether the run can end with a quiet run's weights: not if it leaves out a step that another try would cure."""
    return run.guard.retry or all(fault.kind != "nan" for fault in plan.faults)


def _known(quiet: RunConfig, ranks: int) -> bool:
    """Whether the quiet run has been made before, on as many ranks: on others sums are rounded otherwise. Raises ConfigError
    where its folder holds another run."""
    folder = RunFolder(quiet.run.path)
    if not folder.path.exists():
        return False
    events = read_jsonl(folder.events)
    ended = [e.get("finished") for e in events if e["event"] == "end"]
    others = {e.get("ranks") for e in events if e["event"] == "start"} - {ranks}
    if others:
        told = ", ".join(map(str, others))
        raise ConfigError(f"{folder.path}: was made on {told} ranks, not {ranks}: remove it, or use --no-compare")
    if ended and ended[-1] and not differences(load_config(folder.path), quiet):
        return True
    raise ConfigError(f"{folder.path}: holds another run: remove it, give another run.name, or use --no-compare")


def _through(run: RunConfig, ranks: int, plan: Plan, show: Show) -> tuple[list[Launch], list[str]]:
    """Launch a run until it ends of itself; all launches, and the processes that outlived one for too long."""
    folder = RunFolder(run.run.path)
    folder.make()
    write_file(folder.config, to_toml(run).encode())
    if plan.faults:
        write_file(folder.path / PLAN, write_plan(plan).encode())
    launches, left = list[Launch](), list[str]()
    while True:
        before = fired(folder.path / LOG).keys()
        launch, outlived = _launch(run, ranks, plan, show)
        launches.append(launch)
        left += outlived
        struck = [plan.faults[number] for number in fired(folder.path / LOG).keys() - before]
        asked = {fault.kind for fault in struck} & {"launcher", "node", "preempt"}
        if launch.code == USER_ERROR:
            _checked(launch, folder)
        if not asked or launch.code not in (PREEMPTED, -9):
            return launches, left


def _launch(run: RunConfig, ranks: int, plan: Plan, show: Show) -> tuple[Launch, list[str]]:
    folder = RunFolder(run.run.path)
    command = [sys.executable, "-P", "-m", "mikoshi.launch.chaos.run", str(folder.config), str(ranks)]
    command += [str(folder.path / PLAN)] if plan.faults else []
    ran = run_apart(command, folder.path / OUTPUT, lambda: show(_progress(run, plan)))
    return Launch(ran.began, ran.ended, ran.code, ran.emptied), ran.outlived


def _progress(run: RunConfig, plan: Plan) -> Progress:
    folder = RunFolder(run.run.path)
    struck = [plan.faults[number] for number in fired(folder.path / LOG)] if plan.faults else []
    return Progress(run.run.name, _last_step(folder.metrics), run.train.steps, struck)


def _last_step(metrics: Path) -> int:
    """Of the last whole record, from the file's end: it grows long."""
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


def _checked(launch: Launch, folder: RunFolder) -> None:
    """Raises RunError, with the last of what it said, where a launch did not end well."""
    if launch.code != DONE:
        said = (folder.path / OUTPUT).read_text(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        raise RunError(f"{folder.path}: ended with exit code {launch.code}: {(errors or said or ['it said nothing'])[-1]}")


def same_weights(one: RunConfig, other: RunConfig) -> bool:
    """Whether the newest checkpoints of two runs are of their last step, sound, and the same to the bit."""
    stores = [checkpoints_of(RunFolder(run.run.path), run) for run in (one, other)]
    last = one.train.steps
    if any(store.steps()[:1] != [last] or problem_of(store, last) for store in stores):
        return False
    ours, theirs = (read_manifest(store, last).files for store in stores)
    return ours == theirs


def main() -> int:
    """One launch: CONFIG RANKS [PLAN]. It dies with the command that started it."""
    from mikoshi.launch.controller.supervisor import Job, supervise
    from mikoshi.trainer.train.rank import train_supervised

    open_streams(unread=True)
    die_with_parent()
    run, ranks = load_config(Path(sys.argv[1])), int(sys.argv[2])
    plan = read_plan(Path(sys.argv[3]), ranks) if len(sys.argv) > 3 else None
    return supervise(Job(ranks, train_supervised, (run, plan), RunFolder(run.run.path), run.recovery))


if __name__ == "__main__":
    sys.exit(main())
