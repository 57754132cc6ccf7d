"""Small runs on a cluster, through the command line: submitted, watched, and compared with runs that nothing disturbed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import tomli_w

from mikoshi.launch.runs.record import SubmittedRun, open_submitted
from mikoshi.trainer.checkpoint.of_run import checkpoints_of
from mikoshi.trainer.checkpoint.restore import problem_of
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from runs import run_config

SLOW = {"layers": 4, "width": 128, "mlp_width": 256}
"""A model whose step takes long enough (some 0.1 s on a core) for something to happen within a run of a minute."""


def write_run(folder: Path, dataset: Path, name: str = "run", steps: int = 10, **sections) -> Path:
    """A run's TOML in `folder`, whose run folder is folder/runs/NAME."""
    train = {"steps": steps, **sections.pop("train", {})}
    run = {"name": name, "folder": "runs"}
    made = run_config(dataset, Path("runs"), run=run, train=train, engine={"device": "cpu"}, **sections)
    file = folder / f"{name}.toml"
    file.write_text(to_toml(made))
    return file


def write_cluster(folder: Path, **fields) -> Path:
    """A cluster's TOML in `folder`, for runs that start from there."""
    file = folder / "cluster.toml"
    file.write_text(tomli_w.dumps({"workdir": str(folder), "python": sys.executable, **fields}))
    return file


def mikoshi(folder: Path, *arguments, env=None, timeout=120.0) -> subprocess.CompletedProcess:
    """A command as a user gives it, from `folder`."""
    program = [sys.executable, "-P", "-m", "mikoshi", *map(str, arguments)]
    more = {**os.environ, **(env or {})}
    return subprocess.run(program, cwd=folder, env=more, capture_output=True, text=True, timeout=timeout)


def opened(folder: Path, name: str = "run") -> SubmittedRun:
    """The run of that name."""
    return open_submitted(folder / "runs" / name)


def until(true, what: str, seconds: float = 60.0, run: SubmittedRun | None = None):
    """Wait for something, and return it. Fails with all that the run has said when it does not come."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{words(run) if run else ''}"
        time.sleep(0.05)
    return found


def ended(run: SubmittedRun, number: int = -1, seconds: float = 120.0):
    """The result of an attempt, waited for; number: 1 for the first, -1 for the newest there is then."""

    def result():
        attempts = run.attempts
        wanted = attempts[-1] if number < 0 else next((a for a in attempts if a.number == number), None)
        return wanted.result if wanted is not None else None

    return until(result, f"attempt {number} ends", seconds, run)


def step_of(run: SubmittedRun) -> int:
    """The last step in the run's metrics."""
    records = read_jsonl(run.folder.metrics)
    return max((record.get("step", 0) for record in records), default=0)


def events(run: SubmittedRun, kind: str) -> list[dict]:
    return [event for event in read_jsonl(run.folder.events) if event.get("event") == kind]


def words(run: SubmittedRun) -> str:
    """What everyone has said, for the message of a test that fails."""
    told = [f"--- {file}\n{file.read_text(errors='replace')[-2000:]}" for file in sorted(run.folder.path.glob("slurm-*.out"))]
    for attempt in run.attempts:
        files = [*sorted(attempt.path.glob("*.log")), *sorted(attempt.path.glob("*.json"))]
        told += [f"--- {file}\n{file.read_text(errors='replace')[-2000:]}" for file in files]
    return "\n".join(told)


def digests(run: SubmittedRun) -> dict:
    """Of every file of the last step's checkpoint, which must be sound: equal for equal weights, to the bit."""
    store = checkpoints_of(RunFolder(run.folder.path), run.spec.config)
    last = run.spec.config.train.steps
    assert store.steps()[:1] == [last], f"newest checkpoints {store.steps()}, not of step {last}"
    assert not problem_of(store, last)
    return json.loads(json.dumps(read_manifest(store, last).files, default=str))
