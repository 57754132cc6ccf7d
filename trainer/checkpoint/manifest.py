"""manifest.json: what a checkpoint holds and where. Every part of it is checked before it is used.

A parsed manifest refers only to files that it lists, by plain names, and its pieces make up each tensor exactly. It is one
line: `{"sha256":"<of the bytes of content>","content":{...}}`.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, TypedDict

from mikoshi.trainer.checkpoint.storage.base import MANIFEST, checked_name
from mikoshi.trainer.checkpoint.storage.digests import DIGITS, Digests
from mikoshi.trainer.errors import CheckpointError

FORMAT = 2
# The dtypes of a checkpoint: torch's name -> that of the safetensors format.
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_SIZES = {name: int(re.sub(r"_.*|\D", "", code) or 8) // 8 for name, code in DTYPES.items()}  # bytes an element
_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})","content":')
_HEX = re.compile(r"[0-9a-f]+")
_LIMIT = 1 << 62  # of sizes and counts: products of two dimensions stay within Python's fast integers


class FileEntry(Digests):
    """Size in bytes and digests of a file."""

    size: int


class PieceEntry(TypedDict):
    """Where a piece lies in its tensor, and the file that holds it."""

    offset: list[int]
    shape: list[int]
    file: str


class TensorEntry(TypedDict):
    """Dtype, shape and pieces of a tensor."""

    dtype: str
    shape: list[int]
    pieces: list[PieceEntry]


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    record: what the run needs to resume, plain JSON: step, config, position in the data.
    files: name -> size and digests.
    tensors: canonical name -> dtype, shape and pieces (offset, shape, file).
    made: when and by which versions it was written, and the SHA-256 of parts of the record, to compare checkpoints by.
    """

    record: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step that the checkpoint was saved after."""
        return int(self.record["step"])


def file_of(where: object) -> str:
    """Returns the manifest's name in messages, for the checkpoint called `where`."""
    return f"{where}/{MANIFEST}"


def provenance(record: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Returns the `made` of a manifest that is written now.

    ranks: number of ranks that saved.
    """
    import torch  # only here: reading a manifest needs no torch and takes a tenth of the time

    try:
        ours = version("mikoshi")
    except PackageNotFoundError:
        ours = "unknown"
    versions = {"mikoshi": ours, "torch": str(torch.__version__), "python": platform.python_version()}
    digests = {key: _sha256(json.dumps(record[key], sort_keys=True).encode()) for key in ("config", "data") if key in record}
    return {"time": int(time.time()), "ranks": ranks, "versions": versions, "sha256": digests}


def encode(manifest: Manifest) -> bytes:
    """Returns the bytes of manifest.json."""
    content = {
        "format": FORMAT, "record": manifest.record, "made": manifest.made, "files": manifest.files,
        "tensors": manifest.tensors,
    }  # fmt: skip
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return b'{"sha256":"%s","content":%s}\n' % (_sha256(body).encode(), body)


def parse(raw: bytes, where: str, tensors: bool = True) -> Manifest:
    """Returns the manifest in the bytes `raw`.

    Raises CheckpointError that names the file and the key at fault.

    where: the file's name for messages.
    tensors: False to neither check nor return them, which saves most of the work.
    """
    head, body = _PREFIX.match(raw), raw.removesuffix(b"\n").removesuffix(b"}")
    if head is None:
        raise CheckpointError(f"{where}: damaged: it does not begin with its own digest")
    body = body[head.end() :]
    if _sha256(body).encode() != head[1]:
        raise CheckpointError(f"{where}: altered: its content does not match its own digest")
    try:
        content = _mapping("content", json.loads(body, parse_constant=_refuse_constant))
        found = content.get("format")
        if type(found) is int and found != FORMAT:
            problem = f"format {found} is not {FORMAT}: another version of Mikoshi wrote it; go on with that version"
        else:
            return _checked(content, tensors)
    except (ValueError, RecursionError) as error:
        problem = f"damaged: {error}"
    raise CheckpointError(f"{where}: {problem}")


def _checked(content: dict[str, Any], with_tensors: bool) -> Manifest:
    """Returns the checked manifest. Raises ValueError whose message begins with the key at fault."""
    _keys("content", content, {"format", "record", "made", "files", "tensors"})
    _count("format", content["format"])
    record, made = _mapping("record", content["record"]), _mapping("made", content["made"])
    _count("record.step", record.get("step"))
    if not isinstance(record.get("config", ""), str):
        raise ValueError("record.config: not a text")
    files, tensors = _mapping("files", content["files"]), _mapping("tensors", content["tensors"])
    unclaimed = {}
    for name, entry in files.items():
        key = f"files.{name!r}"
        checked_name("files", name)
        _keys(key, _mapping(key, entry), {"size", *DIGITS})
        unclaimed[name] = _count(f"{key}.size", entry["size"])
        for digest, digits in DIGITS.items():
            if not isinstance(entry[digest], str) or len(entry[digest]) != digits or not _HEX.fullmatch(entry[digest]):
                raise ValueError(f"{key}.{digest}: not {digits} hexadecimal digits")
    if not with_tensors:
        return Manifest(record, files, {}, made)
    for name, entry in tensors.items():
        _check_tensor(f"tensors.{name!r}", entry, unclaimed)
    return Manifest(record, files, tensors, made)


def _check_tensor(key: str, entry: Any, unclaimed: dict[str, int]) -> None:
    """Raises ValueError if a tensor's entry cannot be right.

    unclaimed: bytes of each file that no tensor has claimed yet; this tensor's are subtracted.
    """
    _keys(key, _mapping(key, entry), {"dtype", "shape", "pieces"})
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{key}.dtype: {str(entry['dtype'])[:40]!r} is not one of {', '.join(DTYPES)}")
    shape = _counts(f"{key}.shape", entry["shape"])
    if not isinstance(entry["pieces"], list):
        raise ValueError(f"{key}.pieces: not a list")
    itemsize = _SIZES[entry["dtype"]]
    boxes = []
    for number, piece in enumerate(entry["pieces"]):
        at = f"{key}.pieces[{number}]"
        _keys(at, _mapping(at, piece), {"offset", "shape", "file"})
        offset, size = _counts(f"{at}.offset", piece["offset"]), _counts(f"{at}.shape", piece["shape"])
        if len(offset) != len(shape) or len(size) != len(shape):
            raise ValueError(f"{at}: not of {len(shape)} dimensions")
        if any(o + n > whole for o, n, whole in zip(offset, size, shape, strict=True)):
            raise ValueError(f"{at}: shape {size} at {offset} reaches out of {shape}")
        if not isinstance(piece["file"], str) or piece["file"] not in unclaimed:
            raise ValueError(f"{at}.file: {str(piece['file'])[:80]!r} is not in files")
        unclaimed[piece["file"]] -= math.prod(size) * itemsize
        if unclaimed[piece["file"]] < 0:
            raise ValueError(f"{at}.file: {piece['file']} is too small for its pieces")
        if math.prod(size):
            boxes.append((offset, size))
    if sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        raise ValueError(f"{key}.pieces: do not make up the tensor: {shape}")
    if overlap(boxes):
        raise ValueError(f"{key}.pieces: overlap")


def overlap(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether any two boxes share an element.

    A sweep along the dimension with the most cuts compares only boxes that meet there, which for a grid of shards are few.

    boxes: (offset, shape) pairs, none of them empty.
    """
    if len(boxes) < 2:
        return False
    dims = len(boxes[0][0])
    if not dims:
        return True
    along = max(range(dims), key=lambda d: len({offset[d] for offset, _ in boxes}))
    met: list[tuple[Sequence[int], Sequence[int]]] = []
    for offset, size in sorted(boxes, key=lambda box: box[0][along]):
        met = [(o, n) for o, n in met if o[along] + n[along] > offset[along]]
        if any(all(o[d] < offset[d] + size[d] and offset[d] < o[d] + n[d] for d in range(dims)) for o, n in met):
            return True
        met.append((offset, size))
    return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: not a table")
    return value


def _keys(key: str, value: dict[str, Any], wanted: set[str]) -> None:
    if value.keys() != wanted:
        name = sorted(value.keys() ^ wanted)[0]
        raise ValueError(f"{key}: {name[:80]!r} is {'missing' if name in wanted else 'not known'}")


def _count(key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LIMIT:  # a bool is an int too
        raise ValueError(f"{key}: {str(value)[:40]} is not a count")
    return value


def _counts(key: str, value: Any) -> list[int]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError(f"{key}: not a list of at most 64 counts")
    for number in value:
        _count(key, number)
    return value
