"""manifest.json: what a checkpoint holds and where, believed only where every part of it can be.

A file that was parsed names only files it lists, by plain names, and its pieces make up each tensor exactly. One line:
`{"sha256":"<of what follows content, as it stands>","content":{...}}`.
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

from mikoshi.trainer.checkpoint.storage.base import MANIFEST, checked
from mikoshi.trainer.checkpoint.storage.digests import DIGITS, Digests
from mikoshi.trainer.errors import CheckpointError

FORMAT = 2
# What may be in a checkpoint: torch's name of an element -> the safetensors format's.
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
    size: int


class PieceEntry(TypedDict):
    offset: list[int]
    shape: list[int]
    file: str


class TensorEntry(TypedDict):
    dtype: str
    shape: list[int]
    pieces: list[PieceEntry]


@dataclass(frozen=True)
class Manifest:
    """`record` is what the run wants to find again, plain JSON: step, config, how the data goes on. `made`: when, by which
    versions, and the SHA-256 of the record's parts, to compare checkpoints by.

    files: name -> size and digests. tensors: canonical name -> dtype, shape and pieces (offset, shape, file).
    """

    record: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.record["step"])


def file_of(where: object) -> str:
    """The manifest's own name in messages, of the checkpoint called `where`."""
    return f"{where}/{MANIFEST}"


def provenance(record: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The `made` of a manifest that is written now."""
    import torch  # here alone: reading a manifest does without, in a tenth of the time

    try:
        ours = version("mikoshi")
    except PackageNotFoundError:
        ours = "unknown"
    versions = {"mikoshi": ours, "torch": str(torch.__version__), "python": platform.python_version()}
    digests = {key: _sha256(json.dumps(record[key], sort_keys=True).encode()) for key in ("config", "data") if key in record}
    return {"time": int(time.time()), "ranks": ranks, "versions": versions, "sha256": digests}


def encode(manifest: Manifest) -> bytes:
    content = {
        "format": FORMAT, "record": manifest.record, "made": manifest.made, "files": manifest.files,
        "tensors": manifest.tensors,
    }  # fmt: skip
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return b'{"sha256":"%s","content":%s}\n' % (_sha256(body).encode(), body)


def parse(raw: bytes, where: str, tensors: bool = True) -> Manifest:
    """`where` is the file's name for messages. Without `tensors` those are neither checked nor returned, which is most of the
    work. Raises CheckpointError that names the file and the key at fault."""
    head, body = _PREFIX.match(raw), raw.removesuffix(b"\n").removesuffix(b"}")
    if head is None:
        raise CheckpointError(f"{where}: damaged: it does not begin with its own digest")
    body = body[head.end() :]
    if _sha256(body).encode() != head[1]:
        raise CheckpointError(f"{where}: altered: its content does not match its own digest")
    try:
        content = _mapping("content", json.loads(body, parse_constant=_no_number))
        found = content.get("format")
        if type(found) is int and found != FORMAT:
            told = f"format {found} is not {FORMAT}: another version of Mikoshi wrote it; go on with that version"
        else:
            return _checked(content, tensors)
    except (ValueError, RecursionError) as error:
        told = f"damaged: {error}"
    raise CheckpointError(f"{where}: {told}")


def _checked(content: dict[str, Any], with_tensors: bool) -> Manifest:
    """Raises ValueError whose message begins with the key that is not as it must be."""
    _keys("content", content, {"format", "record", "made", "files", "tensors"})
    _count("format", content["format"])
    record, made = _mapping("record", content["record"]), _mapping("made", content["made"])
    _count("record.step", record.get("step"))
    if not isinstance(record.get("config", ""), str):
        raise ValueError("record.config: not a text")
    files, tensors = _mapping("files", content["files"]), _mapping("tensors", content["tensors"])
    room = {}
    for name, entry in files.items():
        key = f"files.{name!r}"
        checked("files", name)
        _keys(key, _mapping(key, entry), {"size", *DIGITS})
        room[name] = _count(f"{key}.size", entry["size"])
        for digest, digits in DIGITS.items():
            if not isinstance(entry[digest], str) or len(entry[digest]) != digits or not _HEX.fullmatch(entry[digest]):
                raise ValueError(f"{key}.{digest}: not {digits} hexadecimal digits")
    if not with_tensors:
        return Manifest(record, files, {}, made)
    for name, entry in tensors.items():
        _check_tensor(f"tensors.{name!r}", entry, room)
    return Manifest(record, files, tensors, made)


def _check_tensor(key: str, entry: Any, room: dict[str, int]) -> None:
    """`room`: the bytes of each file that no tensor before has taken; this one's are taken off."""
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
        if not isinstance(piece["file"], str) or piece["file"] not in room:
            raise ValueError(f"{at}.file: {str(piece['file'])[:80]!r} is not in files")
        room[piece["file"]] -= math.prod(size) * itemsize
        if room[piece["file"]] < 0:
            raise ValueError(f"{at}.file: {piece['file']} is too small for its pieces")
        if math.prod(size):
            boxes.append((offset, size))
    if sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        raise ValueError(f"{key}.pieces: do not make up the tensor: {shape}")
    if overlap(boxes):
        raise ValueError(f"{key}.pieces: overlap")


def overlap(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether any two boxes (offset, shape; none empty) share an element. A sweep along the dimension with the most
    cuts compares only boxes that are met there at once, which for a grid of shards is a few."""
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


def _no_number(name: str) -> NoReturn:
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
