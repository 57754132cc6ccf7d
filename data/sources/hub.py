"""A dataset of the Hugging Face Hub becomes a list of files at one commit. None of its code is run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.io.files import File, list_files, source_errors_named
from mikoshi.data.io.kinds import JSONL, TEXT, format_of

_NAME = re.compile(r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@\s]+))?(:((?P<config>[^:/\s]+)/)?(?P<split>[^:/\s]+))?")
_FORMATS = {"json": "json", "parquet": "parquet", "arrow": "arrow", "text": "text", "webdataset": "webdataset"}
_ANYWHERE = "download its files elsewhere and give their folder as source"


def hub_files(source: str) -> tuple[tuple[File, ...], str]:
    """The files of "hub:org/name@revision:split", each with the commit as its etag, and their format ("auto": by suffix).

    The revision defaults to main and the split to "train"; "config/split" selects a configuration. Raises DataError, also for a
    dataset that needs its own code, and StorageError if the Hub does not answer.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise DataError(f"data.source: {source!r} is not a Hub name: write hub:org/name@revision, then :split or :config/split")
    try:
        import datasets  # noqa: F401
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"data.source: {source!r} needs the package {error.name}: pip install datasets") from None
    name = match["name"]
    try:
        # Asked first and once: `datasets` asks for a quarter of a minute before it says that it is offline.
        commit = huggingface_hub.HfApi().dataset_info(name, revision=match["revision"], timeout=20).sha
    except huggingface_hub.errors.RevisionNotFoundError:
        raise DataError(f"data.source: {source!r}: the Hub has no revision {match['revision']!r} of {name}") from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        why = f"the Hub has no dataset {name}, or shows it only to others: log in with `hf auth login`"
        raise DataError(f"data.source: {source!r}: {why}") from None
    except Exception as error:  # of whatever HTTP client it uses: they have no base in common
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise storage_error(error, f"data.source: {source!r}: the Hub cannot be reached ({why}); {_ANYWHERE}") from None
    return resolve_files(name, commit, match["config"], match["split"] or "train", source)


def resolve_files(path: str, commit: str | None, config: str | None, split: str, source: str) -> tuple[tuple[File, ...], str]:
    """The files of one split, and their format, as `datasets` finds them: by the dataset card or the names of files.

    path: name of a Hub dataset, or a local folder.
    """
    import datasets

    try:
        builder: Any = datasets.load_dataset_builder(path, name=config, revision=commit)
    except (ValueError, RuntimeError, OSError) as error:
        if "script" in str(error):
            raise DataError(f"data.source: {source!r} needs code of its own, which is not run; {_ANYWHERE}") from None
        line = f"data.source: {source!r}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        raise (storage_error(error, line) if isinstance(error, OSError) else DataError(line)) from None
    module = type(builder).__module__.rpartition(".")[2]
    if module not in _FORMATS:
        raise DataError(f"data.source: {source!r} holds {module} files; readable are {', '.join(_FORMATS)}; {_ANYWHERE}")
    splits: Any = builder.config.data_files or {}
    if split not in splits:
        raise DataError(f"data.source: {source!r} has no split {split!r}; it has {', '.join(map(str, splits)) or 'none'}")
    files = []
    with source_errors_named(source):
        inside = f"hf://datasets/{path}@{commit}/" if commit else f"{Path(path).resolve()}/"
        for url in splits[split]:
            if not (str(url) if commit else str(Path(url).resolve())).startswith(inside):
                raise DataError(f"data.source: {source!r} names a file that is not its own ({url}): it is not read")
            (file,) = list_files(str(url))
            name = str(url).partition(f"@{commit}/")[2] if commit else file.name
            files.append(replace(file, name=name or file.name, etag=commit or file.etag))
    # `datasets` judges a repository by its first configuration; what the suffixes say of this one's files comes first.
    if all(format_of(file, "auto") == JSONL for file in files):
        return tuple(files), JSONL
    clear = all(format_of(file, "auto") != TEXT for file in files)
    return tuple(files), "auto" if clear else _FORMATS[module]
