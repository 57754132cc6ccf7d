"""What the files of a source held when they were read: a digest of each, taken again only where a file may be another.

A file is taken for the same where its size, times and inode are those with which its digest was found. They do not count
where it was changed within two seconds before: a clock that ticks slowly would hide a change that comes right after.
Files of stores far away are known by the tags that their names carry (`Source.describe`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mikoshi.data.errors import reading
from mikoshi.data.io.cores import cores
from mikoshi.data.io.files import File, blocks, open_binary, told
from mikoshi.data.io.progress import Progress, Show, quiet

SOURCES = "sources.json"

_FRESH = 2_000_000_000  # ns
_SHOWN = 64 << 20  # bytes that take long enough to be shown
_SEEN = 16  # places and times at which a file was found to be the same
_WHOLE, _BLOCKS, _BLOCK = 64 << 20, 64, 1 << 20

Look = tuple[int, int, int, int]
"""Size, time of the last change of the content and of anything in ns, and inode."""


@dataclass(frozen=True)
class Contents:
    """By file: its SHA-256, and the looks with which it had that. `sampled`: of a file over 64 MiB, 64 stretches of a MiB all
    over it are digested, not the whole."""

    digests: Mapping[str, str] = field(default_factory=dict)
    looks: Mapping[str, tuple[Look, ...]] = field(default_factory=dict)
    sampled: bool = False

    @property
    def digest(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(dict(self.digests), sort_keys=True).encode()).hexdigest()

    def other_than(self, before: Contents) -> str:
        """The name of a file that is not what it was; "" where there is none."""
        names = sorted({*self.digests, *before.digests})
        return next((name for name in names if self.digests.get(name) != before.digests.get(name)), "")

    def plain(self) -> bytes:
        files = {name: {"sha256": digest, "seen": self.looks.get(name, ())} for name, digest in self.digests.items()}
        return json.dumps({"sampled": self.sampled, "files": files}).encode() + b"\n"


def read_contents(path: Path) -> Contents | None:
    """What was written down there; None where nothing readable was."""
    with reading(path):
        try:
            raw: dict[str, Any] = json.loads(path.read_bytes())
            looks: dict[str, tuple[Look, ...]] = {
                name: tuple((size, content, change, inode) for size, content, change, inode in file["seen"])
                for name, file in raw["files"].items()
            }
            return Contents({n: file["sha256"] for n, file in raw["files"].items()}, looks, bool(raw["sampled"]))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None


def contents_of(files: tuple[File, ...], known: Contents | None, sampled: bool = False, show: Show = quiet) -> Contents:
    """What the local ones of these files hold now; those that look as they did before are not read. Raises DataError or
    StorageError for what cannot be read."""
    before = known if known is not None and known.sampled == sampled else Contents()
    local = [file for file in files if not file.remote]
    digests, looks, left = dict[str, str](), dict[str, tuple[Look, ...]](), list[File]()
    for file in local:
        with told(file.name):
            look = _look(file)
        if look in before.looks.get(file.name, ()):
            digests[file.name], looks[file.name] = before.digests[file.name], before.looks[file.name]
        else:
            left.append(file)
    progress = Progress("reading what the source holds", sum(file.size for file in left))
    with ThreadPoolExecutor(cores()) as pool:
        for file, (digest, own) in zip(left, pool.map(lambda file: _digested(file, sampled), left), strict=True):
            seen = before.looks.get(file.name, ()) if before.digests.get(file.name) == digest else ()
            digests[file.name], looks[file.name] = digest, (*seen, *own)[-_SEEN:]
            progress.done_bytes += file.size
            if progress.total_bytes > _SHOWN:
                show(progress)
    return Contents(digests, looks, sampled)


def _look(file: File) -> Look:
    found = Path(file.url).stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _digested(file: File, sampled: bool) -> tuple[str, tuple[Look, ...]]:
    with told(file.name):
        look, now = _look(file), time.time_ns()
        digest = hashlib.sha256()
        for block in _sample(file) if sampled and file.size > _WHOLE else blocks(file):
            digest.update(block)
        kept = max(look[1:3]) < now - _FRESH and _look(file) == look
        return digest.hexdigest(), (look,) if kept else ()


def _sample(file: File) -> Iterator[bytes]:
    with open_binary(file) as stream:
        for number in range(_BLOCKS):
            stream.seek((file.size - _BLOCK) * number // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
