"""What a kind of cluster must be able to do. One package each: local, ssh, slurm, kubernetes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mikoshi.launch.runs.record import Attempt, Request, Result, Submitted


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job. why: in its own words, such as Resources, PartitionTimeLimit, OOMKilled."""

    state: Literal["queued", "running", "ended", "unknown"]
    why: str = ""
    nodes: tuple[str, ...] = ()


class Backend(Protocol):
    """Of the machine from which a run is submitted. All raise LaunchError: one line, with what to do."""

    def check(self, run: Submitted, request: Request) -> None:
        """Refuse what the cluster could never run: not reachable, no such partition, more nodes than it has."""
        ...

    def preview(self, run: Submitted, request: Request) -> str:
        """What submit() would hand over, exactly, as text."""
        ...

    def submit(self, run: Submitted, attempt: Attempt) -> dict[str, str]:
        """Have the cluster start controller.head for this attempt; what is needed to find it again. After an error nothing is
        left queued."""
        ...

    def look(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        """How these jobs stand, with one question to the scheduler for all of them."""
        ...

    def cancel(self, attempt: Attempt, now: bool) -> None:
        """Ask the attempt to save and end, or end it at once."""
        ...


class Site(Protocol):
    """Of the process that leads an attempt (controller.head), inside the cluster."""

    def nodes(self) -> list[str]:
        """Names of the nodes that this attempt may use, in rank order; beyond request.nodes they are spares."""
        ...

    def command(self, node: str) -> list[str]:
        """What to start, with pipes to its standard input and output, to have agent.node run on that node."""
        ...

    def after(self, run: Submitted, attempt: Attempt, result: Result) -> Result:
        """What this kind of cluster does by itself when an attempt has ended: queue it again, without its bad nodes. The
        result with `next` set accordingly."""
        ...
