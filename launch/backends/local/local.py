"""Runs that this machine leads. They outlive the terminal that started them, and nothing of them outlives a cancel."""

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
from mikoshi.launch.config.private_env import PRIVATE, collect_env, write_private
from mikoshi.launch.runs.record import Attempt, Request, Result, SubmittedRun
from mikoshi.trainer.errors import LaunchError, TooFewError

_START_TOLERANCE = 2.0  # seconds that two readings of a start time may differ by
_EXIT_TIMEOUT = 5.0  # seconds for processes to exit after their pipe has closed
_VERSION = "import importlib.metadata as m; print(m.version('mikoshi'))"


@dataclass(frozen=True)
class LocalBackend:
    """For this machine alone, and for ssh hosts. The head is a process here, in a session of its own."""

    cluster: LocalCluster | SshCluster

    def check(self, run: SubmittedRun, request: Request) -> None:
        """Refuse more nodes than exist, unreachable hosts, and interpreters without this version of Mikoshi."""
        if isinstance(self.cluster, SshCluster):
            check_hosts(self.cluster, run, request)
        else:
            _check_machine(self.cluster, run, request)

    def preview(self, run: SubmittedRun, request: Request) -> str:
        """The commands, as a shell takes them."""
        lines = ["# on this machine", f"cd {shlex.quote(run.spec.workdir)}", shlex.join(self._head(run))]
        if isinstance(self.cluster, SshCluster):
            for number, host in enumerate(hosts(self.cluster, request)):
                spare = "" if number < request.nodes else " (a spare)"
                lines += [f"# by the head, for {host}{spare}", shlex.join(node_command(self.cluster, run, host))]
        return "\n".join(lines)

    def submit(self, run: SubmittedRun, attempt: Attempt) -> dict[str, str]:
        """Start the head, detached. It is found again by process id and start time, even if the clock is set meanwhile."""
        write_setup(run)
        write_private(run.folder.path / PRIVATE, collect_env(self.cluster, os.environ))
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
        # Reap it if this process stays: a zombie looks alive.
        threading.Thread(target=process.wait, daemon=True).start()
        return {"kind": "local", "host": socket.gethostname(), "pid": str(process.pid), "began": repr(began), **start}

    def query(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        """Look the jobs up in the process table. A head on another machine is unknown here."""
        return [_job_state(job) for job in jobs]

    def cancel(self, attempt: Attempt, now: bool) -> None:
        """Send SIGTERM to the head, which saves and ends; or kill it with everything that it started."""
        job = job_of(attempt)
        state = _job_state(job)
        if state.state == "unknown":
            raise LaunchError(f"{attempt.path}: {state.why}")
        head = _head_of(job)
        if head is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            if now:
                _kill(head)
            else:
                head.send_signal(signal.SIGTERM)

    def _head(self, run: SubmittedRun) -> list[str]:
        folder = str(run.folder.path.absolute())
        if isinstance(self.cluster, SshCluster):  # python and setup apply to the hosts
            return [sys.executable, "-P", "-m", "mikoshi.launch.controller.head", folder]
        argv = [self.cluster.python or sys.executable, "-P", "-m", "mikoshi.launch.controller.head", folder]
        return ["bash", "-c", SETUP, str(setup_file(run)), *argv] if self.cluster.setup else argv


@dataclass(frozen=True)
class LocalSite:
    """This machine as the only node. led: whether a head, which has run the setup lines, runs here."""

    cluster: LocalCluster
    run: SubmittedRun
    attempt: Attempt
    led: bool = True

    def nodes(self) -> list[str]:
        """This machine, unless it is avoided."""
        return [name for name in [socket.gethostname()] if name not in self.attempt.request.avoided]

    def command(self, node: str) -> list[str]:
        """agent.node, after the setup lines unless the head has run them."""
        argv = [self.cluster.python or sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]
        return ["bash", "-c", SETUP, str(setup_file(self.run)), *argv] if self.cluster.setup and not self.led else argv

    def after(self, run: SubmittedRun, attempt: Attempt, result: Result) -> Result:
        """Return the result unchanged, since there is no queue."""
        return result


def _check_machine(cluster: LocalCluster, run: SubmittedRun, request: Request) -> None:
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
    if not cluster.python or cluster.setup:  # the setup lines have not run yet
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
    """What identifies the head: as recorded by submit(), or else by the head itself.

    Raises LaunchError if only damaged records are left.
    """
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


def _job_state(job: dict[str, str]) -> JobState:
    if not job.get("pid", "").isdigit():
        return JobState("unknown", "no process was noted: it was cut off while it was submitted; move its attempt away")
    if job.get("host") != socket.gethostname():
        return JobState("unknown", f"it is led from {job.get('host')}: ask there")
    if _head_of(job) is None:
        return JobState("ended")
    return JobState("running", nodes=(job["host"],))


def _head_of(job: dict[str, str]) -> psutil.Process | None:
    """The head's process, if it still runs and its id was not reused."""
    try:
        process = psutil.Process(int(job["pid"]))
        start = _start_of(process.pid)
        if start and start.keys() <= job.keys():
            same = start.items() <= job.items()
        else:
            same = abs(process.create_time() - float(job["began"])) < _START_TOLERANCE
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, KeyError, ValueError):
        return None


def _start_of(pid: int) -> dict[str, str]:
    """When a process started, in kernel ticks since boot, and the boot's id. Setting the clock changes neither.

    Empty if the system does not report them.
    """
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return {"start_ticks": ticks, "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    except (OSError, IndexError):
        return {}


def _kill(head: psutil.Process) -> None:
    """Kill the head. What it started sees its pipe close and ends, on other nodes too; the rest is killed."""
    rest = head.children(recursive=True)
    head.kill()
    _, late = psutil.wait_procs([head, *rest], timeout=_EXIT_TIMEOUT)
    for process in late:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, stuck = psutil.wait_procs(late, timeout=_EXIT_TIMEOUT)
    if stuck:
        who = ", ".join(str(process.pid) for process in stuck)
        raise LaunchError(f"process {who} cannot be killed: it is stuck in the kernel (see dmesg)")
