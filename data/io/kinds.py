"""What a file is, by its name: its format, its compression, and whether it is data or accompanies data."""

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
_DOCUMENTATION = {
    "readme", "license", "licence", "notice", "copying", "changelog", "citation", "authors", "contributing",
}  # fmt: skip
_SIDECARS = {"_success", "checksums", "md5sums", "sha1sums", "sha256sums"}
_SIDECAR_SUFFIXES = {".md5", ".sha1", ".sha256", ".sha512", ".crc", ".lock"}
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}

_NAMES = 5
DOCUMENTATION, UNKNOWN, HIDDEN = "about the data", "of no known kind", "hidden"


@dataclass(frozen=True)
class SelectedFiles:
    """The files of a source that are read, and the names of those that are not, by reason."""

    files: tuple[File, ...]
    left_out: dict[str, tuple[str, ...]]

    def report(self, requested: str) -> dict[str, object]:
        """What a dataset records of the selection: files by format, and the number and first names of those left out, by
        reason."""
        return {
            "read": dict(sorted(Counter(format_of(file, requested) for file in self.files).items())),
            "left_out": {reason: len(names) for reason, names in self.left_out.items()},
            "left_out_names": {reason: list(names[:_NAMES]) for reason, names in self.left_out.items()},
        }


def format_of(file: File, requested: str) -> str:
    """The `requested` format, or with "auto" the format of the file's suffix; unknown suffixes are text, one document a
    file."""
    return _KINDS.get(file.suffix, TEXT) if requested == "auto" else requested


def select_files(files: Sequence[File], hidden: Sequence[str], requested: str) -> SelectedFiles:
    """Which of the files found in a folder or by a pattern are data.

    If all files are text, or text is requested, all are data but those that tools write beside data. Beside files of rows,
    documentation and files that are neither rows nor .txt are left out.

    Raises DataError if a .json file stands beside other texts, where it may be rows or a text.
    """
    if requested == TEXT or len(files) == 1:
        return SelectedFiles(tuple(files), {HIDDEN: tuple(hidden)} if hidden else {})
    documentation = [file for file in files if _is_documentation(file)]
    rest = [file for file in files if not _is_documentation(file)]
    unknown = [file for file in rest if file.suffix not in _KINDS] if requested == "auto" else []
    json_files = [file for file in rest if file.suffix == ".json" and not file.compression]
    rows = requested != "auto" or any(format_of(file, requested) != TEXT for file in rest if file not in json_files)
    if json_files and unknown and not rows:
        raise DataError(
            f"data.source: {json_files[0].name} and {unknown[0].name}: a .json file may be rows or a text among others: set "
            'data.format = "json" or "text", or name the files by a pattern'
        )
    if not (rows or json_files):
        documentation = [file for file in files if _is_sidecar(file)]
        unknown, rest = [], [file for file in files if not _is_sidecar(file)]
    left_out_names = {file.name for file in unknown}
    names = {DOCUMENTATION: [file.name for file in documentation], UNKNOWN: [file.name for file in unknown], HIDDEN: hidden}
    left_out = {reason: tuple(found) for reason, found in names.items() if found}
    return SelectedFiles(tuple(file for file in rest if file.name not in left_out_names), left_out)


def _is_documentation(file: File) -> bool:
    """Whether a file documents others, by its name. Files of rows with such a name count as data."""
    kind = _KINDS.get(file.suffix, TEXT)
    rows = kind not in (TEXT, JSON) or (kind == JSON and bool(file.compression))
    return _is_sidecar(file) or (not rows and PurePosixPath(file.name.lower()).name.partition(".")[0] in _DOCUMENTATION)


def _is_sidecar(file: File) -> bool:
    """Whether tools write such a file beside their data."""
    path = PurePosixPath(file.name.lower())
    return path.name in _METADATA_FILES or path.suffix in _SIDECAR_SUFFIXES or path.name.partition(".")[0] in _SIDECARS


def check_readable(files: Sequence[File], requested: str) -> None:
    """Raises DataError for files that the requested format cannot read: archives, tables, compressed Parquet and Arrow."""
    for file in files:
        kind = format_of(file, requested)
        if file.suffix in _ARCHIVES:
            remedy = "unpack it (.gz, .bz2, .xz, .zst and .tar of these are read as they are)"
            raise DataError(f"data.source: {file.name}: {file.suffix} files are not unpacked: {remedy}")
        if requested == "auto" and file.suffix in _TABLES:
            remedy = 'convert it to JSONL or Parquet, or set data.format = "text" to take a file as one document'
            raise DataError(f"data.source: {file.name}: {file.suffix} files are not read as rows: {remedy}")
        if file.compression and kind in (PARQUET, ARROW):
            raise DataError(f"data.source: {file.name} cannot be read while it is compressed: unpack it")


def check_format(requested: str) -> None:
    """Raises DataError for an unknown format."""
    if requested not in ("auto", *FORMATS):
        raise DataError(f"format = {requested!r} is not one of auto, {', '.join(FORMATS)}")
