"""A run that is led from this machine outlives the terminal that started it, and nothing of it outlives a cancel."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.backends.setup import SETUP, setup_file, write_setup
from mikoshi.launch.backends.ssh.ssh import check_hosts, hosts, node_command
from mikoshi.launch.config.cluster import LocalCluster, SshCluster
from mikoshi.launch.config.private_env import PRIVATE, chosen, write_private
from mikoshi.launch.runs.record import Attempt, Request, Result, Submitted
from mikoshi.trainer.errors import LaunchError, TooFewError

_SAME = 2.0  # seconds that a time of start may be read differently by
_CLOSING = 5.0  # seconds in which those that hear of the end by a closed pipe are gone
_VERSION = "import importlib.metadata as m; print(m.version('mikoshi'))"


@dataclass(frozen=True)
class LocalBackend:
    """For this machine alone, and for hosts that it reaches by ssh: the head is a process here, in a session of its own."""

    cluster: LocalCluster | SshCluster

    def check(self, run: Submitted, request: Request) -> None:
        """Refuse more nodes than there are, hosts that cannot be reached, and interpreters without this Mikoshi."""
        if isinstance(self.cluster, SshCluster):
            check_hosts(self.cluster, run, request)
        else:
            _check_here(self.cluster, run, request)

    def preview(self, run: Submitted, request: Request) -> str:
        """The commands, as a shell would have them."""
        lines = ["# on this machine", f"cd {shlex.quote(run.spec.workdir)}", shlex.join(self._head(run))]
        if isinstance(self.cluster, SshCluster):
            for number, host in enumerate(hosts(self.cluster, request)):
                spare = "" if number < request.nodes else " (a spare)"
                lines += [f"# by the head, for {host}{spare}", shlex.join(node_command(self.cluster, run, host))]
        return "\n".join(lines)

    def submit(self, run: Submitted, attempt: Attempt) -> dict[str, str]:
        """Start the head, detached. Its process is found again by its id and its start, however the clock is set meanwhile."""
        write_setup(run)
        write_private(run.folder.path / PRIVATE, chosen(self.cluster, os.environ))
        head = self._head(run)
        try:
            with attempt.head_log.open("ab") as log:
                process = subprocess.Popen(
                    head, cwd=run.spec.workdir, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise LaunchError(f"{error.filename or head[0]}: {error.strerror}: the run cannot be started here") from None
        began = 0.0
        with contextlib.suppress(psutil.Error):
            began = psutil.Process(process.pid).create_time()
        start = _start_of(process.pid)
        # Whoever stays to watch must not keep it as a zombie, which looks alive.
        threading.Thread(target=process.wait, daemon=True).start()
        return {"kind": "local", "host": socket.gethostname(), "pid": str(process.pid), "began": repr(began), **start}

    def look(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        """By the process table; of a head on another machine nothing can be said from here."""
        return [_look(job) for job in jobs]

    def cancel(self, attempt: Attempt, now: bool) -> None:
        """SIGTERM to the head, which saves and ends; or the end of the head and of all that it started, here and elsewhere."""
        job = job_of(attempt)
        state = _look(job)
        if state.state == "unknown":
            raise LaunchError(f"{attempt.path}: {state.why}")
        head = _head_of(job)
        if head is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            if now:
                _end(head)
            else:
                head.send_signal(signal.SIGTERM)

    def _head(self, run: Submitted) -> list[str]:
        folder = str(run.folder.path.absolute())
        if isinstance(self.cluster, SshCluster):  # its interpreter and setup are those of the hosts
            return [sys.executable, "-P", "-m", "mikoshi.launch.controller.head", folder]
        argv = [self.cluster.python or sys.executable, "-P", "-m", "mikoshi.launch.controller.head", folder]
        return ["bash", "-c", SETUP, str(setup_file(run)), *argv] if self.cluster.setup else argv


@dataclass(frozen=True)
class LocalSite:
    """This machine as the one node."""

    cluster: LocalCluster
    run: Submitted
    attempt: Attempt
    led: bool = True

    def nodes(self) -> list[str]:
        """This machine, unless it is to be avoided."""
        return [name for name in [socket.gethostname()] if name not in self.attempt.request.avoided]

    def command(self, node: str) -> list[str]:
        """agent.node, after the setup lines, which a head has had already."""
        argv = [self.cluster.python or sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]
        return ["bash", "-c", SETUP, str(setup_file(self.run)), *argv] if self.cluster.setup and not self.led else argv

    def after(self, run: Submitted, attempt: Attempt, result: Result) -> Result:
        """Nothing follows by itself: there is no queue."""
        return result


def _check_here(cluster: LocalCluster, run: Submitted, request: Request) -> None:
    name = socket.gethostname()
    if request.nodes > 1:
        raise LaunchError(
            f"{request.nodes} nodes asked for, and this machine is one: --nodes 1, or a cluster of kind ssh or slurm"
        )
    if name in request.avoided:
        raise TooFewError(f"{name} is to be avoided, and there is no other machine: `--include-node {name}` takes it back")
    workdir = Path(run.spec.workdir)
    if not workdir.is_dir():
        raise LaunchError(f"workdir = {run.spec.workdir!r}: no such folder: mend it in the cluster file")
    if not cluster.python or cluster.setup:  # what the setup lines bring is not there yet
        return
    try:
        done = subprocess.run([cluster.python, "-P", "-c", _VERSION], cwd=workdir, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LaunchError(f"python = {cluster.python!r}: {error.strerror}: mend it in the cluster file") from None
    found, here = done.stdout.strip(), version("mikoshi")
    if done.returncode or found != here:
        there = f"Mikoshi {found}" if found and not done.returncode else "no Mikoshi"
        raise LaunchError(f"python = {cluster.python!r}: {there} there, {here} here: install the same version")


def job_of(attempt: Attempt) -> dict[str, str]:
    """What the head is found by: as it was noted, or, where that is missing or damaged, as the head has told itself. Raises
    LaunchError where nothing but damage is left."""
    damage = None
    try:
        if job := attempt.read_job():
            return job
    except LaunchError as error:
        damage = error
    if (head := attempt.started) is not None:
        return {"kind": "local", "host": head.host, "pid": str(head.pid), "began": repr(head.began)}
    if damage is not None:
        raise damage
    return {}


def _look(job: dict[str, str]) -> JobState:
    if not job.get("pid", "").isdigit():
        return JobState("unknown", "no process was noted: it was cut off while it was submitted; move its attempt away")
    if job.get("host") != socket.gethostname():
        return JobState("unknown", f"it is led from {job.get('host')}: ask there")
    if _head_of(job) is None:
        return JobState("ended")
    return JobState("running", nodes=(job["host"],))


def _head_of(job: dict[str, str]) -> psutil.Process | None:
    """The process of a job, if it runs and is no other that was given its number."""
    try:
        process = psutil.Process(int(job["pid"]))
        start = _start_of(process.pid)
        if start and start.keys() <= job.keys():
            same = start.items() <= job.items()
        else:
            same = abs(process.create_time() - float(job["began"])) < _SAME
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, KeyError, ValueError):
        return None


def _start_of(pid: int) -> dict[str, str]:
    """When a process started, in the kernel's ticks, and since which boot: a clock that is set moves neither, as it does the
    time of day. Empty where the system does not tell."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return {"start_ticks": ticks, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    except (OSError, IndexError):
        return {}


def _end(head: psutil.Process) -> None:
    """Kill the head. What it started sees its pipe close and ends its own, elsewhere too; what does not is killed."""
    rest = head.children(recursive=True)
    head.kill()
    _, late = psutil.wait_procs([head, *rest], timeout=_CLOSING)
    for process in late:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, stuck = psutil.wait_procs(late, timeout=_CLOSING)
    if stuck:
        who = ", ".join(str(process.pid) for process in stuck)
        raise LaunchError(f"process {who} cannot be killed: it is stuck in the kernel (see dmesg)")
