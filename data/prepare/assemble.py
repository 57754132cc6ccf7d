"""Finished pieces become one dataset: shards with running numbers, small ones joined, and the index over them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mikoshi.data.dataset.shards import (
    HELD_OUT,
    TOKENIZER,
    TRAIN,
    DatasetInfo,
    ShardInfo,
    dataset_fingerprint,
    open_shard,
    unigram_nats,
    write_index,
    write_shard,
)
from mikoshi.data.errors import DataError
from mikoshi.data.io.progress import Meter, ProgressCallback
from mikoshi.data.prepare.piece import SPLITS, Ids, PieceContext, Tally, read_counts
from mikoshi.data.prepare.pool import Report, run_jobs
from mikoshi.data.tokenizer.tokenizer import Tokenizer

_STANDS_ALONE = 16  # a shard of fewer than this part of shard_tokens is joined with its neighbours
_JOINERS = 4  # processes: the disk's pace, and each holds a whole shard in memory


class UnusableSource(DataError):
    """No dataset can be made of these pieces, since there are too few documents."""


@dataclass(frozen=True)
class JoinJob:
    """Shards to join into one, called `target`; its last `tail` tokens go to `tail_target` instead."""

    files: tuple[Path, ...]
    target: Path
    tail: int = 0
    tail_target: Path | None = None

    def __str__(self) -> str:
        return self.target.name


def dataset_report(total: Tally, source: str, files: dict[str, Any]) -> dict[str, Any]:
    """What dataset.json reports of the documents.

    `read` counts all that were seen: `documents` that are used, with `bytes` of text; `empty` ones; `skipped`, which could not
    be read, by kind in `problems` and the first by name in `skipped_names`; and `dropped`, by reason. `broken` describes files
    that break off, `files` those read and left out. `lengths` counts used documents by tokens, the separator included: key "64"
    is for 64 to 127 tokens.
    """
    lengths = {str(1 << power): count for power, count in enumerate(total.lengths) if count}
    return {
        "source": source,
        "read": total.documents + total.empty + total.invalid + sum(total.dropped.values()),
        "documents": total.documents,
        "bytes": total.bytes,
        "tokens": {split: sum(info.tokens for info in total.shards[split]) for split in SPLITS},
        "lengths": lengths,
        "empty": total.empty,
        "dropped": dict(sorted(total.dropped.items())),
        "skipped": total.invalid,
        "problems": dict(sorted(total.problems.items())),
        "skipped_names": total.names,
        "broken": total.broken,
        "files": files,
    }


def assemble(
    work: PieceContext,
    pieces: int,
    total: Tally,
    report: dict[str, Any],
    tokenizer: Tokenizer,
    recipe: str,
    workers: int,
    show: ProgressCallback,
    inherited_fds: tuple[int, ...] = (),
) -> DatasetInfo:
    """Make the folder `dataset` in the working folder from the shards of all pieces, and write its index.

    If no document is in the held-out split, it becomes the end of the last training shard. May be called again after an
    interruption. Raises UnusableSource if a split would be empty.
    """
    _refuse_nothing(total, report)
    folder = work.folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(work.folder / TOKENIZER, folder / TOKENIZER)
    splits, cut = _put_in_place(work, folder, total, workers, show, inherited_fds)
    counts = sum((read_counts(work, piece) for piece in range(pieces)), np.zeros((2, tokenizer.vocab), np.int64))
    if cut:
        moved = np.bincount(open_shard(folder / splits[HELD_OUT][0].file).tokens, minlength=tokenizer.vocab)
        counts += np.stack((-moved, moved))
        report = report | {"tokens": {split: sum(info.tokens for info in splits[split]) for split in SPLITS}}
    info = DatasetInfo(
        fingerprint=dataset_fingerprint(tokenizer.fingerprint, splits),
        recipe=recipe,
        tokenizer=tokenizer.fingerprint,
        vocab=tokenizer.vocab,
        separator=tokenizer.separator,
        splits=splits,
        unigram_nats=unigram_nats(counts[0], counts[1]),
        report=report,
        bos=tokenizer.bos,
        stops=tuple(sorted(tokenizer.stops)),
    )
    write_index(folder, info)
    return info


def _refuse_nothing(total: Tally, report: Mapping[str, Any]) -> None:
    dropped = "".join(f", {count} dropped by {reason}" for reason, count in report["dropped"].items())
    counts = f"{total.invalid} skipped, {total.empty} empty{dropped}"
    if not total.documents:
        why = total.names[0] if total.names else "all are dropped" if dropped else "it is empty"
        raise UnusableSource(f"data.source: no document of {report['source']!r} could be used ({counts}): {why}")
    if not total.shards[TRAIN]:
        raise UnusableSource(
            f"data.source: no document of {report['source']!r} fell in the {TRAIN} split ({report['read']} read, {counts}): "
            "give more text, or change data.held_out"
        )


def _put_in_place(
    work: PieceContext, folder: Path, total: Tally, workers: int, show: ProgressCallback, inherited_fds: tuple[int, ...]
) -> tuple[dict[str, list[ShardInfo]], bool]:
    """Link or write every shard under its final name. The second value tells whether the held-out split was cut from the
    training split."""
    groups = [(split, group) for split in SPLITS for group in _groups(total.shards[split], work.shard_tokens)]
    cut = not total.shards[HELD_OUT]
    numbers = dict.fromkeys(SPLITS, 0)
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    joins: list[JoinJob] = []
    for at, (split, group) in enumerate(groups):
        name = f"{split}-{numbers[split]:05d}.shard"
        numbers[split] += 1
        files = tuple(work.part(info.file) for info in group)
        if cut and at == len(groups) - 1:
            tokens = sum(info.tokens for info in total.shards[TRAIN])
            tail = min(math.ceil(tokens * work.held_out), sum(info.tokens for info in group) - 1)
            joins.append(JoinJob(files, folder / name, tail, folder / f"{HELD_OUT}-00000.shard"))
        elif len(group) > 1:
            joins.append(JoinJob(files, folder / name))
        else:
            _link(files[0], folder / name)
            splits[split].append(replace(group[0], file=name))
    meter = Meter("joining shards", [sum(path.stat().st_size for path in job.files) for job in joins], 0, show)
    with closing(run_jobs(join_shards, None, joins, min(workers, _JOINERS), meter.advance, inherited_fds)) as results:
        for number, infos in results:
            meter.finish(number)
            for info in infos:
                splits[info.file.rpartition("-")[0]].append(info)
    return {split: sorted(infos, key=lambda info: info.file) for split, infos in splits.items()}, cut


def _groups(infos: Iterable[ShardInfo], shard_tokens: int) -> list[list[ShardInfo]]:
    """Adjacent shards that become one each: large ones alone, small ones together up to `shard_tokens`."""
    groups: list[list[ShardInfo]] = []
    open_size = shard_tokens  # of the group that can still grow, the last
    for info in infos:
        alone = info.tokens >= shard_tokens // _STANDS_ALONE
        if alone or open_size >= shard_tokens:
            groups.append([])
            open_size = 0
        groups[-1].append(info)
        open_size += shard_tokens if alone else info.tokens
    return groups


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # a file system that knows no links
        shutil.copyfile(file, target)


def join_shards(_context: None, job: JoinJob, report: Report) -> list[ShardInfo]:
    """Write the joined shard, and that of the tail if there is one. A document cut in two continues in the other shard
    without a separator."""
    shards = [open_shard(path) for path in job.files]
    starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
    ends = np.concatenate([shard.ends.astype(np.int64) + start for shard, start in zip(shards, starts, strict=False)])
    ids = np.concatenate([shard.tokens for shard in shards])
    bits = [
        np.unpackbits(shard.learned, count=len(shard.tokens), bitorder="little").astype(bool)
        for shard in shards
        if shard.learned is not None
    ]
    learned = np.concatenate(bits) if bits else None
    cut = len(ids) - job.tail
    infos = [_write(job.target, ids, ends, learned, 0, cut)]
    if job.tail_target is not None:
        infos.append(_write(job.tail_target, ids, ends, learned, cut, len(ids)))
    report(sum(path.stat().st_size for path in job.files), 0)
    return infos


def _write(path: Path, ids: Ids, ends: Ids, learned: Ids | None, start: int, stop: int) -> ShardInfo:
    """Tokens `start` to `stop` as a shard. A document that an edge cuts counts as a document on both sides."""
    stops = [*ends[(ends > start) & (ends < stop)].tolist(), stop]
    stretches = list(zip([start, *stops], stops, strict=False))
    marks = None if learned is None else [learned[a:b] for a, b in stretches]
    return write_shard(path, [ids[a:b] for a, b in stretches], ids.dtype.itemsize, marks)
