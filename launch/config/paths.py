"""Formats paths for output: quoted for a shell in a command, on one line in a sentence."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path


def relative(path: Path) -> str:
    """A path relative to the current folder, if it is below it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def shell_quoted(path: Path | str) -> str:
    """A path as one word for bash, in which nothing is expanded and which is not taken for an option."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    return f"$'{''.join(map(_escaped, text))}'"


def printable(path: Path | str) -> str:
    """A path in a sentence: as it is, or quoted if it would break the line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _escaped(sign: str) -> str:
    if sign in "\\'":
        return f"\\{sign}"
    # Always three octal digits, since digits or letters may follow.
    return sign if sign.isprintable() else "".join(f"\\{byte:03o}" for byte in sign.encode("utf-8", "surrogateescape"))
