"""Which texts are kept: quality filters, each with its own reason, and the first of equal documents.

The filters are of the kind in Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
appendix A.1: lengths, the share of symbols, the share of repeated lines.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mikoshi.data.errors import DataError
from mikoshi.data.io.atomic import fsync_path, write_file

_AT_ONCE = 1 << 22  # documents compared in memory together
_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])


@dataclass(frozen=True)
class Filters:
    """Which documents are left out; by default none. The first filter that applies, in this order, is the reason.

    min_chars, max_chars: length in characters (0: any).
    max_symbols: largest share of characters that are neither letters, digits nor white space.
    max_repeated_lines: largest share of lines that repeat an earlier one, blank lines not counted.
    drop_matching: a regular expression; texts in which it is found are dropped.

    Raises DataError for values that make no sense.
    """

    min_chars: int = 0
    max_chars: int = 0
    max_symbols: float = 1.0
    max_repeated_lines: float = 1.0
    drop_matching: str = ""

    def __post_init__(self) -> None:
        for name in ("max_symbols", "max_repeated_lines"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"data.filters.{name} = {getattr(self, name)}: a share lies between 0 and 1")
        if self.min_chars < 0 or self.max_chars < 0 or 0 < self.max_chars < self.min_chars:
            raise DataError(f"data.filters: no text has min_chars = {self.min_chars} and max_chars = {self.max_chars}")
        try:
            re.compile(self.drop_matching)
        except re.error as error:
            raise DataError(f"data.filters.drop_matching = {self.drop_matching!r}: not a regular expression: {error}") from None


def why_dropped(text: str, filters: Filters) -> str:
    """The name of the filter that drops the text, or ""."""
    if len(text) < filters.min_chars:
        return "min_chars"
    if 0 < filters.max_chars < len(text):
        return "max_chars"
    if filters.max_symbols < 1 and symbol_share(text) > filters.max_symbols:
        return "max_symbols"
    if filters.max_repeated_lines < 1 and repeated_share(text) > filters.max_repeated_lines:
        return "max_repeated_lines"
    if filters.drop_matching and _pattern(filters.drop_matching).search(text):
        return "drop_matching"
    return ""


_pattern = functools.cache(re.compile)


@functools.cache
def _symbols() -> npt.NDArray[np.bool_]:
    """For every code point, whether it is a symbol: a look-up is tens of times faster than asking character by character."""
    return np.array([not (c.isalnum() or c.isspace()) for c in map(chr, range(0x110000))])


def symbol_share(text: str) -> float:
    """Share of characters that are neither letters, digits nor white space; 0 for an empty text."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return float(_symbols()[points].mean()) if len(points) else 0.0


def repeated_share(text: str) -> float:
    """Share of non-blank lines that equal an earlier one, surrounding white space aside; 0 if there is none."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def write_hashes(path: Path, digests: bytes) -> int:
    """Write the 128-bit digests of a piece's documents, sorted for find_duplicates. Returns their number."""
    plain = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    rows = np.empty(len(plain), dtype=_HASH)
    rows["high"], rows["low"], rows["place"] = plain[:, 0], plain[:, 1], np.arange(len(plain))
    write_file(path, rows[np.lexsort((rows["low"], rows["high"]))].tobytes())
    return len(rows)


def count_hashes(path: Path) -> int:
    """The number of digests in a file of write_hashes."""
    return path.stat().st_size // _HASH.itemsize


def find_duplicates(hashes: list[Path], folder: Path, show: Callable[[int, int], None] = lambda _a, _b: None) -> int:
    """Find the documents that equal an earlier one, over all pieces; `hashes` are the pieces' files in their order.

    For every piece with duplicates, `folder` gets a file of the same name, which `read_duplicates` reads. Returns the total
    number of duplicates. Documents are compared by 128 bits of a cryptographic digest, up to 4 million at a time: memory is
    about 80 bytes for each of those, disk 20 bytes a document. `show` is called with the parts done and the number of parts.
    """
    done = folder / "done.json"
    if done.exists():
        return int(json.loads(done.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    total = sum(map(count_hashes, hashes))
    parts = -(-total // _AT_ONCE) or 1
    edges = np.array([-(-part * 2**64 // parts) for part in range(1, parts)], dtype=np.uint64)
    cuts = [_cuts(path, edges) for path in hashes]
    found = 0
    for part in range(parts):
        show(part, parts)
        rows = [_rows(path, int(at[part]), int(at[part + 1])) for path, at in zip(hashes, cuts, strict=True)]
        owner = np.repeat(np.arange(len(rows), dtype=np.uint32), [len(r) for r in rows])
        together = np.concatenate(rows) if rows else np.zeros(0, dtype=_HASH)
        repeated = _repeated(together["high"].copy(), together["low"].copy())
        found += len(repeated)
        for piece, places in _by_owner(owner[repeated], together["place"][repeated]):
            with (folder / hashes[piece].name).open("ab") as out:
                out.write(places.tobytes())
    for path in folder.iterdir():
        fsync_path(path)
    write_file(done, json.dumps(found).encode())
    return found


def _repeated(high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Which of these pairs equal an earlier one, ascending."""
    if len(high) < 2:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(high, kind="stable")
    same = high[order[1:]] == high[order[:-1]]
    alike = order[np.concatenate((same, [False])) | np.concatenate(([False], same))]  # few: sorted by the other half too
    alike = alike[np.lexsort((low[alike], high[alike]))]
    return np.sort(alike[1:][(high[alike[1:]] == high[alike[:-1]]) & (low[alike[1:]] == low[alike[:-1]])])


def read_duplicates(path: Path) -> npt.NDArray[np.uint32]:
    """The numbers of a piece's documents that equal an earlier one, sorted, as find_duplicates wrote them."""
    return np.sort(np.fromfile(path, dtype="<u4")) if path.exists() else np.zeros(0, dtype=np.uint32)


def _rows(path: Path, start: int, stop: int) -> npt.NDArray[Any]:
    return np.fromfile(path, dtype=_HASH, count=stop - start, offset=start * _HASH.itemsize)


def _cuts(path: Path, edges: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where each part of the hashes begins in a piece's sorted file, and the file's end."""
    high = np.fromfile(path, dtype=_HASH)["high"]
    return np.concatenate(([0], np.searchsorted(high, edges), [len(high)])).astype(np.int64)


def _by_owner(owner: npt.NDArray[np.uint32], places: npt.NDArray[np.uint32]) -> list[tuple[int, npt.NDArray[np.uint32]]]:
    """The places of each owner; `owner` ascends."""
    pieces, starts = np.unique(owner, return_index=True)
    stops = [*starts[1:], len(owner)]
    return [(int(piece), places[a:b]) for piece, a, b in zip(pieces, starts, stops, strict=bool(len(pieces)))]
