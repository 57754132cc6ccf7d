"""Submits runs to a cluster. Either the whole run is queued, or nothing is left behind."""

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
from mikoshi.launch.config.paths import printable, shell_quoted
from mikoshi.launch.config.private_env import collect_env, set_env
from mikoshi.launch.runs.record import Attempt, Request, Spec, SubmittedRun, create_run, new_spec
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.run import LONGEST_NAME, MOST_BYTES, RunConfig, load_config
from mikoshi.trainer.config.toml import is_unicode
from mikoshi.trainer.errors import ConfigError, LaunchError
from mikoshi.trainer.record.run_folder import RunFolder

LARGEST_SWEEP = 1000
_MAX_TRIES = 64


@dataclass(frozen=True)
class SubmitPlan:
    """What would be submitted.

    layout: as text
    fewer: smaller numbers of nodes that the run can continue on, of those that were tried
    unseen: why the data was not checked, or ""
    swept: the values that a sweep gives it
    """

    spec: Spec
    request: Request
    layout: str
    fewer: tuple[int, ...] = ()
    unseen: str = ""
    swept: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder on this machine."""
        return run_folder_of(self.spec)

    @property
    def run(self) -> SubmittedRun:
        """The run that would be submitted. Nothing is written yet."""
        return SubmittedRun(RunFolder(self.folder), self.spec)


def run_folder_of(spec: Spec) -> Path:
    """The run folder on this machine: the one that the nodes see, or a record of it if pods have disks of their own."""
    return _local_workdir(spec.cluster, spec.workdir) / spec.config.run.path


def _local_workdir(cluster: Base, workdir: str) -> Path:
    if isinstance(cluster, KubernetesCluster) and not Path(workdir).is_dir():
        return Path.cwd()
    return Path(workdir)


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    nodes: int | None = None,
    min_nodes: int | None = None,
    swept: dict[str, str] | None = None,
) -> SubmitPlan:
    """Check everything that can be checked before a node is requested.

    Raises LaunchError, LayoutError, ConfigError or DataError.

    nodes: default: the cluster file's number
    min_nodes: default: recovery.min_nodes, else all
    swept: the values that a sweep gives the run
    """
    wanted = nodes or cluster.nodes
    request = Request(nodes=wanted, min_nodes=fewest_nodes(config, wanted, min_nodes), time=time.time())
    workdir = str(Path(cluster.workdir).expanduser().absolute()) if cluster.workdir else str(Path.cwd())
    if not is_unicode(workdir):
        raise LaunchError(f"workdir = {workdir!a}: not UTF-8 text: rename the folder")
    spec = new_spec(config, cluster, Path(workdir))
    layout, fewer = check_layouts(config, cluster, request)
    unseen = check_data(spec, wanted)
    return SubmitPlan(spec, request, layout, fewer, unseen, swept or {})


def fewest_nodes(config: RunConfig, nodes: int, given: int | None) -> int:
    """The smallest number of nodes that a run continues on. Raises LaunchError.

    given: the number on the command line
    """
    wanted_fewest = given or config.recovery.min_nodes or nodes
    if given and given > nodes:
        raise LaunchError(f"--min-nodes {given}: more than the {nodes} of --nodes: give {nodes} or fewer")
    return min(wanted_fewest, nodes)


def check_layouts(config: RunConfig, cluster: Base, request: Request) -> tuple[str, tuple[int, ...]]:
    """Return the layout on all nodes as text, and the smaller numbers of nodes that have a layout too.

    Raises LayoutError if there is no layout, or LaunchError if the requested minimum has none.
    """
    from mikoshi.trainer.engines.layout import layout_of

    whole = layout_of(config, request.nodes * cluster.ranks)
    fewer = []
    for nodes in range(request.nodes - 1, request.min_nodes - 1, -1)[:_MAX_TRIES]:
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
    text = f"{whole.world} ranks, {cluster.ranks} a node{f', {degrees}' if degrees else ''}, ZeRO {whole.zero}"
    return text, tuple(reversed(fewer))


def _check_wandb(spec: Spec) -> None:
    """Raise ConfigError if the ranks will have no key for Weights & Biases.

    Away from this machine, ranks see only the variables in the cluster file, and in a pod no file of the user.
    """
    from mikoshi.trainer.record.wandb import check_key

    cluster = spec.cluster
    env = {name: os.environ.get(name, "") for name in cluster.secrets} | cluster.env
    if cluster.kind == "local":
        check_key(spec.config.log.wandb, os.environ | env, Path.home())
    else:
        home = None if isinstance(cluster, KubernetesCluster) else Path.home()
        way = 'set WANDB_API_KEY and give secrets = ["WANDB_API_KEY"] in the cluster file'
        check_key(spec.config.log.wandb, env, home, way)


def check_data(spec: Spec, nodes: int) -> str:
    """Check data, tokenizer and vocabulary, and return "", or why they cannot be checked from here.

    Raises LaunchError if the working folder should exist on this machine and does not.
    """
    from mikoshi.trainer.train.preflight import foresee

    if spec.config.log.wandb and "WANDB" not in spec.cluster.setup:
        _check_wandb(spec)
    workdir = Path(spec.workdir)
    if not workdir.is_dir():
        if not isinstance(spec.cluster, KubernetesCluster):
            raise LaunchError(f"workdir = {spec.workdir!r}: no such folder: mend it in the cluster file, or make the folder")
        return f"{workdir} is not on this machine: the data is checked when the run starts"
    with contextlib.chdir(workdir), set_env(spec.cluster.env):
        foresee(spec.config, nodes * spec.cluster.ranks)
    return ""


def submit(plan: SubmitPlan, backend: Backend) -> tuple[SubmittedRun, Attempt]:
    """Submit a run. After an error there is no new run folder and no job."""
    return submit_all([plan], backend)[0]


def submit_all(plans: Sequence[SubmitPlan], backend: Backend) -> list[tuple[SubmittedRun, Attempt]]:
    """Submit several runs: all, or none."""
    with contextlib.ExitStack() as undo:
        made = []
        for plan in plans:
            run = _create_run(plan, undo)
            if plan.swept:
                write_file(run.folder.path / "sweep.json", json.dumps(plan.swept, indent=2).encode())
            made.append((run, run.add(plan.request)))
        if len(made) > 1 and plans[0].spec.cluster.kind == "slurm":
            from mikoshi.launch.backends.slurm.slurm import array_folder, submit_array

            jobs = submit_array(made)
            undo.callback(shutil.rmtree, array_folder(made[0][0]), ignore_errors=True)
            for (_, attempt), job in zip(made, jobs, strict=True):
                undo.callback(_cancel_job, backend, job)
                attempt.write_job(job)
        else:
            for run, attempt in made:
                submit_attempt(run, attempt, backend, undo)
        undo.pop_all()  # success: undo nothing
        return made


def _create_run(plan: SubmitPlan, undo: contextlib.ExitStack) -> SubmittedRun:
    """Create the run folder, which `undo` removes. A folder that another process creates meanwhile is left alone."""
    before = _entries(plan.folder)
    try:
        run = create_run(plan.spec, plan.folder)
    except BaseException:
        if before is None:
            with contextlib.suppress(OSError):  # not empty: another process made it
                plan.folder.rmdir()
        raise
    undo.callback(_remove_new_entries, plan.folder, before)
    return run


def submit_attempt(run: SubmittedRun, attempt: Attempt, backend: Backend, undo: contextlib.ExitStack) -> None:
    """Submit an attempt and record its job. `undo` cancels the job if a later step fails."""
    job = backend.submit(run, attempt)
    undo.callback(_cancel_job, backend, job)
    attempt.write_job(job)


def _cancel_job(backend: Backend, job: dict[str, str]) -> None:
    """Cancel a job that could not be recorded, or whose companions could not be submitted."""
    with tempfile.TemporaryDirectory(prefix="mikoshi-") as folder:  # the run folder may be what cannot be written
        stand_in = Attempt(Path(folder) / "1")
        stand_in.path.mkdir()
        stand_in.write_job(job)
        with contextlib.suppress(LaunchError):  # report the first error
            backend.cancel(stand_in, now=True)


def _entries(folder: Path) -> set[str] | None:
    """The names in a folder; None if it does not exist."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


def _remove_new_entries(folder: Path, before: set[str] | None) -> None:
    """Remove from a folder what was not in it before."""
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check(plan: SubmitPlan, backend: Backend) -> None:
    """Refuse a submission that would fail: the run exists, a secret is not set, or the cluster cannot run it. Raises
    LaunchError."""
    if any((plan.folder / name).exists() for name in ("spec.json", "config.toml")):
        raise LaunchError(
            f"{printable(plan.folder)}: a run of this name is there already: `mikoshi resume {shell_quoted(plan.folder)}` "
            "goes on with it, run.name=... makes another"
        )
    collect_env(plan.spec.cluster, os.environ)
    backend.check(plan.run, plan.request)


def sweep_plans(
    path: Path, overrides: Sequence[str], sweeps: Sequence[str], cluster: Cluster, nodes: int | None, min_nodes: int | None
) -> list[SubmitPlan]:  # fmt: skip
    """Make a plan for every combination of the swept values, named NAME-000 and so on. Raises LaunchError."""
    if cluster.kind in ("local", "ssh"):
        raise LaunchError(f"--sweep: a cluster of kind {cluster.kind} has no queue: submit the runs one after the other")
    axes = dict(parse_axis(text) for text in sweeps)
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


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Parse a swept key and its values, KEY=A,B,C. Commas inside brackets or quotes do not separate. Raises ConfigError."""
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
