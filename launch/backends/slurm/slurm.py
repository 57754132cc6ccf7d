"""Submits runs as Slurm jobs, 22.05 and later, with or without accounting. A job saves before its time is up.

The batch script is constant. What differs between runs is passed as arguments, and a run's variables by a file that only
its owner can read.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.backends.base import JobState
from mikoshi.launch.backends.slurm.commands import gpu_request, run_command, submit_batch
from mikoshi.launch.backends.slurm.parse import SQUEUE_FORMAT, file_pattern, job_states, parse_fields, parse_time, safe_name
from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.launch.config.private_env import PRIVATE, collect_env, write_private
from mikoshi.launch.runs.record import Attempt, Request, SubmittedRun
from mikoshi.parallel.process.nodelist import expand_nodelist
from mikoshi.trainer.errors import LaunchError, TooFewError

SCRIPT = """\
#!/bin/bash
# $1: the interpreter; $2: a file of shell lines to source first, or nothing; $3: the folder of Slurm's commands, or nothing;
# then the arguments of controller.head.
mikoshi_command=("$1" -P -m mikoshi.launch.controller.head "${@:4}")
mikoshi_slurm=$3
if [ -n "$2" ]; then
    mikoshi_setup=$2
    set --
    [ -r /etc/profile ] && . /etc/profile
    . "$mikoshi_setup" || { echo "error: setup: ended with exit code $?" >&2; exit 2; }
fi
# The environment may have come without a PATH: then the shell has one of its own, which it tells nobody.
PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}
export PATH="${PATH%:.}${mikoshi_slurm:+:$mikoshi_slurm}"
exec "${mikoshi_command[@]}"
"""


def _avoided(cluster: SlurmCluster, request: Request) -> set[str]:
    return {*cluster.exclude, *request.avoided}


class SlurmBackend:
    """backends.base.Backend by sbatch, squeue, scontrol and scancel."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster

    def check(self, run: SubmittedRun, request: Request) -> None:
        """Refuse a missing or closed partition, too few nodes, and a time limit that is too long or too short."""
        cluster = self.cluster
        if cluster.image:
            raise LaunchError("image: not for kind = slurm: give python the path of a wrapper that starts it in the container")
        partition = self._partition()
        name = partition["PartitionName"]
        avoided = _avoided(cluster, request) & set(expand_nodelist(partition.get("Nodes", "")))
        usable = int(partition.get("TotalNodes", "0")) - len(avoided)
        back = sorted(avoided - {*cluster.exclude})
        more = f"; avoided are {', '.join(back)}, which --include-node takes back" if back else ""
        most = partition.get("MaxNodes", "UNLIMITED")
        usable = min(usable, int(most)) if most.isdigit() else usable
        if request.min_nodes > usable:
            raise TooFewError(f"--nodes {request.nodes}: partition {name} has {usable} nodes for this run: ask for fewer{more}")
        if partition.get("State", "UP") not in ("UP", "DOWN"):
            raise LaunchError(f"partition {name} is {partition['State']}: it takes no jobs; choose another partition")
        longest = parse_time(partition.get("MaxTime", "UNLIMITED"))
        limit = self._limit(partition)
        if limit > longest:
            raise LaunchError(
                f"time = {cluster.time}: partition {name} allows {partition['MaxTime']}: ask for no more than that"
            )
        if limit <= cluster.warning:
            raise LaunchError(f"warning = {cluster.warning}: no less than the time limit, {limit:g} s: a run could never train")

    def preview(self, run: SubmittedRun, request: Request) -> str:
        """The sbatch command, and the batch script."""
        folder = run.folder.path.absolute()
        command = shlex.join([*self.options(run, request, _output(folder, "%j"), f"{run.spec.id}-…"), *self.tail(folder)])
        setup = f"\n# slurm-setup.sh\n{self.cluster.setup}\n" if self.cluster.setup else ""
        return f"{command}\n\n# slurm-batch.sh\n{SCRIPT}{setup}"

    def submit(self, run: SubmittedRun, attempt: Attempt) -> dict[str, str]:
        """Write the batch script and the variables, and submit the job."""
        folder, mark = run.folder.path.absolute(), _mark(run, attempt)
        self.write_variables(run)
        self.write_script(folder)
        return {
            "id": submit_batch([*self.options(run, attempt.request, _output(folder, "%j"), mark), *self.tail(folder)], mark)
        }

    def query(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        """Query squeue once for all jobs."""
        idents = [job.get("id", "") for job in jobs]
        known = sorted({ident for ident in idents if re.fullmatch(r"[0-9]+(_[0-9]+)?", ident)})
        if not known:
            return [JobState("unknown")] * len(idents)
        listing = run_command(["squeue", "-h", "-r", "--states=all", f"--format={SQUEUE_FORMAT}", f"--jobs={','.join(known)}"],
                      gone="")  # fmt: skip
        states = job_states(listing)
        forgotten = JobState("ended", "Slurm no longer knows of it")
        return [states.get(ident, forgotten) if ident in known else JobState("unknown") for ident in idents]

    def cancel(self, attempt: Attempt, now: bool) -> None:
        """Send SIGTERM to the head, which saves and ends; or cancel the job."""
        job = attempt.job
        if not job.get("id"):
            raise LaunchError(f"{attempt.path}: not submitted: nothing to cancel")
        state = self.query([job])[0]
        if state.state == "ended":
            return
        # Signal only the batch script, which is the head. It passes the signal on to its nodes.
        gently = not now and state.state == "running" and not state.why
        run_command(["scancel", *(["--batch", "--signal=TERM"] if gently else []), job["id"]], gone="")

    def longest(self) -> float:
        """Seconds that a job may take, by the cluster file or its partition. Raises LaunchError."""
        partition = self._partition()
        return min(self._limit(partition), parse_time(partition.get("MaxTime", "UNLIMITED")))

    def _limit(self, partition: dict[str, str]) -> float:
        most, usual = partition.get("MaxTime", "UNLIMITED"), partition.get("DefaultTime", "NONE")
        return parse_time(self.cluster.time or (most if usual == "NONE" else usual))

    def _partition(self) -> dict[str, str]:
        listing = run_command(["scontrol", "--oneliner", "show", "partition"])
        found = {part["PartitionName"]: part for part in map(parse_fields, listing.splitlines()) if "PartitionName" in part}
        if self.cluster.partition:
            names = self.cluster.partition.split(",")
            unknown = [name for name in names if name not in found]
            if unknown:
                raise LaunchError(f"partition = {unknown[0]}: Slurm has no such partition, but {', '.join(found) or 'none'}")
            return max((found[name] for name in names), key=lambda part: int(part.get("TotalNodes", "0")))
        for part in found.values():
            if part.get("Default") == "YES":
                return part
        raise LaunchError(f"partition: Slurm has no default one: name one of {', '.join(found) or 'none'}")

    def write_variables(self, run: SubmittedRun) -> None:
        """Write the variables of the run's ranks to the file that its head reads."""
        write_private(run.folder.path / PRIVATE, collect_env(self.cluster, os.environ))

    def write_script(self, folder: Path) -> None:
        """Write the files that tail() names."""
        try:
            write_file(folder / "slurm-batch.sh", SCRIPT.encode())
            if self.cluster.setup:
                write_file(folder / "slurm-setup.sh", self.cluster.setup.encode() + b"\n")
        except OSError as error:
            raise LaunchError(f"{folder}: cannot be written: {error.strerror}") from None

    def tail(self, folder: Path, *what: str) -> list[str]:
        """The batch script and its arguments.

        what: arguments of controller.head; default: the folder
        """
        setup = str(folder / "slurm-setup.sh") if self.cluster.setup else ""
        found = shutil.which("sbatch")
        commands = str(Path(found).absolute().parent) if found else ""
        program = [str(folder / "slurm-batch.sh"), self.cluster.python or sys.executable, setup, commands]
        return [*program, *(what or [str(folder)])]

    def options(self, run: SubmittedRun, request: Request, output: str, mark: str) -> list[str]:
        """sbatch with all its options.

        output: pattern for the job's output file
        mark: the job's comment
        """
        cluster = self.cluster
        fewer = request.min_nodes < request.nodes
        # No number of tasks: with one, Slurm would give the minimum of a range of nodes.
        options = [
            "--parsable", "--export=NIL", "--requeue", "--open-mode=append", f"--signal=B:USR2@{cluster.warning}",
            f"--job-name={safe_name(run.spec.config.run.name)}", f"--comment={mark}", f"--output={output}",
            f"--chdir={run.spec.workdir}",
            f"--nodes={f'{request.min_nodes}-{request.nodes}' if fewer else request.nodes}",
        ]  # fmt: skip
        named = {
            "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint,
            "reservation": cluster.reservation, "time": cluster.time, "mem": cluster.memory,
            "cpus-per-task": cluster.cpus_per_node or "", "exclude": ",".join(sorted(_avoided(cluster, request))),
        }  # fmt: skip
        options += [f"--{name}={value}" for name, value in named.items() if value]
        options += [*gpu_request(cluster), *["--no-kill"] * fewer, *["--exclusive"] * cluster.exclusive]
        return ["sbatch", *options, *cluster.options]


def array_folder(first: SubmittedRun) -> Path:
    """The folder of a sweep, beside its runs, which may be removed one by one."""
    return first.folder.path.absolute().with_name(f".sweep-{first.spec.id}")


def submit_array(runs: Sequence[tuple[SubmittedRun, Attempt]], at_once: int = 0) -> list[dict[str, str]]:
    """Submit the runs of a sweep as one job array, and return what identifies each job. After an error nothing is queued.

    runs: all on one cluster, with the same number of nodes
    at_once: how many may run at a time; 0: no limit
    """
    first, attempt = runs[0]
    if not isinstance(first.spec.cluster, SlurmCluster):
        raise LaunchError(f"{first.folder.path}: a job array needs a cluster of kind slurm")
    backend, request = SlurmBackend(first.spec.cluster), attempt.request
    for run, other in runs:
        if (other.request.nodes, other.request.min_nodes) != (request.nodes, request.min_nodes):
            raise LaunchError(f"{run.folder.path}: all runs of a sweep must ask for as many nodes as its first")
        backend.write_variables(run)
    folder, mark = array_folder(first), _mark(first, attempt)
    listed, array = folder / "slurm-array.json", f"--array=0-{len(runs) - 1}{f'%{at_once}' if at_once else ''}"
    options = backend.options(first, request, _output(folder, "%A_%a"), mark)
    try:
        folder.mkdir(exist_ok=True)
        write_file(listed, json.dumps([str(run.folder.path.absolute()) for run, _ in runs]).encode())
        backend.write_script(folder)
        job = submit_batch([*options, array, *backend.tail(folder, "--list", str(listed))], mark)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise LaunchError(f"{folder}: cannot be written: {error.strerror}") from None
        raise
    return [{"id": f"{job}_{number}"} for number in range(len(runs))]


def _mark(run: SubmittedRun, attempt: Attempt) -> str:
    """The comment by which a job is found whose submission failed half-way."""
    return f"{run.spec.id}-{attempt.number}"


def _output(folder: Path, job: str) -> str:
    """The pattern of a job's output file. job: the part of the name that Slurm fills in."""
    return f"{file_pattern(str(folder))}/slurm-{job}.out"
