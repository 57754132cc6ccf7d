"""From a config to a job that waits in the cluster's queue: all of it, or nothing is left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.backends.base import Backend
from mikoshi.launch.config.cluster import Base, Cluster, KubernetesCluster
from mikoshi.launch.config.paths import named, typed
from mikoshi.launch.config.private_env import applied, chosen
from mikoshi.launch.runs.record import Attempt, Request, Spec, Submitted, create, new_spec
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.run import LONGEST_NAME, MOST_BYTES, RunConfig, load_config
from mikoshi.trainer.config.toml import is_unicode
from mikoshi.trainer.errors import ConfigError, LaunchError
from mikoshi.trainer.record.run_folder import RunFolder

LARGEST_SWEEP = 1000
_TRIED = 64


@dataclass(frozen=True)
class Plan:
    """What would be submitted. layout: in words; fewer: the other numbers of nodes that the run can go on with, of those that
    were tried; unseen: why the data was not looked at, if it was not."""

    spec: Spec
    request: Request
    layout: str
    fewer: tuple[int, ...] = ()
    unseen: str = ""
    swept: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder, on this machine."""
        return place_of(self.spec)

    @property
    def run(self) -> Submitted:
        """As it would be, nothing being written yet."""
        return Submitted(RunFolder(self.folder), self.spec)


def place_of(spec: Spec) -> Path:
    """Where a run's folder is on this machine: where its nodes see it, or, where pods have a disk of their own, its record
    below the current folder."""
    return _here(spec.cluster, spec.workdir) / spec.config.run.path


def _here(cluster: Base, workdir: str) -> Path:
    if isinstance(cluster, KubernetesCluster) and not Path(workdir).is_dir():
        return Path.cwd()
    return Path(workdir)


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    nodes: int | None = None,
    min_nodes: int | None = None,
    swept: dict[str, str] | None = None,
) -> Plan:
    """Check everything that can be known before a node is asked for. Raises LaunchError, LayoutError, ConfigError or DataError.

    nodes: default as the cluster file has it. min_nodes: default recovery.min_nodes, else all of them."""
    wanted = nodes or cluster.nodes
    request = Request(nodes=wanted, min_nodes=least(config, wanted, min_nodes), time=time.time())
    workdir = str(Path(cluster.workdir).expanduser().absolute()) if cluster.workdir else str(Path.cwd())
    if not is_unicode(workdir):
        raise LaunchError(f"workdir = {workdir!a}: not UTF-8 text: rename the folder")
    spec = new_spec(config, cluster, Path(workdir))
    layout, fewer = layouts(config, cluster, request)
    unseen = look_ahead(spec, wanted)
    return Plan(spec, request, layout, fewer, unseen, swept or {})


def least(config: RunConfig, nodes: int, given: int | None) -> int:
    """With how few nodes a run goes on. Raises LaunchError."""
    asked = given or config.recovery.min_nodes or nodes
    if given and given > nodes:
        raise LaunchError(f"--min-nodes {given}: more than the {nodes} of --nodes: give {nodes} or fewer")
    return min(asked, nodes)


def layouts(config: RunConfig, cluster: Base, request: Request) -> tuple[str, tuple[int, ...]]:
    """The layout of all nodes in words, and the smaller numbers of nodes that can be laid out too. Raises LayoutError, or
    LaunchError where the smallest number that was asked for cannot be."""
    from mikoshi.trainer.engines.layout import layout_of

    whole = layout_of(config, request.nodes * cluster.ranks)
    fewer = []
    for nodes in range(request.nodes - 1, request.min_nodes - 1, -1)[:_TRIED]:
        with contextlib.suppress(LayoutError):
            layout_of(config, nodes * cluster.ranks)
            fewer.append(nodes)
    if request.min_nodes < request.nodes:
        try:
            layout_of(config, request.min_nodes * cluster.ranks)
        except LayoutError as error:
            can = ", ".join(map(str, (*reversed(fewer), request.nodes)))
            raise LaunchError(
                f"--min-nodes {request.min_nodes}: {str(error).splitlines()[0]}; numbers of nodes that work: {can}"
            ) from None
    p = config.parallel
    degrees = " ".join(f"{name}={size}" for name, size in (("tp", p.tp), ("pp", p.pp), ("cp", p.cp), ("ep", p.ep)) if size > 1)
    told = f"{whole.world} ranks, {cluster.ranks} a node{f', {degrees}' if degrees else ''}, ZeRO {whole.zero}"
    return told, tuple(reversed(fewer))


def _check_wandb(spec: Spec) -> None:
    """Raises ConfigError where ranks will have no key for Weights & Biases: of the one who submits they see, but on the same
    machine, only the variables that the cluster file names, and in a pod no file."""
    from mikoshi.trainer.record.wandb import check_key

    cluster = spec.cluster
    env = {name: os.environ.get(name, "") for name in cluster.secrets} | cluster.env
    if cluster.kind == "local":
        check_key(spec.config.log.wandb, os.environ | env, Path.home())
    else:
        home = None if isinstance(cluster, KubernetesCluster) else Path.home()
        way = 'set WANDB_API_KEY and give secrets = ["WANDB_API_KEY"] in the cluster file'
        check_key(spec.config.log.wandb, env, home, way)


def look_ahead(spec: Spec, nodes: int) -> str:
    """Check data, tokenizer and vocabulary where the nodes see them; why not, where the folder is on the disk of pods alone.
    Raises LaunchError where it should be on this machine too."""
    from mikoshi.trainer.train.preflight import foresee

    if spec.config.log.wandb and "WANDB" not in spec.cluster.setup:
        _check_wandb(spec)
    workdir = Path(spec.workdir)
    if not workdir.is_dir():
        if not isinstance(spec.cluster, KubernetesCluster):
            raise LaunchError(f"workdir = {spec.workdir!r}: no such folder: mend it in the cluster file, or make the folder")
        return f"{workdir} is not on this machine: the data is checked when the run starts"
    with contextlib.chdir(workdir), applied(spec.cluster.env):
        foresee(spec.config, nodes * spec.cluster.ranks)
    return ""


def submit(plan: Plan, backend: Backend) -> tuple[Submitted, Attempt]:
    """Hand a run to the cluster. After an error there is no run folder that was not there before, and no job."""
    return submit_all([plan], backend)[0]


def submit_all(plans: Sequence[Plan], backend: Backend) -> list[tuple[Submitted, Attempt]]:
    """Hand over several runs: all, or none."""
    with contextlib.ExitStack() as undo:
        made = []
        for plan in plans:
            run = _created(plan, undo)
            if plan.swept:
                write_file(run.folder.path / "sweep.json", json.dumps(plan.swept, indent=2).encode())
            made.append((run, run.add(plan.request)))
        if len(made) > 1 and plans[0].spec.cluster.kind == "slurm":
            from mikoshi.launch.backends.slurm.slurm import array_folder, submit_array

            jobs = submit_array(made)
            undo.callback(shutil.rmtree, array_folder(made[0][0]), ignore_errors=True)
            for (_, attempt), job in zip(made, jobs, strict=True):
                undo.callback(_call_back, backend, job)
                attempt.write_job(job)
        else:
            for run, attempt in made:
                hand_over(run, attempt, backend, undo)
        undo.pop_all()  # all is well: nothing is undone
        return made


def _created(plan: Plan, undo: contextlib.ExitStack) -> Submitted:
    """The run folder, which `undo` takes away. One that somebody else makes at the same time is theirs."""
    before = _entries(plan.folder)
    try:
        run = create(plan.spec, plan.folder)
    except BaseException:
        if before is None:
            with contextlib.suppress(OSError):  # not empty: somebody else's
                plan.folder.rmdir()
        raise
    undo.callback(_restore, plan.folder, before)
    return run


def hand_over(run: Submitted, attempt: Attempt, backend: Backend, undo: contextlib.ExitStack) -> None:
    """Submit an attempt and record its job; `undo` calls the job back if what follows fails."""
    job = backend.submit(run, attempt)
    undo.callback(_call_back, backend, job)
    attempt.write_job(job)


def _call_back(backend: Backend, job: dict[str, str]) -> None:
    """A job that could not be recorded, or whose companions could not be submitted, must not run."""
    with tempfile.TemporaryDirectory(prefix="mikoshi-") as folder:  # the run's own may be what cannot be written
        stand_in = Attempt(Path(folder) / "1")
        stand_in.path.mkdir()
        stand_in.write_job(job)
        with contextlib.suppress(LaunchError):  # what went wrong first is what is told
            backend.cancel(stand_in, now=True)


def _entries(folder: Path) -> set[str] | None:
    """What is in a folder; None where there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


def _restore(folder: Path, before: set[str] | None) -> None:
    """Leave in a folder what was in it before."""
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check(plan: Plan, backend: Backend) -> None:
    """Refuse what would fail: a run of this name, a secret that is not set, a cluster that cannot carry it. Raises
    LaunchError."""
    if any((plan.folder / name).exists() for name in ("spec.json", "config.toml")):
        raise LaunchError(
            f"{named(plan.folder)}: a run of this name is there already: `mikoshi resume {typed(plan.folder)}` goes on "
            "with it, run.name=... makes another"
        )
    chosen(plan.spec.cluster, os.environ)
    backend.check(plan.run, plan.request)


def sweep_plans(
    path: Path, overrides: Sequence[str], sweeps: Sequence[str], cluster: Cluster, nodes: int | None, min_nodes: int | None
) -> list[Plan]:  # fmt: skip
    """A plan for every combination of the swept values, named NAME-000 and so on. Raises LaunchError."""
    if cluster.kind in ("local", "ssh"):
        raise LaunchError(f"--sweep: a cluster of kind {cluster.kind} has no queue: submit the runs one after the other")
    axes = dict(axis(text) for text in sweeps)
    if "run.name" in axes:
        raise LaunchError("--sweep run.name: the runs of a sweep are named by it, NAME-000 and on: leave it out")
    if len(axes) < len(sweeps):
        raise ConfigError(f"--sweep: {', '.join(text.partition('=')[0] for text in sweeps)}: name each key once")
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > LARGEST_SWEEP:
        raise LaunchError(f"--sweep: {len(combinations)} runs: {LARGEST_SWEEP} at most; sweep fewer values at a time")
    plans = []
    for number, values in enumerate(combinations):
        swept = dict(zip(axes, values, strict=True))
        config = load_config(path, [*overrides, *(f"{key}={value}" for key, value in swept.items())])
        name = f"{config.run.name}-{number:03d}"
        if len(name) > LONGEST_NAME or len(name.encode()) > MOST_BYTES:
            most = f"{LONGEST_NAME - 4} signs at most, of {MOST_BYTES - 4} bytes"
            raise LaunchError(f"run.name = {config.run.name!r}: with its number too long: {most}")
        run = config.run.model_copy(update={"name": name})
        plans.append(make_plan(config.model_copy(update={"run": run}), cluster, nodes, min_nodes, swept))
    return plans


def axis(text: str) -> tuple[str, list[str]]:
    """A swept key and its values: commas inside brackets or quotes do not part them. Raises ConfigError."""
    key, equals, rest = text.partition("=")
    values, depth, quote = [""], 0, ""
    for sign in rest:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        depth += 0 if quote else (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += sign
    values = [value.strip() for value in values]
    if not equals or not key.strip() or not all(values):
        raise ConfigError(f"--sweep {text!r}: give a key and its values, such as optim.lr=1e-3,3e-4")
    if len(set(values)) < len(values):
        raise ConfigError(f"--sweep {text!r}: a value stands there twice")
    return key.strip(), values
