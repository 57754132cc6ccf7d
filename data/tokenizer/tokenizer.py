"""Text to token ids and back, and the fingerprint that ties a dataset to its tokenizer.

The only stored format is tokenizer.json, and ids are those of Hugging Face `tokenizers`, whichever backend computes them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.tokenizer import merge_ranks
from mikoshi.data.tokenizer.fast_path import WINDOW, BytesBackend, Ids, TiktokenBackend, fast_path, seams_known, windows
from mikoshi.data.tokenizer.merge_ranks import SEPARATOR
from mikoshi.data.tokenizer.special_tokens import (
    AUTO,
    NONE,
    BoundaryTokens,
    TokenizerFiles,
    boundary_files,
    find_boundaries,
    legacy_boundaries,
    legacy_separator,
    read_tokenizer_files,
)

_COARSE = 1 << 22  # characters that a tokenizer with other seams than the known ones gets at once: some 100 bytes each
_RUN = 1 << 16  # characters that a thread takes at a time


class PartLike(Protocol):
    """A part of a document: see sources.chat.Part."""

    @property
    def text(self) -> str: ...
    @property
    def learned(self) -> bool: ...
    @property
    def special(self) -> bool: ...


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json in use, with its boundary tokens (special_tokens.py).

    digest: of the file alone.
    fingerprint: also of how documents begin and end.

    Any text can be encoded. A text of more than 128 Ki characters is encoded in stretches, cut where the tokenizer cuts too, so
    that no id changes, except in words or white space of that length. A tokenizer whose seams are unknown (not byte-level, or
    with a pattern of its own) gets 4 Mi characters at once, cut after white space.
    """

    backend: Backend
    boundaries: BoundaryTokens
    digest: str
    fingerprint: str

    @property
    def separator(self) -> int:
        """The id that ends a document."""
        return self.boundaries.separator

    @property
    def bos(self) -> int | None:
        """The id that begins a document of plain text; None: it begins with its text."""
        return self.boundaries.bos

    @property
    def stops(self) -> frozenset[int]:
        """The ids at which generation stops."""
        return self.boundaries.stops

    def start(self, ids: Sequence[int]) -> list[int]:
        """`ids` as the beginning of a document, never empty: preceded by bos, if there is one and it is not there yet."""
        if self.bos is None or (ids and ids[0] == self.bos):
            return list(ids) or [self.separator]
        return [self.bos, *ids]

    @cached_property
    def vocab(self) -> int:
        """One more than the largest id, which is the number of rows of an embedding even if ids have gaps."""
        return max(self.backend.get_vocab().values()) + 1

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens: real ones in a part with `special`, ordinary text everywhere else."""
        return frozenset(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    @property
    def backend_name(self) -> str:
        """What encodes batches: "tiktoken", "bytes" or "tokenizers". The first call examines the whole vocabulary."""
        return "tokenizers" if isinstance(self._fast, str) else self._fast.name

    @property
    def why_not_faster(self) -> str:
        """Why no backend faster than `tokenizers` gives the same ids; empty if one does."""
        return self._fast if isinstance(self._fast, str) else ""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of one text, by `tokenizers`.

        special: special tokens that are spelled out in the text are real ones.

        Raises DataError for half a surrogate pair, which is not Unicode text.
        """
        with _unicode_errors_named([text]):
            if special:
                found: list[int] = self._with_specials.encode(text, add_special_tokens=False).ids
                return found
            return [i for part in self._cut(text) for i in self.backend.encode(part, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The same ids as `encode`, for every text, by the fastest backend on `threads` threads."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        """As encode_batch, with one uint32 array a text. With one thread, no thread pool is made, so that it is safe to
        fork."""
        fast = self._fast
        stretches = [list(self._cut(text)) for text in texts]
        flat = [stretch for cut in stretches for stretch in cut]

        def work(run: list[str]) -> list[Ids]:
            return self._slow(run) if isinstance(fast, str) else [fast.ids(stretch) for stretch in run]

        with _unicode_errors_named(texts):
            if threads == 1:
                found = work(flat)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    found = [ids for run in pool.map(work, _runs(flat)) for ids in run]
        pieces = iter(found)
        return [next(pieces) if len(cut) == 1 else np.concatenate([next(pieces) for _ in cut]) for cut in stretches]

    def encode_parts(self, parts: Iterable[PartLike]) -> tuple[list[int], list[bool]]:
        """Ids of a document in parts, and for every id whether it is learned.

        Special tokens are real ids only in parts with `special`. Adjacent parts with equal `special` are encoded as one text,
        so that cuts do not change ids; an id that reaches into a learned part is learned.
        """
        ids: list[int] = []
        learned: list[bool] = []
        for special, group in itertools.groupby(parts, lambda part: part.special):
            run = list(group)
            text = "".join(part.text for part in run)
            if len({part.learned for part in run}) == 1:
                found = self.encode(text, True) if special else self.encode_batch([text])[0]
                flags = [run[0].learned] * len(found)
            else:
                with _unicode_errors_named([text]):
                    twin = self._with_specials if special else self._untrimmed
                    encoding = twin.encode(text, add_special_tokens=False)
                found, flags = encoding.ids, _flags(encoding.offsets, run)
            ids += found
            learned += flags
        return ids, learned

    def backends_agree(self, texts: Sequence[str]) -> bool:
        """Whether the backend of encode_batch gives the ids of `tokenizers` for these texts."""
        if isinstance(self._fast, str):
            return True
        whole = [stretch for text in texts for stretch in self._cut(text)]
        return all(np.array_equal(self._fast.ids(t), ids) for t, ids in zip(whole, self._slow(whole), strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens included."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, and beside it what `load_saved` needs to make the same tokenizer."""
        path.write_text(self.backend.to_str(), encoding="utf-8")
        for name, content in boundary_files(self.backend, self.boundaries).items():
            path.with_name(name).write_bytes(content)

    @cached_property
    def _fast(self) -> TiktokenBackend | BytesBackend | str:
        with _single_threaded():
            return fast_path(self.backend)

    @cached_property
    def _seams_known(self) -> bool:
        return seams_known(json.loads(self.backend.to_str()))

    @cached_property
    def _untrimmed(self) -> Backend:
        """The same ids, with offsets that cover all characters of each token: post-processors trim white space."""
        twin = Backend.from_str(json.dumps(json.loads(self.backend.to_str()) | {"post_processor": None}))
        twin.encode_special_tokens = True
        return twin

    @cached_property
    def _with_specials(self) -> Backend:
        twin = Backend.from_str(self._untrimmed.to_str())
        twin.encode_special_tokens = False
        return twin

    def _cut(self, text: str) -> Iterator[str]:
        return windows(text) if len(text) <= WINDOW or self._seams_known else _coarse(text)

    def _slow(self, texts: list[str]) -> list[Ids]:
        with _single_threaded():
            found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]


def _flags(offsets: Sequence[tuple[int, int]], parts: Sequence[PartLike]) -> list[bool]:
    """For every id whether it is learned: in each stretch of learned parts, from the first to the last id that reaches into
    it, including those between that stand for no text."""
    flags, at = [False] * len(offsets), 0
    starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    for learned, group in itertools.groupby(parts, lambda part: part.learned):
        begin, at = at, at + sum(len(part.text) for part in group)
        if learned and at > begin:
            inside = np.flatnonzero((starts < at) & (stops > begin) & (stops > starts)).tolist()
            if inside:
                flags[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
    return flags


def _coarse(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _COARSE:
        stop = start + _COARSE
        space = max(text.rfind(" ", stop - 4096, stop), text.rfind("\n", stop - 4096, stop))
        stop = space + 1 or stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def _runs(texts: list[str]) -> Iterator[list[str]]:
    """The texts in groups of about _RUN characters: enough for a thread to be worth its hand-over."""
    run: list[str] = []
    size = 0
    for text in texts:
        run.append(text)
        size += len(text)
        if size >= _RUN:
            yield run
            run, size = [], 0
    if run:
        yield run


@contextmanager
def _unicode_errors_named(texts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (UnicodeEncodeError, TypeError):  # `tokenizers` says TypeError
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                shown = f"character {error.start} is {text[error.start]!r}, half a surrogate pair"
                raise DataError(f"text {number} of {len(texts)}: {shown}, and no Unicode text: drop it or mend it") from None
        raise


_PARALLELISM_VARIABLE = "TOKENIZERS_PARALLELISM"
_lock = threading.Lock()
_inside = [0]
_before: list[str | None] = [None]


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Inside the block, `tokenizers` starts no threads, which a forked process would wait for. It has no other switch."""
    with _lock:
        if not _inside[0]:
            _before[0] = os.environ.get(_PARALLELISM_VARIABLE)
            os.environ[_PARALLELISM_VARIABLE] = "false"
        _inside[0] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[0] -= 1
            if not _inside[0]:
                os.environ.pop(_PARALLELISM_VARIABLE)
                if _before[0] is not None:
                    os.environ[_PARALLELISM_VARIABLE] = _before[0]


def _make_tokenizer(backend: Backend, find: Callable[[Backend], BoundaryTokens]) -> Tokenizer:
    # A file may say how one application cut and filled its inputs, and would turn a separator that is written out in a
    # text into a real one: none of that is part of the vocabulary.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    boundaries = find(backend)
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    same = boundaries.bos is None and boundaries.separator == legacy_separator(backend)
    fingerprint = digest if same else hashlib.sha256(f"{digest} {boundaries.separator} {boundaries.bos}".encode()).hexdigest()
    return Tokenizer(backend, boundaries, digest, fingerprint)


def load_tokenizer(what: Path | str, pattern: str = "", separator: str = "", bos: str = AUTO) -> Tokenizer:
    """Load a tokenizer. Nothing is downloaded.

    what: a tokenizer.json, a `*.tiktoken` file of ranks, or one of merge_ranks.NAMES ("gpt2", "bytes", "cl100k_base", ...).
    pattern: how texts are split before merging, if a file of ranks does not say so (merge_ranks.from_file).
    separator, bos: names of the tokens that end and begin a document; by default those of the files beside it
        (special_tokens.py).

    Raises DataError if it is missing, broken, or has no token to end a document.
    """
    path, name = Path(what), str(what)
    if name in merge_ranks.NAMES:
        return _make_tokenizer(
            Backend.from_str(merge_ranks.load_named(name)), lambda backend: find_boundaries(backend, name, None, separator, bos)
        )
    alone = path.suffix == ".tiktoken"
    try:
        content = merge_ranks.from_file(path, pattern).encode() if alone else path.read_bytes()
    except OSError as error:
        known = f"; known by name: {', '.join(merge_ranks.NAMES)}" if not path.suffix else ""
        if path.is_dir():
            inside = path / "tokenizer.json"
            known = f"; give the file: {inside}" if inside.is_file() else "; give a tokenizer.json, and this folder has none"
        raise storage_error(error, f"data.tokenizer: cannot read {path}: {error.strerror}{known}") from None
    files: TokenizerFiles | None = None if alone else read_tokenizer_files(path.parent)
    return _parse(content, name, lambda backend: find_boundaries(backend, name, files, separator, bos))


def load_saved(path: Path) -> Tokenizer:
    """The tokenizer that Tokenizer.save wrote, in this or an earlier version. Raises DataError if it is missing or broken."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise storage_error(error, f"cannot read {path}: {error.strerror}") from None
    files = read_tokenizer_files(path.parent)
    return parse_tokenizer(content, str(path)) if not files.token("eos_token")[0] else load_tokenizer(path)


def parse_tokenizer(content: bytes, name: str, marks: BoundaryTokens | None = None) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json of ours, called `name`.

    marks: its recorded boundary tokens; by default those of versions that recorded none.

    Raises DataError if it is broken or has no token to end a document.
    """
    return _parse(content, name, lambda backend: marks or legacy_boundaries(backend) or find_boundaries(backend, name, None))


def _parse(content: bytes, name: str, find: Callable[[Backend], BoundaryTokens]) -> Tokenizer:
    try:
        return _make_tokenizer(Backend.from_str(content.decode("utf-8")), find)
    except DataError:
        raise
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"data.tokenizer: {name} is not a tokenizer.json: {error}") from None


def train_tokenizer(
    texts: Iterable[str],
    vocab: int,
    specials: Sequence[str] = (),
    show: Callable[[int, int], None] = lambda _documents, _characters: None,
    separator: str = "",
    bos: str = AUTO,
) -> Tokenizer:
    """Train a byte-level BPE. The same texts in the same order give the same tokenizer.

    vocab: number of tokens. The separator comes first, then `bos` if it is named, `specials`, and all 256 bytes, so that any
        text can be encoded.
    show: called after every text with the number of texts and of characters read.

    Raises DataError if `vocab` is too small for the bytes and the special tokens.
    """
    begin = [] if bos in (AUTO, NONE) else [bos]
    names = list(dict.fromkeys([separator or SEPARATOR, *begin, *specials]))
    if vocab < 256 + len(names):
        raise DataError(f"vocab = {vocab}: 256 bytes and {len(names)} special token(s) need at least {256 + len(names)}")

    def read() -> Iterator[str]:
        characters = 0
        for documents, text in enumerate(texts, 1):
            characters += len(text)
            yield from windows(text)
            show(documents, characters)

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(read(), trainer)
    return _make_tokenizer(backend, lambda made: find_boundaries(made, "the trained tokenizer", None, separator, bos))
