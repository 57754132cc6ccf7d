"""Schedules pairwise measurements in rounds of disjoint pairs; a large cluster gets a sample of all rounds."""

from __future__ import annotations

MAX_ROUNDS = 64
"""Up to 65 nodes, every two meet. In a larger cluster each meets so many others, spread evenly, so that the time is bounded."""


def round_robin(count: int, max_rounds: int | None = None) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which every two meet once, in as few rounds as possible (circle method).

    In each round of an odd number one is left out (https://en.wikipedia.org/wiki/Round-robin_tournament#Circle_method).

    max_rounds: if set, at most so many rounds, spread evenly
    """
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    total = len(seats) - 1 if count > 1 else 0
    chosen = total if max_rounds is None else min(max_rounds, total)
    rounds = []
    for number in (index * total // chosen for index in range(chosen)):
        rotated = [seats[0], *seats[len(seats) - number :], *seats[1 : len(seats) - number]]
        half = len(rotated) // 2
        pairs = [
            (a, b) for a, b in zip(rotated[:half], reversed(rotated[half:]), strict=True) if a is not None and b is not None
        ]
        rounds.append(sorted((min(pair), max(pair)) for pair in pairs))
    return rounds
