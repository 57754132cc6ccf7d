"""What a file is, by its name: its format, how it is compressed, and whether it is data or stands beside data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from mikoshi.data.errors import DataError
from mikoshi.data.io.files import File

JSONL, JSON, PARQUET, ARROW, TEXT, WEBDATASET = "jsonl", "json", "parquet", "arrow", "text", "webdataset"
FORMATS = (JSONL, JSON, PARQUET, ARROW, TEXT, WEBDATASET)

_KINDS = {
    ".jsonl": JSONL, ".ndjson": JSONL, ".ldjson": JSONL, ".jsonlines": JSONL, ".jl": JSONL,
    ".json": JSON, ".parquet": PARQUET, ".pq": PARQUET, ".arrow": ARROW, ".feather": ARROW,
    ".tar": WEBDATASET, ".txt": TEXT, ".text": TEXT,
}  # fmt: skip
_ARCHIVES = {".zip", ".7z", ".rar", ".lz4", ".br", ".z", ".lzma", ".lz", ".sz", ".snappy", ".lzo", ".tlz"}
_TABLES = {".csv", ".tsv", ".xlsx", ".xls", ".orc", ".avro", ".msgpack", ".tfrecord"}
_ABOUT = {
    "readme", "license", "licence", "notice", "copying", "changelog", "citation", "authors", "contributing",
}  # fmt: skip
_MARKS = {"_success", "checksums", "md5sums", "sha1sums", "sha256sums"}
_MARK_SUFFIXES = {".md5", ".sha1", ".sha256", ".sha512", ".crc", ".lock"}
_DESCRIBED = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}

_NAMES = 5
ABOUT, UNKNOWN, HIDDEN = "about the data", "of no known kind", "hidden"


@dataclass(frozen=True)
class Chosen:
    """The files of a source that are read, and by reason the names of those that are not."""

    files: tuple[File, ...]
    left_out: dict[str, tuple[str, ...]]

    def report(self, wanted: str) -> dict[str, object]:
        """What a dataset remembers of it: files by format, and those left out by reason, the first by name."""
        return {
            "read": dict(sorted(Counter(format_of(file, wanted) for file in self.files).items())),
            "left_out": {reason: len(names) for reason, names in self.left_out.items()},
            "left_out_names": {reason: list(names[:_NAMES]) for reason, names in self.left_out.items()},
        }


def format_of(file: File, wanted: str) -> str:
    """`wanted`, or with "auto" what the file's suffix says: any that is not known is one document of text."""
    return _KINDS.get(file.suffix, TEXT) if wanted == "auto" else wanted


def choose(files: Sequence[File], hidden: Sequence[str], wanted: str) -> Chosen:
    """Which of the files found in a folder or by a pattern are data. Text of all kinds is, where that is all there is or is
    asked for, but for what tools write beside data; beside files of rows, what is about them is left out, and so is what is
    neither rows nor .txt.

    Raises DataError where .json stands beside other files, so that it may be rows or a text like them.
    """
    if wanted == TEXT or len(files) == 1:
        return Chosen(tuple(files), {HIDDEN: tuple(hidden)} if hidden else {})
    about = [file for file in files if _about(file)]
    rest = [file for file in files if not _about(file)]
    unknown = [file for file in rest if file.suffix not in _KINDS] if wanted == "auto" else []
    json = [file for file in rest if file.suffix == ".json" and not file.compression]
    rows = wanted != "auto" or any(format_of(file, wanted) != TEXT for file in rest if file not in json)
    if json and unknown and not rows:
        raise DataError(
            f"data.source: {json[0].name} and {unknown[0].name}: a .json file may be rows or a text among others: set "
            'data.format = "json" or "text", or name the files by a pattern'
        )
    if not (rows or json):
        about = [file for file in files if _mark(file)]
        unknown, rest = [], [file for file in files if not _mark(file)]
    gone = {file.name for file in unknown}
    names = {ABOUT: [file.name for file in about], UNKNOWN: [file.name for file in unknown], HIDDEN: hidden}
    left_out = {reason: tuple(found) for reason, found in names.items() if found}
    return Chosen(tuple(file for file in rest if file.name not in gone), left_out)


def _about(file: File) -> bool:
    """Whether a file is about others by its name, which files of rows may have as well."""
    kind = _KINDS.get(file.suffix, TEXT)
    rows = kind not in (TEXT, JSON) or (kind == JSON and bool(file.compression))
    return _mark(file) or (not rows and PurePosixPath(file.name.lower()).name.partition(".")[0] in _ABOUT)


def _mark(file: File) -> bool:
    """Whether a file is what a tool writes beside its data."""
    path = PurePosixPath(file.name.lower())
    return path.name in _DESCRIBED or path.suffix in _MARK_SUFFIXES or path.name.partition(".")[0] in _MARKS


def refuse_unread(files: Sequence[File], wanted: str) -> None:
    """Raises DataError for a file that would be read as what it is not."""
    for file in files:
        kind = format_of(file, wanted)
        if file.suffix in _ARCHIVES:
            way = "unpack it (.gz, .bz2, .xz, .zst and .tar of these are read as they are)"
            raise DataError(f"data.source: {file.name}: {file.suffix} files are not unpacked: {way}")
        if wanted == "auto" and file.suffix in _TABLES:
            way = 'convert it to JSONL or Parquet, or set data.format = "text" to take a file as one document'
            raise DataError(f"data.source: {file.name}: {file.suffix} files are not read as rows: {way}")
        if file.compression and kind in (PARQUET, ARROW):
            raise DataError(f"data.source: {file.name} cannot be read while it is compressed: unpack it")


def refuse_format(wanted: str) -> None:
    """Raises DataError for a format that there is not."""
    if wanted not in ("auto", *FORMATS):
        raise DataError(f"format = {wanted!r} is not one of auto, {', '.join(FORMATS)}")
