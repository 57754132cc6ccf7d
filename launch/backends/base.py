"""The two protocols that every kind of cluster implements. Packages: local, ssh, slurm, kubernetes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mikoshi.launch.runs.record import Attempt, Request, Result, SubmittedRun


@dataclass(frozen=True)
class JobState:
    """The scheduler's state of a job.

    why: the scheduler's own reason, such as Resources, PartitionTimeLimit, OOMKilled
    nodes: nodes that the job runs on
    """

    state: Literal["queued", "running", "ended", "unknown"]
    why: str = ""
    nodes: tuple[str, ...] = ()


class Backend(Protocol):
    """Used on the machine from which runs are submitted. All methods raise LaunchError: one line, with what to do."""

    def check(self, run: SubmittedRun, request: Request) -> None:
        """Refuse what the cluster can never run: unreachable, no such partition, too few nodes."""
        ...

    def preview(self, run: SubmittedRun, request: Request) -> str:
        """Return exactly what submit() would submit, as text."""
        ...

    def submit(self, run: SubmittedRun, attempt: Attempt) -> dict[str, str]:
        """Have the cluster start controller.head for this attempt, and return what is needed to find the job.

        After an error no job is left queued.
        """
        ...

    def query(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        """Return the states of these jobs, with one query to the scheduler for all of them."""
        ...

    def cancel(self, attempt: Attempt, now: bool) -> None:
        """Ask the attempt to save and end, or end it at once if `now` is set."""
        ...


class Site(Protocol):
    """Used by the head process (controller.head), inside the cluster."""

    def nodes(self) -> list[str]:
        """Names of the nodes that this attempt may use, in rank order. Those beyond request.nodes are spares."""
        ...

    def command(self, node: str) -> list[str]:
        """The command that runs agent.node on a node, with pipes to its standard input and output."""
        ...

    def after(self, run: SubmittedRun, attempt: Attempt, result: Result) -> Result:
        """Do what this kind of cluster does when an attempt has ended, such as requeue it without its bad nodes.

        Returns the result with `next` set accordingly.
        """
        ...
