"""Slurm's client commands, called so that nothing of the caller's own job or habits changes what they do."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence

from mikoshi.launch.backends.slurm import text as slurm_text
from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.trainer.errors import LaunchError

_ANSWER = 90.0
_SILENT = ("Unable to contact", "Connection refused", "timed out", "Zero Bytes were transmitted", "Unable to establish")
_NOWHERE = "Could not establish a configuration source"
_GONE = ("Invalid job id", "already completing or completed", "Job/step already")
_KEPT = ("SLURM_CONF", "SLURM_JWT")


def ask(argv: Sequence[str], gone: str | None = None, both: bool = False) -> str:
    """What a command prints, with what it says on stderr if `both`. gone: what it is to be where Slurm does not know the job
    (any more). Raises LaunchError with the command's own words where it refuses, or where Slurm does not answer."""
    try:
        done = subprocess.run(
            argv, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_ANSWER
        )
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: not found: submit from where Slurm's commands are, such as a login node") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"slurm: {argv[0]} had no answer within {_ANSWER:g} s: try again later") from None
    if not done.returncode:
        return done.stdout + done.stderr if both else done.stdout
    told = slurm_text.said(done.stderr)
    if gone is not None and any(sign in told for sign in _GONE):
        return gone
    if any(sign in told for sign in _SILENT):
        raise LaunchError(f"slurm: the controller does not answer ({told}): try again later")
    if _NOWHERE in told:
        raise LaunchError(
            f"slurm: no cluster is known here ({argv[0]} finds no slurm.conf): submit from a login node, or set SLURM_CONF"
        )
    raise LaunchError(f"{argv[0]}: {told}")


def queue(argv: Sequence[str], mark: str) -> str:
    """Submit by sbatch; the job's id. mark: the --comment among the options, by which a job is found and taken back whose
    submission did not end well. Raises LaunchError: then nothing is queued, or the error says that this cannot be told."""
    try:
        ident = ask(argv).strip().partition(";")[0]
        if not ident.isdigit():
            raise LaunchError(f"sbatch: no job id in its answer: {ident[:200]!r}")
    except BaseException as error:
        sure = take_back(mark)
        if isinstance(error, LaunchError) and not sure:
            look = 'squeue --me --format="%A %k"'
            raise LaunchError(
                f"{error}; whether it was queued cannot be told: once Slurm answers, scancel what {look} shows for {mark}"
            ) from None
        if isinstance(error, LaunchError) and "--" not in str(error):
            raise LaunchError(f"{error}; nothing is queued") from None
        raise
    return ident


def environment() -> dict[str, str]:
    """The caller's, without what Slurm set for a job that the caller may be in, or what the caller has set for others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in _KEPT}
    return {**kept, "LC_ALL": "C"}


def own_job(job: str) -> str:
    """What scontrol is to call the job that this process is in: the number of a task may be that of its whole array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID", "") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task and job == os.environ.get("SLURM_JOB_ID") else job


def take_back(mark: str) -> bool:
    """Cancel the caller's jobs that have this comment; whether Slurm has answered, so that none is left."""
    try:
        listing = ask(["squeue", "-h", f"--user={os.getuid()}", "--format=%A|%k"])
        for line in listing.splitlines():
            ident, _, comment = line.partition("|")
            if comment == mark:
                ask(["scancel", ident], gone="")
    except LaunchError:
        return False
    return True


def gpu_request(cluster: SlurmCluster) -> list[str]:
    """How a job, and a step of it on one node, asks for the GPUs of a node."""
    if not cluster.gpus_per_node or cluster.gpu_request == "none":
        return []
    what = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)
    return [f"--gres=gpu:{what}" if cluster.gpu_request == "gres" else f"--gpus-per-node={what}"]


def left(job: dict[str, str]) -> float:
    """Seconds until a job's time is up, of what scontrol shows; infinite where it says nothing of that."""
    try:
        return time.mktime(time.strptime(job.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - time.time()
    except ValueError:
        return float("inf")
