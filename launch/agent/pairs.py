"""Which two nodes are measured when: rounds of disjoint pairs, of which a large cluster takes a sample."""

from __future__ import annotations

MOST = 64
"""Rounds: of up to 65 nodes every two meet; of more, each meets so many others, spread evenly, and the time stays the same."""


def tournament(count: int, most: int | None = None) -> list[list[tuple[int, int]]]:
    """Rounds in which everyone meets everyone else once, in disjoint pairs: as few rounds as can be (the circle method). With
    `most`, so many of them at most: in each, everyone meets another one (one of an odd number rests)."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    total = len(seats) - 1 if count > 1 else 0
    taken = total if most is None else min(most, total)
    rounds = []
    for number in (place * total // taken for place in range(taken)):
        turned = [seats[0], *seats[len(seats) - number :], *seats[1 : len(seats) - number]]
        half = len(turned) // 2
        met = [(a, b) for a, b in zip(turned[:half], reversed(turned[half:]), strict=True) if a is not None and b is not None]
        rounds.append(sorted((min(pair), max(pair)) for pair in met))
    return rounds
