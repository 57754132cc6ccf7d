"""Runs the contestants of a comparison one after another, in rounds, in a child process. Nothing of them outlives it."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from mikoshi.data.io.cores import cores
from mikoshi.data.io.json import dumps
from mikoshi.launch.controller.supervisor import Job, running_fork_server, supervise
from mikoshi.launch.host.gpus import query_gpus
from mikoshi.launch.host.session import run_in_session
from mikoshi.parallel.process.parent_death import die_with_parent
from mikoshi.trainer.compare.comparison import CONTESTANT, OUTPUT, RUNS, ComparisonPlan, read_comparison_plan, run_of
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.exit_codes import DONE
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.streams import open_streams
from mikoshi.trainer.train.trial import trial_rank

_PACKAGES = ("mikoshi", "torch", "deepspeed", "megatron-core", "transformer-engine", "numpy")


@dataclass(frozen=True)
class ComparisonProgress:
    """The progress of a comparison.

    done, runs: runs that have ended, and all runs
    turn, name, step: round, contestant and step of the current run
    left: seconds until all have ended; None while that is unknown
    last: the record of the run that ended last
    """

    done: int
    runs: int
    turn: int
    name: str
    step: int
    left: float | None
    last: dict[str, Any] | None


Show = Callable[[ComparisonProgress], None]


def machine() -> dict[str, Any]:
    """Describe this machine: processor, usable cores, memory in bytes, names of the GPUs."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "gpus": [gpu["name"] for gpu in query_gpus()["gpus"]],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that compute."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_rounds(out: Path, show: Show) -> None:
    """Run the plan in `out` to its end. An exception, such as Ctrl-C, ends every process of it.

    show: called with the progress every moment
    """
    plan = read_comparison_plan(out)
    command = [sys.executable, "-P", "-m", "mikoshi.launch.controller.rounds", str(out)]
    run_in_session(command, out / OUTPUT, lambda: show(_progress(plan, out)))


def _progress(plan: ComparisonPlan, out: Path) -> ComparisonProgress:
    records = read_jsonl(out / RUNS)
    ended, begun = [r for r in records if "ended" in r], [r for r in records if "ended" not in r]
    failed = {r["contestant"] for r in ended if r["code"] != DONE}
    done = {(r["round"], r["contestant"]) for r in ended}
    ahead = [turn for turn in plan.schedule if turn not in done and turn[1] not in failed]
    turn, number = ahead[0] if ahead else plan.schedule[-1]
    one = plan.contestants[number]
    running = len(begun) > len(ended)
    step = len(read_jsonl(RunFolder(out / one.folder / f"round-{turn}").metrics)) if running and ahead else 0
    passed = time.time() - records[0]["began"] if records else 0.0
    share = len(ended) + step / plan.steps
    left = passed / share * (len(ahead) - step / plan.steps) if share else None
    last = ended[-1] if ended else None
    return ComparisonProgress(len(ended), len(ended) + len(ahead), turn, one.name, step, left, last)


def main() -> int:
    """Run the plan in the folder OUT. The process dies with the command that started it."""
    open_streams(unread=True)
    die_with_parent()
    out = Path(sys.argv[1])
    plan = read_comparison_plan(out)
    failed = set[int]()
    with running_fork_server(plan.ranks):  # one fork server for the ranks of all runs
        for turn, number in plan.schedule:
            if number not in failed and _run(plan, out, turn, number) != DONE:
                failed.add(number)  # it would fail again
    return DONE


def _run(plan: ComparisonPlan, out: Path, turn: int, number: int) -> int:
    folder = out / plan.contestants[number].folder
    run = run_of(load_config(folder / CONTESTANT), folder, turn)
    name = plan.contestants[number].name
    record = {"contestant": number, "name": name, "round": turn, "began": round(time.time(), 3)}
    _append_record(out, record)
    offset = (out / OUTPUT).stat().st_size
    RunFolder(run.run.path).make()
    code = supervise(Job(plan.ranks, trial_rank, (run, plan.steps), RunFolder(run.run.path), run.recovery))
    why = _why(out / OUTPUT, offset, code) if code != DONE else ""
    _append_record(out, record | {"ended": round(time.time(), 3), "code": code, "why": why})
    return code


def _append_record(out: Path, record: dict[str, Any]) -> None:
    with (out / RUNS).open("a", encoding="utf-8") as log:
        log.write(dumps(record) + "\n")


def _why(output: Path, start: int, code: int) -> str:
    """The first error in a run's output from byte `start` on, else its last line."""
    with output.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    shown = errors[:1] or [line for line in lines if line.strip()][-1:] or ["it said nothing"]
    return f"exit code {code}: {shown[0][:500]}"


if __name__ == "__main__":
    sys.exit(main())
