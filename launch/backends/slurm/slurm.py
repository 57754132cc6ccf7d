"""Runs as jobs of Slurm, 22.05 and later, with or without accounting: a job saves before its time is up and asks to go on.

The batch script is one constant text: all that differs between runs reaches it as arguments, and the variables of a run by a
file that its owner alone can read.
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
from mikoshi.launch.backends.slurm import text as slurm_text
from mikoshi.launch.backends.slurm.commands import ask, gpu_request, queue
from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.launch.config.private_env import PRIVATE, chosen, write_private
from mikoshi.launch.runs.record import Attempt, Request, Submitted
from mikoshi.parallel.process.nodelist import expand
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

    def check(self, run: Submitted, request: Request) -> None:
        cluster = self.cluster
        if cluster.image:
            raise LaunchError("image: not for kind = slurm: give python the path of a wrapper that starts it in the container")
        partition = self._partition()
        name = partition["PartitionName"]
        avoided = _avoided(cluster, request) & set(expand(partition.get("Nodes", "")))
        usable = int(partition.get("TotalNodes", "0")) - len(avoided)
        back = sorted(avoided - {*cluster.exclude})
        more = f"; avoided are {', '.join(back)}, which --include-node takes back" if back else ""
        most = partition.get("MaxNodes", "UNLIMITED")
        usable = min(usable, int(most)) if most.isdigit() else usable
        if request.min_nodes > usable:
            raise TooFewError(f"--nodes {request.nodes}: partition {name} has {usable} nodes for this run: ask for fewer{more}")
        if partition.get("State", "UP") not in ("UP", "DOWN"):
            raise LaunchError(f"partition {name} is {partition['State']}: it takes no jobs; choose another partition")
        longest = slurm_text.seconds(partition.get("MaxTime", "UNLIMITED"))
        limit = self._limit(partition)
        if limit > longest:
            raise LaunchError(
                f"time = {cluster.time}: partition {name} allows {partition['MaxTime']}: ask for no more than that"
            )
        if limit <= cluster.warning:
            raise LaunchError(f"warning = {cluster.warning}: no less than the time limit, {limit:g} s: a run could never train")

    def preview(self, run: Submitted, request: Request) -> str:
        folder = run.folder.path.absolute()
        command = shlex.join([*self.options(run, request, _output(folder, "%j"), f"{run.spec.id}-…"), *self.tail(folder)])
        setup = f"\n# slurm-setup.sh\n{self.cluster.setup}\n" if self.cluster.setup else ""
        return f"{command}\n\n# slurm-batch.sh\n{SCRIPT}{setup}"

    def submit(self, run: Submitted, attempt: Attempt) -> dict[str, str]:
        folder, mark = run.folder.path.absolute(), _mark(run, attempt)
        self.write_variables(run)
        self.write_script(folder)
        return {"id": queue([*self.options(run, attempt.request, _output(folder, "%j"), mark), *self.tail(folder)], mark)}

    def look(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        idents = [job.get("id", "") for job in jobs]
        asked = sorted({ident for ident in idents if re.fullmatch(r"[0-9]+(_[0-9]+)?", ident)})
        if not asked:
            return [JobState("unknown")] * len(idents)
        listing = ask(["squeue", "-h", "-r", "--states=all", f"--format={slurm_text.LISTED}", f"--jobs={','.join(asked)}"],
                      gone="")  # fmt: skip
        states = slurm_text.job_states(listing)
        forgotten = JobState("ended", "Slurm no longer knows of it")
        return [states.get(ident, forgotten) if ident in asked else JobState("unknown") for ident in idents]

    def cancel(self, attempt: Attempt, now: bool) -> None:
        job = attempt.job
        if not job.get("id"):
            raise LaunchError(f"{attempt.path}: not submitted: nothing to cancel")
        state = self.look([job])[0]
        if state.state == "ended":
            return
        # Only the batch script is asked, which is the head: its nodes are asked by it, once.
        gently = not now and state.state == "running" and not state.why
        ask(["scancel", *(["--batch", "--signal=TERM"] if gently else []), job["id"]], gone="")

    def longest(self) -> float:
        """Seconds that a job may take, of the cluster file or of its partition. Raises LaunchError."""
        partition = self._partition()
        return min(self._limit(partition), slurm_text.seconds(partition.get("MaxTime", "UNLIMITED")))

    def _limit(self, partition: dict[str, str]) -> float:
        most, usual = partition.get("MaxTime", "UNLIMITED"), partition.get("DefaultTime", "NONE")
        return slurm_text.seconds(self.cluster.time or (most if usual == "NONE" else usual))

    def _partition(self) -> dict[str, str]:
        listing = ask(["scontrol", "--oneliner", "show", "partition"])
        found = {
            part["PartitionName"]: part for part in map(slurm_text.fields, listing.splitlines()) if "PartitionName" in part
        }
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

    def write_variables(self, run: Submitted) -> None:
        """Those of the run's ranks, where its head finds them."""
        write_private(run.folder.path / PRIVATE, chosen(self.cluster, os.environ))

    def write_script(self, folder: Path) -> None:
        """What tail() names in this folder."""
        try:
            write_file(folder / "slurm-batch.sh", SCRIPT.encode())
            if self.cluster.setup:
                write_file(folder / "slurm-setup.sh", self.cluster.setup.encode() + b"\n")
        except OSError as error:
            raise LaunchError(f"{folder}: cannot be written: {error.strerror}") from None

    def tail(self, folder: Path, *what: str) -> list[str]:
        """The batch script and its arguments. what: those of controller.head."""
        setup = str(folder / "slurm-setup.sh") if self.cluster.setup else ""
        found = shutil.which("sbatch")
        commands = str(Path(found).absolute().parent) if found else ""
        program = [str(folder / "slurm-batch.sh"), self.cluster.python or sys.executable, setup, commands]
        return [*program, *(what or [str(folder)])]

    def options(self, run: Submitted, request: Request, output: str, mark: str) -> list[str]:
        """sbatch, and all that it is told."""
        cluster = self.cluster
        fewer = request.min_nodes < request.nodes
        # No number of tasks: with one, Slurm takes it as all that is wanted of min-max, and gives the fewest nodes.
        options = [
            "--parsable", "--export=NIL", "--requeue", "--open-mode=append", f"--signal=B:USR2@{cluster.warning}",
            f"--job-name={slurm_text.safe_name(run.spec.config.run.name)}", f"--comment={mark}", f"--output={output}",
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


def array_folder(first: Submitted) -> Path:
    """What all tasks of a sweep read and where they write, beside its runs: any of these may be removed while others go on."""
    return first.folder.path.absolute().with_name(f".sweep-{first.spec.id}")


def submit_array(runs: Sequence[tuple[Submitted, Attempt]], at_once: int = 0) -> list[dict[str, str]]:
    """One job array for the runs of a sweep, which ask for the same nodes of one cluster; at_once: how many may run at a time,
    0 for as many as there is room for. What finds each again, in the order of `runs`. After an error nothing is queued."""
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
        job = queue([*options, array, *backend.tail(folder, "--list", str(listed))], mark)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise LaunchError(f"{folder}: cannot be written: {error.strerror}") from None
        raise
    return [{"id": f"{job}_{number}"} for number in range(len(runs))]


def _mark(run: Submitted, attempt: Attempt) -> str:
    """The comment by which a job is found whose submission went wrong half-way."""
    return f"{run.spec.id}-{attempt.number}"


def _output(folder: Path, job: str) -> str:
    """Where a job's own words go; the head's go to its attempt. job: the part of the name that Slurm fills in."""
    return f"{slurm_text.file_pattern(str(folder))}/slurm-{job}.out"
