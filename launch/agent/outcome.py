"""How the ranks of one attempt ended, on one node or on all of them. The restart policy decides by it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mikoshi.trainer.config.data import Section
from mikoshi.trainer.exit_codes import DONE, LOST_PEER, PREEMPTED, USER_ERROR
from mikoshi.trainer.signals import STOP_SIGNALS

BENIGN_CODES = (DONE, PREEMPTED, USER_ERROR, LOST_PEER, *(-number for number in STOP_SIGNALS))
"""Exit codes of a rank that ended normally or because of another rank: the cause may still be reported."""


class HungRank(Section):
    """The rank that held up the others, its silence in seconds, and whether its process was stopped."""

    rank: int
    seconds: float
    stopped: bool


class RanksOutcome(Section):
    """How the ranks ended. Dictionaries are by global rank.

    codes: exit codes of the ranks that ended by themselves; a signal is its negative number
    said, said_at: their error messages, and when they were written
    at: the last step and phase of each
    silent: the rank that hung
    overdue: ranks that were killed after a request to stop
    abandons: whether ranks elsewhere wait in vain for one of these
    stacks: the folder with the stacks
    nodes: the node of every rank, if there are several
    lost: lost nodes, with the reason
    regroup: the ranks were stopped to use more nodes
    """

    ranks: int
    codes: dict[int, int] = Field({})
    said: dict[int, str] = Field({})
    said_at: dict[int, float] = Field({})
    at: dict[int, tuple[int, str]] = Field({})
    silent: HungRank | None = None
    overdue: list[int] = Field([])
    abandons: bool = False
    stacks: str = ""
    answers: dict[int, str] = Field({}, description="what ranks left behind for the one who asked")
    nodes: dict[int, str] = Field({})
    lost: dict[str, str] = Field({})
    regroup: bool = False

    def root_cause(self, wrong: Sequence[int], lost_peer: int, killed: int) -> int:
        """The rank whose fault caused the others: a rank that dies breaks its peers' connections.

        wrong: ranks that failed
        lost_peer, killed: exit codes of a rank that lost a peer and of a killed one
        """
        own = [rank for rank in wrong if self.codes[rank] != lost_peer]
        if not own:
            return wrong[0]
        never = float("inf")
        return min(own, key=lambda r: (self.codes[r] != killed, self.codes[r] >= 0, self.said_at.get(r, never)))


def merge(parts: Sequence[RanksOutcome]) -> RanksOutcome:
    """Merge the outcomes of all nodes into one."""
    fields: dict[str, object] = {name: {} for name in ("codes", "said", "said_at", "at", "answers", "nodes", "lost")}
    for name in fields:
        fields[name] = {key: value for part in parts for key, value in getattr(part, name).items()}
    return RanksOutcome.model_validate(
        fields
        | {
            "ranks": sum(part.ranks for part in parts),
            "silent": next((part.silent for part in parts if part.silent), None),
            "overdue": sorted(rank for part in parts for rank in part.overdue),
            "abandons": any(part.abandons for part in parts),
            "stacks": next((part.stacks for part in parts if part.stacks), ""),
        }
    )
