"""Digests of a source's files, computed again only if a file may have changed.

A file counts as unchanged if its size, times and inode are those with which it was digested. They are not trusted if the file
changed less than two seconds before, since a coarse clock would hide a change right after. Remote files are identified by the
tags in their names (`Source.describe`).
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

from mikoshi.data.errors import os_errors_named
from mikoshi.data.io.cores import cores
from mikoshi.data.io.files import File, blocks, open_binary, source_errors_named
from mikoshi.data.io.progress import Progress, ProgressCallback, no_progress

SOURCES = "sources.json"

_FRESH = 2_000_000_000  # ns
_SHOWN = 64 << 20  # bytes that take long enough to be shown
_SEEN = 16  # places and times at which a file was found to be the same
_WHOLE, _BLOCKS, _BLOCK = 64 << 20, 64, 1 << 20

StatSignature = tuple[int, int, int, int]
"""Size, time of the last change of the content and of anything in ns, and inode."""


@dataclass(frozen=True)
class Contents:
    """For each file its SHA-256, and the stat signatures with which it had that digest.

    sampled: for a file over 64 MiB, the digest covers 64 samples of a MiB, evenly spaced, rather than the whole.
    """

    digests: Mapping[str, str] = field(default_factory=dict)
    signatures: Mapping[str, tuple[StatSignature, ...]] = field(default_factory=dict)
    sampled: bool = False

    @property
    def digest(self) -> str:
        """One digest of all files."""
        return hashlib.sha256(json.dumps(dict(self.digests), sort_keys=True).encode()).hexdigest()

    def first_difference(self, before: Contents) -> str:
        """The name of the first file that differs from `before`; "" if none does."""
        names = sorted({*self.digests, *before.digests})
        return next((name for name in names if self.digests.get(name) != before.digests.get(name)), "")

    def to_json(self) -> bytes:
        """The content of sources.json, which `read_contents` reads."""
        files = {name: {"sha256": digest, "seen": self.signatures.get(name, ())} for name, digest in self.digests.items()}
        return json.dumps({"sampled": self.sampled, "files": files}).encode() + b"\n"


def read_contents(path: Path) -> Contents | None:
    """The Contents stored at `path`; None if there are none or they are damaged."""
    with os_errors_named(path):
        try:
            raw: dict[str, Any] = json.loads(path.read_bytes())
            looks: dict[str, tuple[StatSignature, ...]] = {
                name: tuple((size, content, change, inode) for size, content, change, inode in file["seen"])
                for name, file in raw["files"].items()
            }
            return Contents({n: file["sha256"] for n, file in raw["files"].items()}, looks, bool(raw["sampled"]))
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None


def contents_of(
    files: tuple[File, ...], known: Contents | None, sampled: bool = False, show: ProgressCallback = no_progress
) -> Contents:
    """Digests of the local files among `files`. Files whose stat signature is known are not read again. Raises DataError or
    StorageError for what cannot be read."""
    before = known if known is not None and known.sampled == sampled else Contents()
    local = [file for file in files if not file.remote]
    digests, looks, left = dict[str, str](), dict[str, tuple[StatSignature, ...]](), list[File]()
    for file in local:
        with source_errors_named(file.name):
            look = _stat_signature(file)
        if look in before.signatures.get(file.name, ()):
            digests[file.name], looks[file.name] = before.digests[file.name], before.signatures[file.name]
        else:
            left.append(file)
    progress = Progress("reading what the source holds", sum(file.size for file in left))
    with ThreadPoolExecutor(cores()) as pool:
        for file, (digest, own) in zip(left, pool.map(lambda file: _digest_file(file, sampled), left), strict=True):
            seen = before.signatures.get(file.name, ()) if before.digests.get(file.name) == digest else ()
            digests[file.name], looks[file.name] = digest, (*seen, *own)[-_SEEN:]
            progress.done_bytes += file.size
            if progress.total_bytes > _SHOWN:
                show(progress)
    return Contents(digests, looks, sampled)


def _stat_signature(file: File) -> StatSignature:
    found = Path(file.url).stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _digest_file(file: File, sampled: bool) -> tuple[str, tuple[StatSignature, ...]]:
    with source_errors_named(file.name):
        look, now = _stat_signature(file), time.time_ns()
        digest = hashlib.sha256()
        for block in _sample(file) if sampled and file.size > _WHOLE else blocks(file):
            digest.update(block)
        kept = max(look[1:3]) < now - _FRESH and _stat_signature(file) == look
        return digest.hexdigest(), (look,) if kept else ()


def _sample(file: File) -> Iterator[bytes]:
    with open_binary(file) as stream:
        for number in range(_BLOCKS):
            stream.seek((file.size - _BLOCK) * number // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
