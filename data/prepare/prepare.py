"""Sources to token shards on all cores: the same bytes whatever the number of workers and however often it was interrupted.

A dataset is built in a working folder beside it, `.NAME.partial`, one piece of the source at a time (piece.py). Finished pieces
are kept when the process ends early, and the same call continues with the rest. The dataset itself appears whole, by one
rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from mikoshi.data.dataset.shards import HELD_OUT, INDEX, TOKENIZER, TRAIN, DatasetInfo, read_index, verify_shard
from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.io.atomic import commit_folder, locked_folder, partial_path, write_file
from mikoshi.data.io.cores import cores
from mikoshi.data.io.progress import Meter, Progress, ProgressCallback, no_progress
from mikoshi.data.prepare.assemble import UnusableSource, assemble, dataset_report
from mikoshi.data.prepare.piece import (
    Job,
    PieceContext,
    Selection,
    Tally,
    check_invalid,
    hash_piece,
    is_held_out,
    load_finished,
    text_digest,
    tokenize_piece,
    usable_documents,
)
from mikoshi.data.prepare.pool import Report, run_jobs
from mikoshi.data.prepare.quality import Filters, find_duplicates
from mikoshi.data.prepare.workspace import Stopped, finished_pieces, open_workspace, stop_on_signals, write_errors_named
from mikoshi.data.sources.contents import SOURCES, Contents, contents_of, read_contents
from mikoshi.data.sources.sources import Source, SourceSpec, open_source, pieces
from mikoshi.data.tokenizer.special_tokens import AUTO
from mikoshi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["HELD_OUT", "TRAIN", "Filters", "Progress", "Recipe", "Stopped", "prepare", "prepare_all", "train_shared_tokenizer"]

_TRAINING_BYTES = 64 << 20
_TRAINING_PIECES = 64
_PIECES, _SMALL_PIECE, _LARGE_PIECE = 256, 4 << 20, 128 << 20
_TRAINED_ON = "tokenizer.from"
R = TypeVar("R")

_PATIENCE = 10.0  # seconds for the workers of a killed call to end


@dataclass(frozen=True)
class Recipe:
    """What a dataset is made from. Its digest identifies the dataset and covers all but `max_invalid`, `source.on_invalid` and
    `source.on_broken`.

    source: a str is short for SourceSpec(source=str).
    tokenizer: what load_tokenizer takes, or None to train one with `vocab` tokens on the text.
    separator, bos: names of the tokens that end and begin a document, as load_tokenizer takes them.
    held_out: share of the documents kept for evaluation, 0 < held_out < 0.5.
    shard_tokens: a shard is closed once it has this many.
    deduplicate: keep only the first of documents with the same text.
    max_invalid: how many unreadable documents may be left out before it fails; below 1 a share of all. None: any number.
    """

    source: SourceSpec | str
    tokenizer: Path | str | None = None
    vocab: int = 8192
    held_out: float = 0.01
    shard_tokens: int = 1 << 26
    filters: Filters = field(default_factory=Filters)
    deduplicate: bool = False
    max_invalid: float | None = None
    separator: str = ""
    bos: str = AUTO

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the recipe names. Raises DataError."""
        assert self.tokenizer is not None
        return load_tokenizer(self.tokenizer, separator=self.separator, bos=self.bos)

    @property
    def spec(self) -> SourceSpec:
        """The source as a SourceSpec."""
        return SourceSpec(self.source) if isinstance(self.source, str) else self.source


def prepare(
    recipe: Recipe,
    folder: Path,
    show: ProgressCallback = no_progress,
    *,
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
    seen: Contents | None = None,
) -> tuple[DatasetInfo, bool]:
    """Make the dataset at `folder`. If it exists and is from the same recipe and files, verify it instead; the second value is
    then False.

    tokenizer: used instead of the recipe's.
    workers: number of processes, by default one a core.
    seen: the contents of the source's files, if the caller has just read them.

    Raises DataError for input that cannot be used, a folder with another dataset, or a full disk; Stopped on SIGINT and
    SIGTERM, when called from the main thread. `folder` never holds a partial dataset, and nothing is left beside it unless a
    piece was finished.
    """
    source = open_source(recipe.spec)
    if tokenizer is None and recipe.tokenizer is not None:
        tokenizer = recipe.load_tokenizer()
    plain = _identity(recipe, source, tokenizer)
    recipe_digest = _digest(plain)
    if folder.exists():
        made = read_index(folder).recipe if (folder / INDEX).exists() else ""
        if earlier := _legacy_rules(recipe, made, source, tokenizer, plain):
            recipe_digest = made
        info = _verified(recipe, source, folder, recipe_digest, show, workers or cores())
        return replace(info, report=info.report | {"earlier": earlier}) if earlier else info, False
    with stop_on_signals(), write_errors_named(folder), locked_folder(folder, _PATIENCE) as (built, lock):
        if folder.exists():  # another call has just finished it
            shutil.rmtree(built, ignore_errors=True)
            return _verified(recipe, source, folder, recipe_digest, show, workers or cores()), False
        try:
            contents = contents_of(source.files, seen or read_contents(built / SOURCES), show=show)
            open_workspace(built, plain | {"contents": contents.digest}, show)
            write_file(built / SOURCES, contents.to_json())
            info = _build(_BuildContext(recipe, source, built, show, workers or cores(), lock), recipe_digest, tokenizer)
            _check_unchanged(source, contents)
            # Without the looks, which the first re-check finds: the dataset is the same whenever and wherever it is made.
            write_file(built / "dataset" / SOURCES, Contents(contents.digests).to_json())
            commit_folder(folder, built / "dataset")
        except BaseException as error:
            if isinstance(error, UnusableSource) or not finished_pieces(built):
                shutil.rmtree(built, ignore_errors=True)
            raise
        shutil.rmtree(built, ignore_errors=True)
    return info, True


def _check_unchanged(source: Source, contents: Contents) -> None:
    """Raises UnusableSource if a file has changed since the work began."""
    # What the Hub holds at one commit does not change.
    now = source if source.spec.source.startswith("hub:") else open_source(source.spec)
    name = next((a[0] for a, b in zip_longest(source.describe(), now.describe(), fillvalue=("a file",)) if a != b), "")
    if name := name or contents_of(now.files, contents).first_difference(contents):
        raise UnusableSource(f"data.source: {name.partition('#')[0]} changed while it was read: begin anew")


def _identity(recipe: Recipe, source: Source, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that the dataset's bytes depend on, as plain values."""
    spec = recipe.spec.identity()
    made: dict[str, Any] = {"vocab": recipe.vocab} if tokenizer is None else {"tokenizer": tokenizer.fingerprint}
    if tokenizer is None and (recipe.separator or recipe.bos != AUTO):
        made["marks"] = [recipe.separator, recipe.bos]
    kept = {"held_out": recipe.held_out, "shard_tokens": recipe.shard_tokens, "deduplicate": recipe.deduplicate}
    files = [list(file) for file in source.describe()]
    return {"version": 1, **spec, **made, **kept, **asdict(recipe.filters), "files": files}


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _legacy_rules(
    recipe: Recipe, made: str, source: Source, tokenizer: Tokenizer | None, plain: dict[str, Any]
) -> tuple[str, ...]:
    """The rules of earlier versions by which the dataset `made` was made, if it is otherwise from this recipe; () if there are
    none.

    "marks": the tokenizer's files did not decide how documents begin and end. "chat": the ends of some turns were not learned.
    Such a dataset stays valid as long as the user does not request anything else by name.
    """
    marks, chat = dict[str, Any](), dict[str, Any]()
    if tokenizer is not None and not recipe.separator and recipe.bos == AUTO:
        marks["tokenizer"] = tokenizer.digest
    if source.chat is not None and not source.chat.date:
        chat["files"] = [list(file) for file in source.describe(legacy=True)]
    ways: dict[tuple[str, ...], dict[str, Any]] = {("marks",): marks, ("chat",): chat, ("marks", "chat"): marks | chat}
    if made == _digest(plain):
        return ()
    return next((rules for rules, other in ways.items() if made == _digest(plain | other)), ())


def _verified(
    recipe: Recipe, source: Source, folder: Path, recipe_digest: str, show: ProgressCallback, threads: int
) -> DatasetInfo:
    """The existing dataset, after reading all of its bytes again."""
    if not (folder / INDEX).exists():
        raise DataError(f"data.path: {folder} exists and is not a prepared dataset: give another path")
    info = read_index(folder)
    if info.recipe != recipe_digest:
        raise DataError(f"data.path: {folder} holds data made from another source or settings: remove it or give another path")
    if (before := read_contents(folder / SOURCES)) is None:
        info = replace(info, report=info.report | {"contents": "unknown"})
    else:
        _check_contents(source, before, folder, show)
    _check_report(recipe, info.report)
    shards = [shard for shards in info.splits.values() for shard in shards]
    progress = Progress("verifying", sum(shard.bytes for shard in shards))
    with ThreadPoolExecutor(threads) as pool:
        for shard, _ in zip(shards, pool.map(lambda shard: verify_shard(folder / shard.file, shard), shards), strict=True):
            progress.done_bytes += shard.bytes
            show(progress)
    return info


def _check_contents(source: Source, before: Contents, folder: Path, show: ProgressCallback) -> None:
    """Raises DataError if the dataset at `folder` was made from files with other contents."""
    now = contents_of(source.files, before, before.sampled, show)
    if name := now.first_difference(before):
        raise DataError(
            f"data.path: {folder} holds data made from another source: {name} has changed since: remove it or give another path"
        )
    if now != before:
        with suppress(OSError):  # where it cannot be written the files are read again the next time
            write_file(folder / SOURCES, now.to_json())


def _check_report(recipe: Recipe, report: Mapping[str, Any]) -> None:
    """Raises DataError if more documents were unreadable than the recipe allows."""
    skipped, read = report["skipped"], report["read"]
    broken = report["problems"].get("unreadable file", 0) if "broken" in report else 0
    if skipped > broken and recipe.spec.on_invalid == "error":
        raise DataError(
            f'data.on_invalid = "error": {skipped} documents were left out as unreadable when the data was prepared, the '
            f'first: {report["skipped_names"][0]}; set it to "skip", or prepare the data anew elsewhere'
        )
    if report.get("broken") and recipe.spec.on_broken == "error":
        raise DataError(
            f'data.on_broken = "error": files broke off when the data was prepared, the first: {report["broken"][0]}; set it '
            'to "skip", or prepare the data anew elsewhere'
        )
    most = recipe.max_invalid
    if most is not None and skipped > (most if most >= 1 or most == 0 else most * read):
        kinds = ", ".join(f"{count} {kind!r}" for kind, count in report["problems"].items())
        raise DataError(
            f"data.max_invalid = {most}: {skipped} of {read} documents cannot be used ({kinds}), the first: "
            + "; ".join(report["skipped_names"][:3])
        )


@dataclass(frozen=True)
class _BuildContext:
    recipe: Recipe
    source: Source
    folder: Path
    show: ProgressCallback
    workers: int
    lock: int


def _build(build: _BuildContext, recipe_digest: str, tokenizer_given: Tokenizer | None) -> DatasetInfo:
    """Do the remaining work in the working folder, up to its subfolder `dataset`."""
    recipe, source = build.recipe, build.source
    path = build.folder / TOKENIZER
    if not path.exists():
        tokenizer_given = tokenizer_given or train_shared_tokenizer({"": recipe}, build.show)
        _save(tokenizer_given, path)
    tokenizer = tokenizer_given or load_tokenizer(path, separator=recipe.separator, bos=recipe.bos)
    selection = _selection(recipe, source, tokenizer.special_tokens if source.chat is not None else frozenset())
    settings = (recipe.held_out, recipe.shard_tokens, recipe.deduplicate)
    work = PieceContext(build.folder, selection, tokenizer.fingerprint, *settings, tokenizer.boundaries)
    jobs = _jobs(source)
    if recipe.deduplicate:
        hashes = [work.hashes(job.piece.number) for job in jobs]
        left = [job for job, file in zip(jobs, hashes, strict=True) if not file.exists()]
        _run_pieces(build, "looking for doubles", hash_piece, work, jobs, left, lambda _number, _count: None)
        progress = Progress("comparing documents", source.bytes)

        def compared(part: int, parts: int) -> None:
            progress.done_bytes = source.bytes * part // parts
            build.show(progress)

        find_duplicates(hashes, build.folder / "doubles", compared)
    with ThreadPoolExecutor(build.workers) as pool:
        finished_tallies = pool.map(lambda job: load_finished(work, job.piece.number), jobs)
        tallies = {job.piece.number: tally for job, tally in zip(jobs, finished_tallies, strict=True) if tally is not None}

    def keep(number: int, tally: Tally) -> None:
        tallies[number] = tally
        if 0 <= selection.most_invalid < sum(tally.invalid for tally in tallies.values()):
            check_invalid(selection.most_invalid, _sum(tallies))

    left = [job for job in jobs if job.piece.number not in tallies]
    _run_pieces(build, "tokenizing", tokenize_piece, work, jobs, left, keep)
    total = _sum(tallies)
    report = dataset_report(total, recipe.spec.source, source.report)
    _check_report(recipe, report)
    return assemble(work, len(jobs), total, report, tokenizer, recipe_digest, build.workers, build.show, (build.lock,))


def _save(tokenizer: Tokenizer, path: Path) -> None:
    write_file(path, tokenizer.backend.to_str().encode())


def _selection(recipe: Recipe, source: Source, specials: frozenset[str] = frozenset()) -> Selection:
    most = recipe.max_invalid
    return Selection(source, recipe.filters, specials, -1 if most is None or 0 < most < 1 else int(most))


def _jobs(source: Source) -> list[Job]:
    """The source in pieces: enough for many cores, large enough to be efficient, and a function of the source's size."""
    target = min(max(source.bytes // _PIECES, _SMALL_PIECE), _LARGE_PIECE)
    jobs = []
    for piece in pieces(source, target):
        first, last = (source.files[piece.spans[at].file].name for at in (0, -1))
        jobs.append(Job(piece, f"piece {piece.number} of the source ({first if first == last else f'{first} to {last}'})"))
    return jobs


def _sum(tallies: Mapping[int, Tally]) -> Tally:
    total = Tally()
    for number in sorted(tallies):
        total.add(tallies[number])
    return total


def _run_pieces(
    build: _BuildContext, phase: str, task: Callable[[PieceContext, Job, Report], R], work: PieceContext,
    jobs: list[Job], left: list[Job], keep: Callable[[int, R], None],
) -> None:  # fmt: skip
    """Run the remaining jobs, and pass each result to `keep` with the number of its piece."""
    sizes = [job.piece.bytes for job in left]
    meter = Meter(phase, sizes, sum(job.piece.bytes for job in jobs) - sum(sizes), build.show)
    with closing(run_jobs(task, work, left, build.workers, meter.advance, (build.lock,))) as results:
        for number, result in results:
            meter.finish(number)
            keep(left[number].piece.number, result)


def train_shared_tokenizer(recipes: Mapping[str, Recipe], show: ProgressCallback = no_progress) -> Tokenizer:
    """Train a tokenizer on the training splits of all recipes' sources: equal bytes of each, 64 MiB in all, from up to 64
    places across a source.

    It has the vocabulary size that the recipes name and the special tokens of their chat templates. Raises DataError if the
    recipes disagree.
    """
    vocabs = {recipe.vocab for recipe in recipes.values()}
    if len(vocabs) != 1:
        raise DataError(f"data.tokenizer_vocab: one tokenizer is trained for all sources, and they ask for {sorted(vocabs)}")
    sources = [(recipe, open_source(recipe.spec)) for recipe in recipes.values()]
    specials = sorted({special for _, source in sources if source.chat is not None for special in source.chat.specials})
    marks = {(recipe.separator, recipe.bos) for recipe in recipes.values()}
    if len(marks) != 1:
        raise DataError(f"data.separator, data.bos: one tokenizer serves all sources, and they name {sorted(marks)}")
    separator, bos = marks.pop()
    return train_tokenizer(_training_texts(sources, show), vocabs.pop(), specials, separator=separator, bos=bos)


def _training_texts(sources: list[tuple[Recipe, Source]], show: ProgressCallback) -> Iterator[str]:
    share = _TRAINING_BYTES // len(sources)
    progress = Progress("training the tokenizer", sum(min(source.bytes, share) for _, source in sources))
    for recipe, source in sources:
        jobs = _jobs(source)
        places = sorted({number * len(jobs) // _TRAINING_PIECES for number in range(_TRAINING_PIECES)})
        for place in places:
            left = share // len(places)
            for document in usable_documents(_selection(recipe, source), jobs[place].piece, Tally()):
                assert document.text is not None
                if left <= 0:
                    break
                if is_held_out(text_digest(document.split_key), recipe.held_out):
                    continue
                size = len(document.text.encode())
                left -= size
                progress.done_bytes += size
                show(progress)
                yield document.text


def prepare_all(
    recipes: Mapping[str, Recipe], folder: Path, show: ProgressCallback = no_progress, *, workers: int | None = None
) -> dict[str, tuple[DatasetInfo, bool]]:
    """Prepare each recipe at folder/NAME with one tokenizer: the one they name, or one trained on all of them, which is kept
    in `folder`. Returns and raises for each what `prepare` does."""
    for name in recipes:
        if not name or name.startswith(".") or Path(name).name != name:
            raise DataError(f"data.sources: {name!r} cannot be a folder's name: use letters, digits, - and _")
    tokenizers = {recipe.tokenizer and str(recipe.tokenizer) for recipe in recipes.values()}
    if len(tokenizers) != 1:
        raise DataError(f"data.tokenizer: one tokenizer serves all sources, and they name {sorted(map(str, tokenizers))}")
    first = next(iter(recipes.values()))
    try:
        named = first.tokenizer is not None
        seen = {} if named else {name: _read_source_contents(recipe, folder / name, show) for name, recipe in recipes.items()}
        tokenizer = first.load_tokenizer() if named else _common_tokenizer(recipes, seen, folder, show)
    except OSError as error:
        raise storage_error(error, f"data.path: cannot write {folder}: {error.strerror or error}") from error
    return {
        name: prepare(recipe, folder / name, show, tokenizer=tokenizer, workers=workers, seen=seen.get(name))
        for name, recipe in recipes.items()
    }


def _read_source_contents(recipe: Recipe, folder: Path, show: ProgressCallback) -> Contents:
    known = read_contents(folder / SOURCES) or read_contents(partial_path(folder) / SOURCES)
    return contents_of(open_source(recipe.spec).files, known, show=show)


def _common_tokenizer(
    recipes: Mapping[str, Recipe], seen: Mapping[str, Contents], folder: Path, show: ProgressCallback
) -> Tokenizer:
    """The tokenizer trained on all recipes; the one in `folder` if it was trained on the same data before. `seen`: contents
    of their files."""
    plain = {name: _identity(recipe, open_source(recipe.spec), None) for name, recipe in recipes.items()}
    path, note = folder / TOKENIZER, folder / _TRAINED_ON
    recipes_digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    contents_digest = hashlib.sha256(
        json.dumps({name: one.digest for name, one in seen.items()}, sort_keys=True).encode()
    ).hexdigest()
    if path.exists() and note.exists():
        first = next(iter(recipes.values()))
        tokenizer = load_tokenizer(path, separator=first.separator, bos=first.bos)
        fields = note.read_text().split()
        if fields[:2] == [recipes_digest, tokenizer.fingerprint] and fields[2:] in (
            [],
            [contents_digest],
        ):  # earlier versions knew no contents
            return tokenizer
    with stop_on_signals():
        tokenizer = train_shared_tokenizer(recipes, show)
    folder.mkdir(parents=True, exist_ok=True)
    _save(tokenizer, path)
    write_file(note, f"{recipes_digest} {tokenizer.fingerprint} {contents_digest}\n".encode())
    return tokenizer
