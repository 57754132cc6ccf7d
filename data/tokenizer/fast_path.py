"""A byte-level tokenizer.json run by tiktoken, or by one table, where that provably gives the ids of `tokenizers`.

`tokenizers` merges listed pairs, the first of the list first; tiktoken merges any two neighbours that together are a token,
the lowest rank first. Say T's own letters, merged by pairs, end as the one token T. Wherever two neighbours p, q together
are T, nothing has merged across T's ends, so what happened between them is what happens to T's letters alone, and p, q is
the one state of two tokens that those go through: a listed pair. So the two agree on T, if T's rank is that pair's place in
the list. If T's letters end as something else, no pair ever makes T, and it must not be among the ranks; or it may, where a
piece that is a token is taken whole, if they end as three tokens or more. This is checked for every token of the vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import Tokenizer as Backend

from mikoshi.data.tokenizer.merge_ranks import LETTER, PATTERNS, unicode_to_bytes

Ids = npt.NDArray[np.uint32]

WINDOW = 1 << 17
"""Characters that are handed to a backend at once, at most."""

# tiktoken's engine takes possessive repeats, which spare it the places to come back to; the pieces are the same.
_QUICKER = {PATTERNS["gpt2"]: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"}

# No pattern of PATTERNS has a piece that goes on across these: before a space that follows anything but a space, and
# between a letter or digit of a large script and a line end or punctuation other than the apostrophe.
_LETTERS = "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_SEAM = re.compile(f"\\S(?= )|[{_LETTERS}](?=[\n,.;:!?\u3001\u3002\uff0c])")
_NEAR = 1024

# Contractions, white space of all kinds, scripts and their numbers and marks, letters of the newest Unicode versions.
_PROBE = (
    "The 3 quick-brown foxes' don't'LL \u017f'\u017f WE'VE I'm\t\tx  \n\n \r\n  y = {'a': [1, 22, 333, 4444]};//\n"
    "d\u00e9j\u00e0 vu e\u0301 \u0130 \u01c5 na\u00efve \u00a0\u2003\u3000 \u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053"
    "\u3093\u306b\u3061\u306f \uc548\ub155 \u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663 \u0939\u093f\u0928\u094d "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u00bd\u2167\u00b2 \U0001f600\U0001f468\u200d\U0001f469 \U00010d4a\U00011f02"
    "\x00\x1c\x85\u180e\u200b\ufeff <|endoftext|> _a_B __init__  self.x->y  '' 's ' s\n   "
)


@dataclass(frozen=True)
class TiktokenBackend:
    """Merging by tiktoken.

    table: ids by rank, if they differ.
    """

    encoding: tiktoken.Encoding
    table: Ids | None

    name = "tiktoken"

    def ids(self, text: str) -> Ids:
        """The ids of a text. Raises UnicodeEncodeError for half a surrogate pair."""
        ranks: Ids = self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        return ranks if self.table is None else self.table[ranks]


@dataclass(frozen=True)
class BytesBackend:
    """A vocabulary without merges.

    table: ids of the 256 bytes.
    """

    table: Ids

    name = "bytes"

    def ids(self, text: str) -> Ids:
        """The ids of a text. Raises UnicodeEncodeError for half a surrogate pair."""
        return self.table[np.frombuffer(text.encode(), dtype=np.uint8)]


def windows(text: str) -> Iterator[str]:
    """The text in stretches of at most WINDOW characters, cut where every pattern of PATTERNS cuts too, so that their ids
    together are the text's.

    A stretch without such a place (one word, or white space, of WINDOW characters) is cut at its end, so that neither backend
    runs out of time, stack or memory; merges do not cross that cut.
    """
    start = 0
    while len(text) - start > WINDOW:
        stop = start + WINDOW
        for begin in (stop - _NEAR, start):
            seams = [match.end() for match in _SEAM.finditer(text, begin, stop)]  # the last pair is within the stretch
            if seams:
                stop = seams[-1]
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def seams_known(parts: dict[str, Any]) -> bool:
    """Whether `windows` cuts only where this tokenizer.json (parsed) cuts: no normalizer, and a pattern of PATTERNS."""
    return parts["normalizer"] is None and bool(_pattern(parts["pre_tokenizer"]))


def _pattern(before: dict[str, Any] | None) -> str | None:
    """The known regular expression by which a byte-level tokenizer.json splits ("": not at all), None for any other kind."""
    if before is None:
        return None
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if len(steps) == 1:
        return PATTERNS["gpt2"] if last.get("use_regex", True) else ""
    split = steps[0]
    if len(steps) > 2 or last.get("use_regex", True) or split["type"] != "Split":
        return None
    # The patterns match any text whole, so that keeping the matches and dropping the rest is the same as isolating them.
    how = split["behavior"], split["invert"]
    regex = split["pattern"].get("Regex")
    return regex if regex in PATTERNS.values() and how in (("Isolated", False), ("Removed", True)) else None


def fast_path(backend: Backend) -> TiktokenBackend | BytesBackend | str:
    """A faster backend with the same ids, or the reason why there is none."""
    parts = json.loads(backend.to_str())
    model, pattern = parts["model"], _pattern(parts["pre_tokenizer"])
    if model["type"] != "BPE" or parts["normalizer"] is not None or pattern is None:
        return "not a byte-level BPE with a known pattern and without a normalizer"
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "the BPE has dropout, a prefix or a suffix"
    # A text is searched for those that are not special, whatever is asked.
    if plain := [token["content"] for token in parts["added_tokens"] if not token["special"]]:
        return f"{plain[0]!r} is an added token that is not special"
    vocab: dict[str, int] = model["vocab"]
    absent = [b for b, letter in enumerate(LETTER) if letter not in vocab]
    if absent:
        return f"byte {absent[0]} has no token"
    if not model["merges"] and not model["ignore_merges"]:
        return BytesBackend(np.array([vocab[letter] for letter in LETTER], dtype=np.uint32))
    if pattern == "":
        return "texts are not split before merging"
    order = _order(parts, backend)
    if isinstance(order, str):
        return order
    found = _ranked(order, vocab, pattern)
    if found.ids(_PROBE).tolist() != backend.encode(_PROBE, add_special_tokens=False).ids:
        return "a probe text is encoded differently"
    return found


def _order(parts: dict[str, Any], backend: Backend) -> list[str] | str:
    """The tokens for tiktoken in the order of their ranks, or why there is no such order."""
    model = parts["model"]
    vocab: dict[str, int] = model["vocab"]
    first: dict[str, int] = {}  # the place of a token's first pair
    scattered: set[str] = set()
    last = ""
    for place, pair in enumerate(model["merges"]):
        token = pair.replace(" ", "") if isinstance(pair, str) else pair[0] + pair[1]
        if token != last and first.setdefault(token, place) != place:
            scattered.add(token)
        last = token
    tokens = [token for token in vocab if unicode_to_bytes(token) is not None]
    made: list[str] = []
    whole: list[str] = []
    for token, ids in zip(tokens, _merged(tokens, parts, backend), strict=True):
        if ids == [vocab[token]]:
            if token in scattered:
                return f"two pairs far apart in the list of merges make token {token!r}"
            made.append(token)
        elif model["ignore_merges"]:
            if len(ids) == 2:
                return f"no merge makes token {token!r} of the two that its letters are merged into"
            whole.append(token)
    made.sort(key=lambda token: first.get(token, -1))
    return made + whole


def _merged(tokens: list[str], parts: dict[str, Any], backend: Backend) -> list[list[int]]:
    """What merging alone makes of the letters of each."""
    model = backend.model
    if parts["model"]["ignore_merges"]:  # it would look them up whole
        stripped = {**parts["model"], "ignore_merges": False}
        model = Backend.from_str(json.dumps({**parts, "added_tokens": [], "model": stripped})).model
    bare = Backend(model)  # no pre-tokenizer: the letters go in as they are
    return [encoding.ids for encoding in bare.encode_batch_fast(tokens, add_special_tokens=False)]


def _ranked(order: list[str], vocab: dict[str, int], pattern: str) -> TiktokenBackend:
    ids = np.array([vocab[token] for token in order], dtype=np.uint32)
    tokens = [token for token in map(unicode_to_bytes, order) if token is not None]
    rising = bool((ids[1:] > ids[:-1]).all())  # then the ids are as good as ranks
    ranks = dict(zip(tokens, ids.tolist() if rising else range(len(tokens)), strict=True))
    # tiktoken looks for special tokens first and is quicker where there is one to look for; none is ever allowed.
    never = {"<|never|>": max(ranks.values()) + 1}
    encoding = tiktoken.Encoding("mikoshi", pat_str=_QUICKER.get(pattern, pattern), mergeable_ranks=ranks, special_tokens=never)
    return TiktokenBackend(encoding, None if rising else ids)
