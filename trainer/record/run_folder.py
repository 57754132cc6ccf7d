"""The run folder: the one place where everything about a run lies, and what each file in it is called.

runs/NAME/
    config.toml      the resolved config of the newest start
    tokenizer.json   so that text can be generated wherever the data has gone
    chat.json        the chat template of its conversations, where they have one
    events.jsonl     starts, resumes, saves, evaluations, skipped steps, faults, restarts: appended, never rewritten
    metrics.jsonl    one record a step
    checkpoints/     step-NNNNNNNN, see trainer.checkpoint
    guard.json       where the loss guard has gone back, and which batches it left out
    wandb.json       which of Weights & Biases' runs the history goes to
    stacks/          what every rank was doing when one was found hung
    .lock            held by rank 0 while it trains
    tensorboard/
    report.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mikoshi.data.io.atomic import LOCKS_UNSUPPORTED, write_file
from mikoshi.data.io.json import dumps
from mikoshi.trainer.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How the kernel says that there is no room: on the disk, for this user, in this file."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run's folder; the module describes the files."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved config of the newest start."""
        return self.path / "config.toml"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer of the data."""
        return self.path / "tokenizer.json"

    @property
    def chat(self) -> Path:
        """Chat template of the data, if it has one."""
        return self.path / "chat.json"

    @property
    def events(self) -> Path:
        """Log of events, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def rewinds(self) -> Path:
        """Rewinds that the loss guard decided."""
        return self.path / "guard.json"

    @property
    def wandb(self) -> Path:
        """Weights & Biases run that the history goes to."""
        return self.path / "wandb.json"

    @property
    def stacks(self) -> Path:
        """Folder of stack traces of hung ranks."""
        return self.path / "stacks"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard log."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """Report page."""
        return self.path / "report.html"

    def make(self) -> None:
        """Create the folder. Raises RunError where it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise RunError(f"run.folder: cannot write to {self.path}: {error.strerror}; choose another run.folder") from None

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event. A full disk loses the event, with a warning, and does not end the run."""
        record = {"time": round(time.time(), 3), "event": kind, **fields}
        with tolerate_full_disk(self.events), self.events.open("a+", encoding="utf-8") as out:
            out.write("\n" * _cut_short(self.events) + dumps(record) + "\n")

    def lock(self, patience: float = 5.0) -> IO[bytes]:
        """Hold the run for this process until the file returned is closed, or the process dies. Raises RunError if
        another one holds it for longer than `patience` seconds: two trainings of one run would undo each other."""
        file = (self.path / ".lock").open("ab")
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.close()
                    raise RunError(f"{self.path}: another process is training this run: wait for it, or stop it") from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in LOCKS_UNSUPPORTED:
                    raise
                why = f"this file system has no locks ({error.strerror})"
                print(f"warning: {self.path}: {why}: see to it that no other process trains this run", file=sys.stderr)
                return file


@contextlib.contextmanager
def tolerate_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into a warning: a log line that cannot be written does not end training."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"warning: {path}: {error.strerror}: what was to be written there is lost", file=sys.stderr)


def _cut_short(path: Path) -> bool:
    """Whether a kill has left the log's last line without its end."""
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        return bool(size) and (log.seek(size - 1), log.read(1))[1] != b"\n"


def open_run(path: Path) -> RunFolder:
    """An existing run's folder. Raises RunError if there is no run."""
    if not (path / "config.toml").is_file():
        raise RunError(f"{path}: not a run folder (it has no config.toml); give the folder that `mikoshi train` made")
    return RunFolder(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line cut short by a kill is left out."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's steps and evaluations, in which a number that was not finite is NaN."""
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in read_jsonl(path)]


def predicting_steps(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of steps that predicted a token. Means, medians and curves are computed from these only."""
    return [dict(record) for record in records if "loss" in record and record.get("tokens", 1)]


def drop_after(path: Path, step: int) -> None:
    """Remove the metrics of later steps, which the resumed run will repeat."""
    if path.exists():
        kept = [record for record in read_jsonl(path) if record.get("step", 0) <= step]
        write_file(path, "".join(dumps(record) + "\n" for record in kept).encode())
