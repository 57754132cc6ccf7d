"""What a submitted run is, in its folder alone: asked for once in spec.json, then one folder for every attempt at it.

runs/NAME/
    spec.json          what was submitted: config, cluster, identity; never changed
    sweep.json         of one run of a sweep: the values that it was given
    attempts/N/        one start of the run on one set of nodes (a job that is queued again is another attempt)
        request.json   how many nodes, which to avoid, and why there is this attempt; never changed
        job.json       what the scheduler calls it
        started.json   which nodes it got, and the process that leads it
        settings.json  the variables that were set, each with its reason
        status.json    a sign of life, rewritten every few seconds
        stop.json      that it was asked to stop, by whom and how
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
from mikoshi.launch.config.paths import named, typed
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.config.data import Count, Natural, Section

FORMAT = 1
M = TypeVar("M", bound=BaseModel)


class Spec(Section):
    """spec.json. workdir: the folder that relative paths of the config start from, on every node."""

    format: Natural = FORMAT
    id: str
    mikoshi: str
    created: float
    workdir: str
    config: RunConfig
    cluster: Cluster


class Request(Section):
    """request.json. nodes: how many; min_nodes: with how few the run goes on when some are lost. exclude: nodes that people
    have named; bad: those that were found bad, which are used all the same where there are too few others."""

    nodes: Count
    min_nodes: Count
    exclude: list[Host] = Field([])
    bad: list[Host] = Field([])
    cause: Literal["submit", "resume", "requeue"] = "submit"
    time: float

    @property
    def avoided(self) -> list[str]:
        """Nodes to do without, each once."""
        return list(dict.fromkeys([*self.exclude, *self.bad]))


class Started(Section):
    """started.json. pid, began: of the process that leads the attempt, and psutil's time of its start; host: where it runs."""

    host: str
    pid: int
    began: float
    nodes: list[str]
    ranks_per_node: int
    time: float


class Status(Section):
    """status.json. phase: starting, running, stopping. nodes: those that carry the run now."""

    time: float
    phase: Literal["starting", "running", "stopping"]
    nodes: list[str]
    lost: list[str] = Field([])
    restarts: int = 0


class Stop(Section):
    """stop.json. now: without a checkpoint."""

    time: float
    by: str
    now: bool


class Result(Section):
    """result.json. state: how the attempt ended; next: what follows by itself, if anything does."""

    state: Literal["done", "cancelled", "stopped", "failed", "refused"]
    code: int
    why: str
    time: float
    bad_nodes: list[str] = Field([])
    next: Literal["", "requeued"] = ""


@dataclass(frozen=True)
class Attempt:
    """One folder of attempts/."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def head_log(self) -> Path:
        return self.path / "head.log"

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    def node_log(self, node: str) -> Path:
        return self.path / f"node-{node}.log"

    def rank_log(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.log"

    @property
    def asked_for(self) -> bool:
        """Whether its request is there: its folder is made a moment before."""
        try:
            return os.stat(f"{self.path}/request.json").st_size > 0  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return False

    @property
    def request(self) -> Request:
        found = read(f"{self.path}/request.json", Request)
        if found is None:
            raise LaunchError(f"{self.path / 'request.json'}: missing: this attempt was never asked for; remove its folder")
        return found

    @property
    def job(self) -> dict[str, str]:
        """What the backend needs to find it again; empty until the scheduler has answered, and where it is damaged."""
        try:
            return self.read_job()
        except LaunchError:
            return {}

    def read_job(self) -> dict[str, str]:
        """The same; raises LaunchError where it is damaged."""
        file = f"{self.path}/job.json"
        try:
            found = json.loads(content(file))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise LaunchError(f"{named(file)}: cannot be read: {error.strerror}") from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise LaunchError(f"{named(file)}: damaged: what the job is called is not known; remove it once no job of it runs")
        return {str(key): str(value) for key, value in found.items()}

    @property
    def started(self) -> Started | None:
        return read(f"{self.path}/started.json", Started)

    @property
    def status(self) -> Status | None:
        """None also where it is damaged: it tells of progress alone."""
        with contextlib.suppress(LaunchError):
            return read(f"{self.path}/status.json", Status)
        return None

    @property
    def stop(self) -> Stop | None:
        return read(f"{self.path}/stop.json", Stop)

    @property
    def result(self) -> Result | None:
        return read(f"{self.path}/result.json", Result)

    @property
    def found_bad(self) -> list[str]:
        """Nodes that another attempt had better do without: not those of before that have carried this one."""
        used, result = self.started.nodes if self.started else [], self.result
        return list(dict.fromkeys([*(n for n in self.request.bad if n not in used), *(result.bad_nodes if result else [])]))

    def write(self, record: Request | Started | Status | Stop | Result) -> None:
        """Put a record in its file, whole or not at all."""
        write_file(self.path / f"{type(record).__name__.lower()}.json", record.model_dump_json(indent=2).encode())

    def write_job(self, job: dict[str, str]) -> None:
        write_file(self.path / "job.json", json.dumps(job, indent=2).encode())


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted: its folder, spec and attempts."""

    folder: RunFolder
    spec: Spec

    @property
    def attempts(self) -> list[Attempt]:
        """From the first to the newest; a folder that was never asked for, its maker having been killed, is none."""
        return [attempt for attempt in self._folders() if attempt.asked_for]

    def _folders(self) -> list[Attempt]:
        with contextlib.suppress(FileNotFoundError):
            names = [path.name for path in (self.folder.path / "attempts").iterdir() if path.name.isdigit()]
            return [Attempt(self.folder.path / "attempts" / name) for name in sorted(names, key=int)]
        return []

    def add(self, request: Request) -> Attempt:
        """The folder of a new attempt, the one after the last. Two that ask at once get one each. What makes an attempt is its
        request: a folder without one, whose maker was killed, is taken."""
        number = max((attempt.number for attempt in self.attempts), default=0) + 1
        while True:
            attempt = Attempt(self.folder.path / "attempts" / str(number))
            attempt.path.mkdir(parents=True, exist_ok=True)
            try:
                create_file(attempt.path / "request.json", request.model_dump_json(indent=2).encode())
            except FileExistsError:
                number += 1
            except FileNotFoundError:  # an attempt that could not be handed over, and its folder, have just been removed
                continue
            except BaseException:
                with contextlib.suppress(OSError):
                    attempt.path.rmdir()
                raise
            else:
                return attempt


def new_spec(config: RunConfig, cluster: Cluster, workdir: Path) -> Spec:
    from importlib.metadata import version

    return Spec(
        id=uuid.uuid4().hex,
        mikoshi=version("mikoshi"),
        created=time.time(),
        workdir=str(workdir),
        config=config,
        cluster=cluster,
    )


def create(spec: Spec, at: Path | None = None) -> Submitted:
    """Make the run's folder with its spec, once; `at`: elsewhere than where its nodes see it, which have a disk of their own.
    Raises LaunchError where there is a run of this name already."""
    path = at or Path(spec.workdir) / spec.config.run.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / "config.toml").exists() and not (path / "spec.json").exists():
            raise FileExistsError
        # Of two that submit one name at once, one is told so.
        create_file(path / "spec.json", spec.model_dump_json(indent=2, exclude_none=True).encode())
    except FileExistsError:
        raise LaunchError(
            f"{named(path)}: a run of this name is there already: `mikoshi resume {typed(path)}` goes on with it, "
            "run.name=... makes another"
        ) from None
    except OSError as error:
        raise LaunchError(f"run.folder: cannot write to {path}: {error.strerror}; choose another run.folder") from None
    return Submitted(RunFolder(path), spec)


def open_submitted(path: Path) -> Submitted:
    """A run that was submitted before. Raises LaunchError, also for one of a newer version."""
    file = path / "spec.json"
    try:
        head = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LaunchError(
            f"{named(path)}: not a submitted run (it has no spec.json): give a folder that `mikoshi submit` made"
        ) from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"{named(file)}: cannot be read: {error}") from None
    kind = head.get("format") if isinstance(head, dict) else None
    if not isinstance(kind, int) or kind > FORMAT:
        made = head.get("mikoshi", "?") if isinstance(head, dict) else "?"
        raise newer(file, kind, made)
    spec = read(file, Spec)
    assert spec is not None
    return Submitted(RunFolder(path), spec)


def newer(file: Path, kind: object, made: object) -> LaunchError:
    """What to say of a spec.json of another format."""
    return LaunchError(f"{named(file)}: format {kind} of Mikoshi {made}, and this one reads {FORMAT}: update Mikoshi here")


def content(path: str) -> bytes:
    """A small file, whole. Takes half as long as Path.read_bytes, which counts where a thousand runs are looked at. Raises
    OSError where it cannot be read."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(handle, 1 << 16), b""))
    finally:
        os.close(handle)


def read(path: Path | str, model: type[M]) -> M | None:
    """A record, or None where there is none yet. Raises LaunchError where it is damaged."""
    try:
        return model.model_validate_json(content(str(path)), strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        mend = "remove it" if model in (Started, Status, Stop, Result) else f"move {named(Path(path).parent)} away"
        raise LaunchError(f"{named(path)}: damaged: {where}{first['msg']}; {mend}") from None


def is_there(path: Path | str) -> bool:
    """Whether a file or folder exists. Raises OSError where that cannot be told, as of a disk that does not answer."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
