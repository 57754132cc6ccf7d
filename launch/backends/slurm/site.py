"""Runs inside a Slurm job: lists its nodes, starts a step on each, and requeues a job that was ended before its run was
done."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator

from mikoshi.launch.backends.setup import LOGIN, setup_file
from mikoshi.launch.backends.slurm.commands import cancel_by_comment, gpu_request, own_job_id, run_command, time_left
from mikoshi.launch.backends.slurm.parse import error_line, parse_fields
from mikoshi.launch.backends.slurm.slurm import SlurmBackend
from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.launch.runs.record import Attempt, Request, Result, SubmittedRun
from mikoshi.parallel.process.nodelist import expand_nodelist
from mikoshi.trainer.errors import LaunchError, TooFewError
from mikoshi.trainer.record.run_folder import read_jsonl
from mikoshi.trainer.signals import handled_signals

_MAX_ALLOCATION = 900.0
_BATCH_ONLY = (
    "--parsable",
    "--export",
    "--requeue",
    "--no-requeue",
    "--open-mode",
    "--signal",
    "--output",
    "--error",
    "--hold",
)
"""Options of sbatch that salloc does not take."""

_SAVE_TIME = 120.0
"""Seconds: Slurm sends its signal up to 60 s early, and a save takes time."""


class SlurmSite:
    """backends.base.Site from the variables that Slurm sets for a job's batch script.

    job, names: a job and its node list, instead of those of the environment
    """

    def __init__(self, cluster: SlurmCluster, run: SubmittedRun, attempt: Attempt, job: str = "", names: str = "") -> None:
        self.cluster, self.run = cluster, run
        self.job, self.names = job or os.environ.get("SLURM_JOB_ID", ""), names or os.environ.get("SLURM_JOB_NODELIST", "")
        self.own = job or own_job_id(self.job)
        # The batch script has run the setup lines with the cluster's `python`. A process with its own allocation has not.
        self.python = [sys.executable]
        if job:
            self.python = ["bash", "-c", LOGIN, str(setup_file(run))] if cluster.setup else []
            self.python.append(cluster.python or sys.executable)
        stays = not job and attempt.request.min_nodes < attempt.request.nodes
        self.agent = "mikoshi.launch.backends.slurm.step" if stays else "mikoshi.launch.agent.node"
        if not self.job:
            raise LaunchError("not inside a Slurm job (SLURM_JOB_ID is not set): start it with `mikoshi submit`")

    def nodes(self) -> list[str]:
        """The nodes of the job, in Slurm's order."""
        return expand_nodelist(self.names)

    def command(self, node: str) -> list[str]:
        """A job step on a node that runs agent.node."""
        # --overlap, --mem=0 and no number of cores: the step may use all of the job's share of the node, beside other steps.
        # The cluster's defaults for binding and MPI are made for one process per core.
        step = [
            "srun", f"--jobid={self.job}", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "--mem=0",
            *gpu_request(self.cluster), "--cpu-bind=none", "--mpi=none", "--export=ALL", "--no-kill", "--kill-on-bad-exit=0",
            "--wait=0", "--unbuffered", f"--chdir={self.run.spec.workdir}",
        ]  # fmt: skip
        return [*step, *self.python, "-P", "-m", self.agent]

    def after(self, run: SubmittedRun, attempt: Attempt, result: Result) -> Result:
        """Requeue the job if its time was up, it was preempted, or one of its nodes is bad.

        A cancelled job is never requeued, and others at most cluster.requeues times without a checkpoint in between.
        """
        if attempt.stop is not None or result.state not in ("stopped", "failed"):
            return result
        if result.state == "failed" and not result.bad_nodes:
            return result
        try:
            job = parse_fields(run_command(["scontrol", "--oneliner", "show", "job", self.own]))
        except LaunchError as error:
            return _not_requeued(result, f"not queued again: {error}")
        if int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            return result.model_copy(update={"next": "requeued"})  # Slurm itself has requeued it, by preemption
        if job.get("JobState") != "RUNNING":
            return result
        if result.state == "stopped" and not self._interrupted(job):
            return result
        if (fruitless := attempts_without_checkpoint(run)) > self.cluster.requeues:
            return _not_requeued(result, f"not queued again: {fruitless} attempts in a row without a checkpoint (requeues)")
        return self._requeue(attempt, result, job)

    def _interrupted(self, job: dict[str, str]) -> bool:
        """Whether Slurm asked the run to stop: by preemption, or at the end of its time."""
        preempted = job.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
        return preempted or time_left(job) < self.cluster.warning + _SAVE_TIME

    def _requeue(self, attempt: Attempt, result: Result, job: dict[str, str]) -> Result:
        avoided, always = set(expand_nodelist(job.get("ExcNodeList", ""))), {*self.cluster.exclude, *attempt.request.exclude}
        bad = {*avoided, *attempt.request.bad, *result.bad_nodes} - always
        wanted = self._next_request(attempt, bad)
        again = result.model_copy(update={"next": "requeued"})
        backend = SlurmBackend(self.cluster)
        try:
            try:
                backend.check(self.run, wanted)
            except TooFewError:
                # A node may have been lost only briefly, and Slurm gives no job to a missing one.
                wanted = self._next_request(attempt, set())
                backend.check(self.run, wanted)
                if bad:
                    why = f"{result.why}; queued again with {', '.join(sorted(bad))}: too few nodes without"
                    again = again.model_copy(update={"why": why})
        except LaunchError as error:
            return _not_requeued(result, f"not queued again: {error}")
        with _signals_blocked():
            attempt.write(again)  # Slurm ends this process soon after it has requeued the job
            try:
                run_command(["scontrol", "requeue", self.own])
            except LaunchError as refused:
                return self._resubmit(wanted, again, refused)
            never = {*always, *wanted.bad}
            if never != avoided:
                # The job is not held for this update: if this process ended meanwhile, nobody would release it.
                with contextlib.suppress(LaunchError):
                    run_command(["scontrol", "update", f"JobId={self.own}", f"ExcNodeList={','.join(sorted(never))}"])
        return again

    def _next_request(self, attempt: Attempt, bad: set[str]) -> Request:
        return attempt.request.model_copy(update={"bad": sorted(bad), "cause": "requeue", "time": time.time()})

    def _resubmit(self, wanted: Request, again: Result, refused: LaunchError) -> Result:
        """Submit another job if Slurm does not let this one be requeued."""
        attempt = self.run.add(wanted)
        try:
            attempt.write_job(SlurmBackend(self.cluster).submit(self.run, attempt))
        except LaunchError as error:
            end = Result(state="refused", code=2, why=str(error), time=time.time())
            attempt.write(end)
            return _not_requeued(again, f"not queued again: {refused}; nor submitted anew: {error}")
        return again


@contextlib.contextmanager
def allocation(cluster: SlurmCluster, run: SubmittedRun, request: Request) -> Iterator[tuple[str, str]]:
    """Allocate nodes without a batch script, for up to a quarter of an hour: the job's id, and its node list.

    The nodes are released at the end in any case. Raises LaunchError.
    """
    mark = f"mikoshi doctor {run.spec.id}"
    with _exit_on_signals():
        try:
            backend = SlurmBackend(cluster)
            options = backend.options(run, request, "/dev/null", mark)
            kept = [option for option in options[1:] if not option.startswith(_BATCH_ONLY)]
            minutes = int(min(_MAX_ALLOCATION, backend.longest()) // 60)
            output = run_command(["salloc", "--no-shell", "--immediate=60", *kept, f"--time={max(1, minutes)}"], both=True)
            found = re.search(r"job allocation (\d+)", output)
            if found is None:
                raise LaunchError(f"salloc: {error_line(output)}")
            job = found.group(1)
            yield job, run_command(["squeue", "-h", f"--jobs={job}", "--format=%N"]).strip()
        finally:
            with _signals_blocked():
                cancel_by_comment(mark)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that cleanup runs."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP) if number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def attempts_without_checkpoint(run: SubmittedRun) -> int:
    """How many attempts in a row, up to the newest, have ended without a checkpoint."""
    saves = [event["time"] for event in read_jsonl(run.folder.events) if event.get("event") == "save" and "time" in event]
    count = 0
    for attempt in reversed(run.attempts):
        started = attempt.started
        if started is None or any(time_of >= started.time for time_of in saves):
            break
        count += 1
    return count


def _not_requeued(result: Result, why: str) -> Result:
    return result.model_copy(update={"next": "", "why": f"{result.why}; {why}"})


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that Slurm sends to a job that it requeues, since they also reach the commands that requeue it."""
    blocked = {signal.SIGTERM, signal.SIGCONT, signal.SIGHUP, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
