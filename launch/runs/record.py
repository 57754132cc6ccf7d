"""The records of a submitted run: spec.json, written once, and one folder for every attempt. Files are complete or absent.

runs/NAME/
    spec.json          what was submitted: config, cluster, id; never changed
    sweep.json         the values that a sweep gave the run
    attempts/N/        one start of the run on one set of nodes (a job that is queued again is another attempt)
        request.json   number of nodes, nodes to avoid, and the cause of the attempt; never changed
        job.json       how the scheduler identifies it
        started.json   its nodes, and the head process
        settings.json  the variables of the ranks, each with its reason
        status.json    a sign of life, rewritten every few seconds
        stop.json      a request to stop: by whom and how
        head.log  node-NAME.log  rank-R.log
        result.json    how it ended
    events.jsonl, metrics.jsonl, checkpoints/ ...  see record.run_folder
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from mikoshi.data.io.atomic import create_file, write_file
from mikoshi.launch.config.cluster import Cluster
from mikoshi.launch.config.names import Host
from mikoshi.launch.config.paths import printable, shell_quoted
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.config.data import Count, Natural, Section

FORMAT = 1
M = TypeVar("M", bound=BaseModel)


class Spec(Section):
    """spec.json. workdir: the folder on every node that relative paths of the config start from."""

    format: Natural = FORMAT
    id: str
    mikoshi: str
    created: float
    workdir: str
    config: RunConfig
    cluster: Cluster


class Request(Section):
    """request.json.

    nodes: number of nodes
    min_nodes: number of nodes with which the run continues when some are lost
    exclude: nodes that the user has named
    bad: nodes that were found bad; they are used if there are too few others
    """

    nodes: Count
    min_nodes: Count
    exclude: list[Host] = Field([])
    bad: list[Host] = Field([])
    cause: Literal["submit", "resume", "requeue"] = "submit"
    time: float

    @property
    def avoided(self) -> list[str]:
        """All nodes to avoid, each once."""
        return list(dict.fromkeys([*self.exclude, *self.bad]))


class Started(Section):
    """started.json.

    host, pid: of the head process
    began: psutil's start time of that process
    """

    host: str
    pid: int
    began: float
    nodes: list[str]
    ranks_per_node: int
    time: float


class Status(Section):
    """status.json. nodes: the nodes whose ranks run now."""

    time: float
    phase: Literal["starting", "running", "stopping"]
    nodes: list[str]
    lost: list[str] = Field([])
    restarts: int = 0


class Stop(Section):
    """stop.json. now: stop without a checkpoint."""

    time: float
    by: str
    now: bool


class Result(Section):
    """result.json.

    state: how the attempt ended
    next: what follows by itself, if anything does
    """

    state: Literal["done", "cancelled", "stopped", "failed", "refused"]
    code: int
    why: str
    time: float
    bad_nodes: list[str] = Field([])
    next: Literal["", "requeued"] = ""


@dataclass(frozen=True)
class Attempt:
    """One folder of attempts/. Properties read its records, and raise LaunchError where one is damaged."""

    path: Path

    @property
    def number(self) -> int:
        """The attempt's number, counted from 1."""
        return int(self.path.name)

    @property
    def head_log(self) -> Path:
        """The log of the head process."""
        return self.path / "head.log"

    @property
    def settings(self) -> Path:
        """The file with the variables that were set, and their reasons."""
        return self.path / "settings.json"

    def node_log(self, node: str) -> Path:
        """The log of a node's agent."""
        return self.path / f"node-{node}.log"

    def rank_log(self, rank: int) -> Path:
        """The log of a global rank."""
        return self.path / f"rank-{rank}.log"

    @property
    def is_requested(self) -> bool:
        """Whether its request exists. The folder is made a moment before it."""
        try:
            return os.stat(f"{self.path}/request.json").st_size > 0  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return False

    @property
    def request(self) -> Request:
        """What was requested. Raises LaunchError if it is missing."""
        found = read_record(f"{self.path}/request.json", Request)
        if found is None:
            raise LaunchError(f"{self.path / 'request.json'}: missing: this attempt was never asked for; remove its folder")
        return found

    @property
    def job(self) -> dict[str, str]:
        """What the backend needs to find the job; empty until the scheduler has answered, and where it is damaged."""
        try:
            return self.read_job()
        except LaunchError:
            return {}

    def read_job(self) -> dict[str, str]:
        """The same, but raises LaunchError where it is damaged."""
        file = f"{self.path}/job.json"
        try:
            found = json.loads(read_bytes(file))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise LaunchError(f"{printable(file)}: cannot be read: {error.strerror}") from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise LaunchError(f"{printable(file)}: damaged: what the job is called is not known; remove it once no job of it runs")
        return {str(key): str(value) for key, value in found.items()}

    @property
    def started(self) -> Started | None:
        """The record of the attempt's start, or None before it."""
        return read_record(f"{self.path}/started.json", Started)

    @property
    def status(self) -> Status | None:
        """The last sign of life, or None. A damaged one is None too, since it only reports progress."""
        with contextlib.suppress(LaunchError):
            return read_record(f"{self.path}/status.json", Status)
        return None

    @property
    def stop(self) -> Stop | None:
        """The request to stop, or None."""
        return read_record(f"{self.path}/stop.json", Stop)

    @property
    def result(self) -> Result | None:
        """How the attempt ended, or None."""
        return read_record(f"{self.path}/result.json", Result)

    @property
    def nodes_to_avoid(self) -> list[str]:
        """Nodes that the next attempt should avoid, without earlier bad ones that this attempt has used."""
        used, result = self.started.nodes if self.started else [], self.result
        return list(dict.fromkeys([*(n for n in self.request.bad if n not in used), *(result.bad_nodes if result else [])]))

    def write(self, record: Request | Started | Status | Stop | Result) -> None:
        """Write a record to its file, atomically."""
        write_file(self.path / f"{type(record).__name__.lower()}.json", record.model_dump_json(indent=2).encode())

    def write_job(self, job: dict[str, str]) -> None:
        """Write what the backend needs to find the job, atomically."""
        write_file(self.path / "job.json", json.dumps(job, indent=2).encode())


@dataclass(frozen=True)
class SubmittedRun:
    """A run that was submitted: its folder, spec and attempts."""

    folder: RunFolder
    spec: Spec

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first. Folders without a request do not count."""
        return [attempt for attempt in self._folders() if attempt.is_requested]

    def _folders(self) -> list[Attempt]:
        with contextlib.suppress(FileNotFoundError):
            names = [path.name for path in (self.folder.path / "attempts").iterdir() if path.name.isdigit()]
            return [Attempt(self.folder.path / "attempts" / name) for name in sorted(names, key=int)]
        return []

    def add(self, request: Request) -> Attempt:
        """Make the folder of a new attempt, with its request, after the last one.

        Two concurrent calls get one each. A folder without a request, whose maker was killed, is reused.
        """
        number = max((attempt.number for attempt in self.attempts), default=0) + 1
        while True:
            attempt = Attempt(self.folder.path / "attempts" / str(number))
            attempt.path.mkdir(parents=True, exist_ok=True)
            try:
                create_file(attempt.path / "request.json", request.model_dump_json(indent=2).encode())
            except FileExistsError:
                number += 1
            except FileNotFoundError:  # the folder of a failed submission has just been removed
                continue
            except BaseException:
                with contextlib.suppress(OSError):
                    attempt.path.rmdir()
                raise
            else:
                return attempt


def new_spec(config: RunConfig, cluster: Cluster, workdir: Path) -> Spec:
    """Build the spec of a new run.

    workdir: the folder on every node that relative paths start from
    """
    from importlib.metadata import version

    return Spec(
        id=uuid.uuid4().hex,
        mikoshi=version("mikoshi"),
        created=time.time(),
        workdir=str(workdir),
        config=config,
        cluster=cluster,
    )


def create_run(spec: Spec, at: Path | None = None) -> SubmittedRun:
    """Make the run folder with its spec. Raises LaunchError if a run of this name exists.

    at: the folder on this machine, if the nodes have disks of their own
    """
    path = at or Path(spec.workdir) / spec.config.run.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / "config.toml").exists() and not (path / "spec.json").exists():
            raise FileExistsError
        # Of two concurrent submissions of one name, one fails here.
        create_file(path / "spec.json", spec.model_dump_json(indent=2, exclude_none=True).encode())
    except FileExistsError:
        raise LaunchError(
            f"{printable(path)}: a run of this name is there already: `mikoshi resume {shell_quoted(path)}` goes on with it, "
            "run.name=... makes another"
        ) from None
    except OSError as error:
        raise LaunchError(f"run.folder: cannot write to {path}: {error.strerror}; choose another run.folder") from None
    return SubmittedRun(RunFolder(path), spec)


def open_submitted(path: Path) -> SubmittedRun:
    """Open a run that was submitted before. Raises LaunchError if there is none, or if its format is newer."""
    file = path / "spec.json"
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LaunchError(
            f"{printable(path)}: not a submitted run (it has no spec.json): give a folder that `mikoshi submit` made"
        ) from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"{printable(file)}: cannot be read: {error}") from None
    kind = head.get("format") if isinstance(head, dict) else None
    if not isinstance(kind, int) or kind > FORMAT:
        made = head.get("mikoshi", "?") if isinstance(head, dict) else "?"
        raise unsupported_format(file, kind, made)
    spec = read_record(file, Spec)
    assert spec is not None
    return SubmittedRun(RunFolder(path), spec)


def unsupported_format(file: Path, kind: object, made: object) -> LaunchError:
    """The error for a spec.json of another format."""
    return LaunchError(f"{printable(file)}: format {kind} of Mikoshi {made}, and this one reads {FORMAT}: update Mikoshi here")


def read_bytes(path: str) -> bytes:
    """Read a small file. Raises OSError.

    It takes half the time of Path.read_bytes, which matters for a thousand runs.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(handle, 1 << 16), b""))
    finally:
        os.close(handle)


def read_record(path: Path | str, model: type[M]) -> M | None:
    """Read a record, or None if it does not exist. Raises LaunchError where it is damaged."""
    try:
        return model.model_validate_json(read_bytes(str(path)), strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        mend = "remove it" if model in (Started, Status, Stop, Result) else f"move {printable(Path(path).parent)} away"
        raise LaunchError(f"{printable(path)}: damaged: {where}{first['msg']}; {mend}") from None


def exists(path: Path | str) -> bool:
    """Whether a file or folder exists. Raises OSError if that is unknown, as on a disk that does not answer."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
