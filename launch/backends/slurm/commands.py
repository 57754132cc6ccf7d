"""Calls Slurm's client commands, unaffected by the caller's own job and settings."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

from mikoshi.launch.backends.slurm.parse import error_line
from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.trainer.errors import LaunchError

_TIMEOUT = 90.0
_UNREACHABLE = ("Unable to contact", "Connection refused", "timed out", "Zero Bytes were transmitted", "Unable to establish")
_NO_CONFIG = "Could not establish a configuration source"
_GONE = ("Invalid job id", "already completing or completed", "Job/step already")
_KEPT = ("SLURM_CONF", "SLURM_JWT")


def run_command(argv: Sequence[str], gone: str | None = None, both: bool = False) -> str:
    """Run a command and return its output.

    Raises LaunchError with the command's own message if it fails, or if Slurm does not answer.

    gone: returned if Slurm does not know the job
    both: include stderr
    """
    try:
        done = subprocess.run(
            argv,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: not found: submit from where Slurm's commands are, such as a login node") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"slurm: {argv[0]} had no answer within {_TIMEOUT:g} s: try again later") from None
    if not done.returncode:
        return done.stdout + done.stderr if both else done.stdout
    error = error_line(done.stderr)
    if gone is not None and any(sign in error for sign in _GONE):
        return gone
    if any(sign in error for sign in _UNREACHABLE):
        raise LaunchError(f"slurm: the controller does not answer ({error}): try again later")
    if _NO_CONFIG in error:
        raise LaunchError(
            f"slurm: no cluster is known here ({argv[0]} finds no slurm.conf): submit from a login node, or set SLURM_CONF"
        )
    raise LaunchError(f"{argv[0]}: {error}")


def submit_batch(argv: Sequence[str], mark: str) -> str:
    """Submit by sbatch, and return the job's id.

    Raises LaunchError; nothing is queued then, unless the error says that this is unknown.

    mark: the --comment among the options, by which a job is found and cancelled if its submission fails half-way
    """
    try:
        ident = run_command(argv).strip().partition(";")[0]
        if not ident.isdigit():
            raise LaunchError(f"sbatch: no job id in its answer: {ident[:200]!r}")
    except BaseException as error:
        sure = cancel_by_comment(mark)
        if isinstance(error, LaunchError) and not sure:
            look = 'squeue --me --format="%A %k"'
            raise LaunchError(
                f"{error}; whether it was queued cannot be told: once Slurm answers, scancel what {look} shows for {mark}"
            ) from None
        if isinstance(error, LaunchError) and "--" not in str(error):
            raise LaunchError(f"{error}; nothing is queued") from None
        raise
    return ident


def clean_environment() -> dict[str, str]:
    """The environment without the variables of a job that the caller may be in, and without the caller's Slurm settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in _KEPT}
    return {**kept, "LC_ALL": "C"}


def own_job_id(job: str) -> str:
    """The id by which scontrol knows this process's job. An array task's number may be that of the whole array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID", "") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task and job == os.environ.get("SLURM_JOB_ID") else job


def cancel_by_comment(mark: str) -> bool:
    """Cancel the caller's jobs with this comment. Returns whether Slurm has answered, so that none is left."""
    try:
        listing = run_command(["squeue", "-h", f"--user={os.getuid()}", "--format=%A|%k"])
        for line in listing.splitlines():
            ident, _, comment = line.partition("|")
            if comment == mark:
                run_command(["scancel", ident], gone="")
    except LaunchError:
        return False
    return True


def gpu_request(cluster: SlurmCluster) -> list[str]:
    """Options that request the GPUs of a node, for a job or for a step on one node."""
    if not cluster.gpus_per_node or cluster.gpu_request == "none":
        return []
    what = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)
    return [f"--gres=gpu:{what}" if cluster.gpu_request == "gres" else f"--gpus-per-node={what}"]


def time_left(job: dict[str, str]) -> float:
    """Seconds until a job's time is up, from scontrol's fields; infinite if they do not say."""
    try:
        return time.mktime(time.strptime(job.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:
        return float("inf")
