"""Paths in what is printed: in a command, as a shell takes it back; in a sentence, on one line."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path


def shown(path: Path) -> str:
    """A path as someone in the current folder calls it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def typed(path: Path | str) -> str:
    """A path as one word of a command that bash reads: nothing in it is expanded, breaks the line or passes for an option."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def named(path: Path | str) -> str:
    """A path within a sentence: as it is, or in quotes where it would break the line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _escaped(sign: str) -> str:
    if sign in "\\'":
        return f"\\{sign}"
    # Three octal digits each: more of them, or letters, may follow.
    return sign if sign.isprintable() else "".join(f"\\{byte:03o}" for byte in sign.encode("utf-8", "surrogateescape"))
