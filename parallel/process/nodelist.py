"""Slurm's compressed host lists, as in srun's variables, scontrol and squeue."""

from __future__ import annotations

import itertools
import re

_NUMBERS = re.compile(r"\[\s*(\d+\s*(?:-\s*\d+\s*)?(?:,\s*\d+\s*(?:-\s*\d+\s*)?)*)\]", re.ASCII)
_BETWEEN = re.compile(r",(?![^\[]*\])")


def expand_nodelist(nodelist: str) -> list[str]:
    """The host names of a list, in its order: n[01-03,7],login -> n01, n02, n03, n7, login.

    A name may have several brackets, of which the last varies fastest. Text that Slurm would not write is returned unchanged.
    """
    names: list[str] = []
    for part in map(str.strip, _BETWEEN.split(nodelist)):
        if part and part != "(null)":
            pieces = _NUMBERS.split(part)
            choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
            names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for item in ranges.split(","):
        first, dash, last = (piece.strip() for piece in item.partition("-"))
        if dash:
            found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        else:
            found.append(first)
    return found
