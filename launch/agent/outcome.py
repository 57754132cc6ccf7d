"""How the ranks of one attempt ended, on one node or on all: what the policy judges."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mikoshi.trainer.config.data import Section
from mikoshi.trainer.exit_codes import DONE, LOST_PEER, PREEMPTED, USER_ERROR
from mikoshi.trainer.signals import ASKING

MILD = (DONE, PREEMPTED, USER_ERROR, LOST_PEER, *(-number for number in ASKING))
"""How a rank ends of itself, or because of another: what others have to say of it is worth a moment."""


class Silent(Section):
    """The rank that held up the others, for how many seconds, and whether its process was stopped."""

    rank: int
    seconds: float
    stopped: bool


class Ended(Section):
    """By rank. codes: exit codes of those that ended by themselves, a signal as its negative number; said, said_at: their own
    words and when; at: step and phase that each was in last. overdue: killed after a stop was asked for. abandons: whether
    ranks elsewhere wait in vain for one of these. stacks: the folder where they were kept. nodes: of every rank, where there
    are several; lost: nodes without a word, and why it is thought so. regroup: stopped because there are more nodes now."""

    ranks: int
    codes: dict[int, int] = Field({})
    said: dict[int, str] = Field({})
    said_at: dict[int, float] = Field({})
    at: dict[int, tuple[int, str]] = Field({})
    silent: Silent | None = None
    overdue: list[int] = Field([])
    abandons: bool = False
    stacks: str = ""
    answers: dict[int, str] = Field({}, description="what ranks left behind for the one who asked")
    nodes: dict[int, str] = Field({})
    lost: dict[str, str] = Field({})
    regroup: bool = False

    def first(self, wrong: Sequence[int], lost_peer: int, killed: int) -> int:
        """The rank whose fault the others' follow from: one that dies takes its peers' connections with it."""
        own = [rank for rank in wrong if self.codes[rank] != lost_peer]
        if not own:
            return wrong[0]
        never = float("inf")
        return min(own, key=lambda r: (self.codes[r] != killed, self.codes[r] >= 0, self.said_at.get(r, never)))


def merged(parts: Sequence[Ended]) -> Ended:
    """What all nodes say, as one."""
    told: dict[str, object] = {name: {} for name in ("codes", "said", "said_at", "at", "answers", "nodes", "lost")}
    for name in told:
        told[name] = {key: value for part in parts for key, value in getattr(part, name).items()}
    return Ended.model_validate(
        told
        | {
            "ranks": sum(part.ranks for part in parts),
            "silent": next((part.silent for part in parts if part.silent), None),
            "overdue": sorted(rank for part in parts for rank in part.overdue),
            "abandons": any(part.abandons for part in parts),
            "stacks": next((part.stacks for part in parts if part.stacks), ""),
        }
    )
