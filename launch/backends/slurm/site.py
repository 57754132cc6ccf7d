"""The inside of a Slurm job: its nodes, a step on each, and the job queued again when it was ended before the run was done."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator

from mikoshi.launch.backends.setup import LOGIN, setup_file
from mikoshi.launch.backends.slurm import text as slurm_text
from mikoshi.launch.backends.slurm.commands import ask, gpu_request, left, own_job, take_back
from mikoshi.launch.backends.slurm.slurm import SlurmBackend
from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.launch.runs.record import Attempt, Request, Result, Submitted
from mikoshi.parallel.process.nodelist import expand
from mikoshi.trainer.errors import LaunchError, TooFewError
from mikoshi.trainer.record.run_folder import read_jsonl
from mikoshi.trainer.signals import heard

_LOOK = 900.0
_BATCH = ("--parsable", "--export", "--requeue", "--no-requeue", "--open-mode", "--signal", "--output", "--error", "--hold")
"""Options that are not for salloc."""

_SAVING = 120.0
"""Slurm sends its signal up to 60 s early, and a save takes its time."""


class SlurmSite:
    """backends.base.Site from the variables that Slurm sets for the job's batch script."""

    def __init__(self, cluster: SlurmCluster, run: Submitted, attempt: Attempt, job: str = "", names: str = "") -> None:
        self.cluster, self.run = cluster, run
        self.job, self.names = job or os.environ.get("SLURM_JOB_ID", ""), names or os.environ.get("SLURM_JOB_NODELIST", "")
        self.own = job or own_job(self.job)
        # The batch script, which has had the setup lines, runs where `python` is; whoever has a job of its own need not.
        self.python = [sys.executable]
        if job:
            self.python = ["bash", "-c", LOGIN, str(setup_file(run))] if cluster.setup else []
            self.python.append(cluster.python or sys.executable)
        stays = not job and attempt.request.min_nodes < attempt.request.nodes
        self.agent = "mikoshi.launch.backends.slurm.step" if stays else "mikoshi.launch.agent.node"
        if not self.job:
            raise LaunchError("not inside a Slurm job (SLURM_JOB_ID is not set): start it with `mikoshi submit`")

    def nodes(self) -> list[str]:
        return expand(self.names)

    def command(self, node: str) -> list[str]:
        # --overlap, --mem=0 and no number of cores: the step has all that the job has of the node, beside other steps.
        # The command's own binding and MPI would be the cluster's defaults, made for one process a core.
        step = [
            "srun", f"--jobid={self.job}", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "--mem=0",
            *gpu_request(self.cluster), "--cpu-bind=none", "--mpi=none", "--export=ALL", "--no-kill", "--kill-on-bad-exit=0",
            "--wait=0", "--unbuffered", f"--chdir={self.run.spec.workdir}",
        ]  # fmt: skip
        return [*step, *self.python, "-P", "-m", self.agent]

    def after(self, run: Submitted, attempt: Attempt, result: Result) -> Result:
        """Queue the job again when its time was up, it was preempted, or a node of it is bad. Never one that was cancelled,
        by Mikoshi or by scancel, and not for ever: cluster.requeues times without a checkpoint in between."""
        if attempt.stop is not None or result.state not in ("stopped", "failed"):
            return result
        if result.state == "failed" and not result.bad_nodes:
            return result
        try:
            job = slurm_text.fields(ask(["scontrol", "--oneliner", "show", "job", self.own]))
        except LaunchError as error:
            return _ended(result, f"not queued again: {error}")
        if int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            return result.model_copy(update={"next": "requeued"})  # by Slurm itself, as it preempts
        if job.get("JobState") != "RUNNING":
            return result
        if result.state == "stopped" and not self._interrupted(job):
            return result
        if (idle := barren(run)) > self.cluster.requeues:
            return _ended(result, f"not queued again: {idle} attempts in a row without a checkpoint (requeues)")
        return self._again(attempt, result, job)

    def _interrupted(self, job: dict[str, str]) -> bool:
        """Whether it was Slurm that asked the run to stop: preemption, or the end of its time."""
        preempted = job.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
        return preempted or left(job) < self.cluster.warning + _SAVING

    def _again(self, attempt: Attempt, result: Result, job: dict[str, str]) -> Result:
        avoided, always = set(expand(job.get("ExcNodeList", ""))), {*self.cluster.exclude, *attempt.request.exclude}
        bad = {*avoided, *attempt.request.bad, *result.bad_nodes} - always
        wanted = self._wanted(attempt, bad)
        again = result.model_copy(update={"next": "requeued"})
        backend = SlurmBackend(self.cluster)
        try:
            try:
                backend.check(self.run, wanted)
            except TooFewError:
                # A node may have been lost for a moment alone, and one that is not there gets no job.
                wanted = self._wanted(attempt, set())
                backend.check(self.run, wanted)
                if bad:
                    why = f"{result.why}; queued again with {', '.join(sorted(bad))}: too few nodes without"
                    again = again.model_copy(update={"why": why})
        except LaunchError as error:
            return _ended(result, f"not queued again: {error}")
        with _undisturbed():
            attempt.write(again)  # Slurm ends this process soon after it has agreed
            try:
                ask(["scontrol", "requeue", self.own])
            except LaunchError as refused:
                return self._anew(wanted, again, refused)
            never = {*always, *wanted.bad}
            if never != avoided:
                # In the seconds before it may start again. It is not held for this: were this process ended meanwhile, nobody
                # would let it go.
                with contextlib.suppress(LaunchError):
                    ask(["scontrol", "update", f"JobId={self.own}", f"ExcNodeList={','.join(sorted(never))}"])
        return again

    def _wanted(self, attempt: Attempt, bad: set[str]) -> Request:
        return attempt.request.model_copy(update={"bad": sorted(bad), "cause": "requeue", "time": time.time()})

    def _anew(self, wanted: Request, again: Result, refused: LaunchError) -> Result:
        """Another job, where Slurm does not let this one be queued again."""
        attempt = self.run.add(wanted)
        try:
            attempt.write_job(SlurmBackend(self.cluster).submit(self.run, attempt))
        except LaunchError as error:
            end = Result(state="refused", code=2, why=str(error), time=time.time())
            attempt.write(end)
            return _ended(again, f"not queued again: {refused}; nor submitted anew: {error}")
        return again


@contextlib.contextmanager
def allocated(cluster: SlurmCluster, run: Submitted, request: Request) -> Iterator[tuple[str, str]]:
    """Nodes without a batch script, as soon as Slurm has them to give, for a quarter of an hour at most: the job's id, and its
    nodes as Slurm writes them. They are given back at the end, whatever ends it. Raises LaunchError."""
    mark = f"mikoshi doctor {run.spec.id}"
    with _ended_by_signals():
        try:
            backend = SlurmBackend(cluster)
            asked = backend.options(run, request, "/dev/null", mark)
            kept = [option for option in asked[1:] if not option.startswith(_BATCH)]
            minutes = int(min(_LOOK, backend.longest()) // 60)
            told = ask(["salloc", "--no-shell", "--immediate=60", *kept, f"--time={max(1, minutes)}"], both=True)
            found = re.search(r"job allocation (\d+)", told)
            if found is None:
                raise LaunchError(f"salloc: {slurm_text.said(told)}")
            job = found.group(1)
            yield job, ask(["squeue", "-h", f"--jobs={job}", "--format=%N"]).strip()
        finally:
            with _undisturbed():
                take_back(mark)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What asks a process to end does so by an exception, which lets it clean up."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP) if number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def barren(run: Submitted) -> int:
    """How many attempts in a row, up to the newest, have ended without a checkpoint of their own."""
    saves = [event["time"] for event in read_jsonl(run.folder.events) if event.get("event") == "save" and "time" in event]
    count = 0
    for attempt in reversed(run.attempts):
        started = attempt.started
        if started is None or any(time_of >= started.time for time_of in saves):
            break
        count += 1
    return count


def _ended(result: Result, why: str) -> Result:
    return result.model_copy(update={"next": "", "why": f"{result.why}; {why}"})


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Slurm's signal to a job that it queues again reaches also the commands by which it is asked to: they inherit this."""
    blocked = {signal.SIGTERM, signal.SIGCONT, signal.SIGHUP, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
