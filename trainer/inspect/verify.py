"""Verifies every digest of a run's prepared data and names every damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mikoshi.data.dataset.dataset import is_megatron, is_remote, open_dataset
from mikoshi.data.dataset.packing import plan_name, read_plan, verify_plan
from mikoshi.data.dataset.shards import HELD_OUT, TOKENIZER, TRAIN, DatasetInfo, ShardInfo, read_index, verify_shard
from mikoshi.data.errors import DataError, StorageError, storage_error
from mikoshi.data.io.cores import cores
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.io.progress import Progress, ProgressCallback, no_progress
from mikoshi.data.tokenizer.tokenizer import parse_tokenizer
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.feed.feed import cache_limits, dataset_locations

Mapped = Callable[[str, int, str], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class FileCheck:
    """One file (a Megatron corpus is two). `run` reads all of it and raises DataError if its digest differs."""

    name: str
    bytes: int
    run: Callable[[], None]


@dataclass(frozen=True)
class DatasetCheck:
    """Result for one dataset: `files` were read, of `bytes` in all; `damaged` has a message for each damaged one."""

    source: str
    place: str
    files: int
    bytes: int
    damaged: tuple[str, ...]


def verify_datasets(config: RunConfig, show: ProgressCallback = no_progress) -> Iterator[DatasetCheck]:
    """Check the datasets of a run's config, one after another."""
    limits = cache_limits(config)
    for source, place in dataset_locations(config.data).items():
        yield _verdict(config, source, place, limits, show)


def _verdict(config: RunConfig, source: str, place: str, limits: CacheLimits, show: ProgressCallback) -> DatasetCheck:
    try:
        checks = _checks(config, place, limits)
    except DataError as error:  # without its index nothing else of it can be judged
        return DatasetCheck(source, place, 0, 0, (str(error),))
    progress = Progress(f"verifying {source or place}", sum(check.bytes for check in checks))
    damaged = []
    with ThreadPoolExecutor(cores()) as pool:
        for check, problem in zip(checks, pool.map(_problem, checks), strict=True):
            progress.done_bytes += check.bytes
            show(progress)
            if problem is not None:
                plain = problem.removeprefix(f"{Path(check.name).name}: ")
                damaged.append(problem if check.name in problem else f"{check.name}: {plain}")
    return DatasetCheck(source, place, len(checks), progress.done_bytes, tuple(dict.fromkeys(damaged)))


def _problem(check: FileCheck) -> str | None:
    try:
        check.run()
    except (DataError, StorageError) as error:
        return str(error)
    except OSError as error:
        return str(storage_error(error, f"{check.name}: cannot be read: {error.strerror or error}", "prepare the data again"))
    return None


def _checks(config: RunConfig, place: str, limits: CacheLimits) -> list[FileCheck]:
    if not is_remote(place) and not is_megatron(place):
        return _near(Path(place))
    dataset = open_dataset(place, limits, config.data.tokenizer, config.data.held_out, (config.data.separator, config.data.bos))
    if is_megatron(place):
        whole = dataset.shards(TRAIN)[0]  # both splits are parts of one file
        return [FileCheck(place, whole.bytes, lambda: dataset.verify(whole))]
    base = place.rstrip("/")
    checks = [_shard_check(f"{base}/{s.file}", s, dataset.verify) for shards in dataset.info.splits.values() for s in shards]
    content = dataset.read(TOKENIZER)
    checks.append(_tokenizer_check(f"{base}/{TOKENIZER}", dataset.info, len(content), lambda: content))
    if config.data.packing == "fit":
        for split in (TRAIN, HELD_OUT):
            name = f"{plan_name(split, config.train.context)}.json"
            checks += _plan_checks(base, name, dataset.read(name), dataset.info, dataset.mapped)
    return checks


def _near(folder: Path) -> list[FileCheck]:
    """Checks of a folder that may have any of its files missing or cut short."""
    info = read_index(folder)
    shards = [shard for shards in info.splits.values() for shard in shards]
    checks = [_shard_check(f"{folder / s.file}", s, lambda shard: verify_shard(folder / shard.file, shard)) for s in shards]
    checks.append(_tokenizer_check(f"{folder / TOKENIZER}", info, 0, (folder / TOKENIZER).read_bytes))

    def mapped(name: str, size: int, _digest: str) -> npt.NDArray[np.uint8]:
        path = folder / name
        try:
            found = path.stat().st_size
        except OSError as error:
            way = "remove the plan's .json, and prepare again"
            raise storage_error(error, f"{path}: cannot be read: {error.strerror}", way) from None
        if found != size:
            raise DataError(f"{path}: has {found} bytes, {size} are listed; remove the plan's .json, and prepare again")
        return np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)

    for path in sorted(folder.glob("fit-*-*.json")):
        checks += _plan_checks(str(folder), path.name, path.read_bytes(), info, mapped)
    return checks


def _shard_check(name: str, shard: ShardInfo, verify_one: Callable[[ShardInfo], None]) -> FileCheck:
    return FileCheck(name, shard.bytes, lambda: verify_one(shard))


def _tokenizer_check(name: str, info: DatasetInfo, size: int, read: Callable[[], bytes]) -> FileCheck:
    def run() -> None:
        if parse_tokenizer(read(), name, info.boundaries).fingerprint != info.tokenizer:
            raise DataError(f"{name}: not the tokenizer that made the data; prepare the data again")

    return FileCheck(name, size, run)


def _plan_checks(base: str, name: str, content: bytes, info: DatasetInfo, mapped: Mapped) -> list[FileCheck]:
    """A check for each file that a plan of rows lists, and one that the plan as a whole is of this data."""

    def belongs() -> None:
        _, context, split = name.removesuffix(".json").split("-", 2)
        read_plan(content, f"{base}/{name}", info, split, int(context), mapped)

    whole = FileCheck(f"{base}/{name}", 0, belongs)
    try:
        files = {str(kind): (int(file["bytes"]), dict(file)) for kind, file in json.loads(content)["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return [whole]  # which says that it is damaged

    def one(kind: str, size: int, file: dict[str, object]) -> FileCheck:
        listed = json.dumps({"files": {kind: file}}).encode()
        stem = name.removesuffix(".json")
        return FileCheck(f"{base}/{stem}.{kind}", size, lambda: verify_plan(listed, f"{base}/{name}", mapped))

    return [one(kind, size, file) for kind, (size, file) in files.items()] + [whole]
