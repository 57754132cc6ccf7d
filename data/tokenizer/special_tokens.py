"""Which tokens begin and end a document, and at which a model stops: as the tokenizer's files say, never by a guess.

The files are those that Hugging Face models keep beside their tokenizer.json. What ends a document is, in this order: what
the user names, `eos_token` of tokenizer_config.json, of special_tokens_map.json, `eos_token_id` of generation_config.json, of
config.json, and where none of them is there, the one special token that is known by its name to be one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mikoshi.data.errors import DataError, of_storage
from mikoshi.data.tokenizer.merge_ranks import SEPARATOR

AUTO, NONE = "auto", "none"
_CONFIG, _MAP, _GENERATION, _MODEL = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"
)  # fmt: skip
_ENDS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>")
_END_OF_TURN = "<|im_end|>"
_BEFORE = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", _END_OF_TURN)


@dataclass(frozen=True)
class Marks:
    """separator: the id that ends a document. bos: the one that begins it; None: it begins with its text. stops: the ids
    after which a model has no more to say, the separator among them."""

    separator: int
    bos: int | None
    stops: frozenset[int]


@dataclass(frozen=True)
class Files:
    """What stands beside a tokenizer.json, by the file's name; each an object."""

    where: Path
    found: Mapping[str, Mapping[str, Any]]

    def token(self, key: str) -> tuple[str, str]:
        """The token called `key` ("eos_token"), and the file that says so; "" where none does."""
        for name in (_CONFIG, _MAP):
            value = self.found.get(name, {}).get(key)
            value = value.get("content") if isinstance(value, dict) else value  # an AddedToken, written out
            if isinstance(value, str) and value:
                return value, name
        return "", ""

    def ids(self, key: str) -> list[tuple[int, str]]:
        """The ids called `key` ("eos_token_id") and the files that say so, the first first."""
        out = []
        for name in (_GENERATION, _MODEL):
            content = self.found.get(name, {})
            inner = content.get("text_config")  # of a model that does not only read text
            value = content.get(key)
            if value is None and isinstance(inner, dict):
                value = inner.get(key)
            values = value if isinstance(value, list) else [value]
            out += [(v, name) for v in values if type(v) is int]
        return out


def read_files(folder: Path) -> Files:
    """Raises DataError for a file that is there and cannot be read."""
    found = {}
    for name in (_CONFIG, _MAP, _GENERATION, _MODEL):
        path = folder / name
        try:
            if not path.is_file():
                continue
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise of_storage(error, f"data.tokenizer: cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            told = f"data.tokenizer: {path}, beside the tokenizer, is not JSON ({error}): mend it or move it"
            raise DataError(told) from None
        if not isinstance(content, dict):
            raise DataError(f"data.tokenizer: {path}, beside the tokenizer, holds no object: mend it or move it")
        found[name] = content
    return Files(folder, found)


def find_marks(backend: Backend, origin: str, files: Files | None, separator: str = "", bos: str = AUTO) -> Marks:
    """The marks of a tokenizer called `origin`. `separator`, `bos`: the tokens' names, where the user gives them.

    Raises DataError where nothing says what ends a document, where what says it names no token of this tokenizer, and where
    several tokens fit.
    """
    files = files or Files(Path(), {})
    known = set(backend.get_vocab().values())
    end = _separator(backend, origin, files, separator, known)
    token, _ = files.token("eos_token")
    stops = {end, *(number for number, _ in files.ids("eos_token_id"))}
    if token and (number := backend.token_to_id(token)) is not None:
        stops.add(number)
    return Marks(end, _bos(backend, origin, files, bos, known), frozenset(stops & known))


def separator_before(backend: Backend) -> int | None:
    """What ended documents before it was asked of the files: data that is made so has the fingerprint that it had."""
    return next((i for i in map(backend.token_to_id, _BEFORE) if i is not None), None)


def marks_before(backend: Backend) -> Marks | None:
    """The marks of what was saved with nothing beside it."""
    end = separator_before(backend)
    return None if end is None else Marks(end, None, frozenset({end}))


def written(backend: Backend, marks: Marks) -> dict[str, bytes]:
    """The files that say so beside a tokenizer.json; none where it alone does. Models of Hugging Face have the same."""
    if marks == marks_before(backend):
        return {}
    begin = {"bos_token": None if marks.bos is None else backend.id_to_token(marks.bos), "add_bos_token": marks.bos is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": backend.id_to_token(marks.separator), **begin}
    stops = [marks.separator, *sorted(marks.stops - {marks.separator})]
    plain = {_CONFIG: config, _GENERATION: {"eos_token_id": stops}}
    return {name: (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode() for name, content in plain.items()}


def _separator(backend: Backend, origin: str, files: Files, named: str, known: set[int]) -> int:
    if named:
        return _named(backend, origin, "data.separator", named)
    token, name = files.token("eos_token")
    if token:
        return _named(backend, origin, f"eos_token of {files.where / name}", token, "data.separator")
    for number, name in files.ids("eos_token_id"):
        if number not in known:
            raise DataError(
                f"data.tokenizer: {origin} has no token of the id {number}, which eos_token_id of {files.where / name} names: "
                "name what ends a document in data.separator"
            )
        return number
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    fit = [token for token in _ENDS if token in (added if token == SEPARATOR else _specials(backend))]
    if not fit and _END_OF_TURN in _specials(backend):
        fit = [_END_OF_TURN]
    if len(fit) == 1:
        return _named(backend, origin, "data.tokenizer", fit[0])
    why = f"several special tokens that may end a document ({', '.join(fit)})" if fit else _no_end(backend)
    raise DataError(
        f"data.tokenizer: {origin} has {why}: name the right one in data.separator, or put its tokenizer_config.json, with "
        "an eos_token, beside it"
    )


def _no_end(backend: Backend) -> str:
    plain = [token for token in _BEFORE if backend.token_to_id(token) is not None]
    some = sorted(_specials(backend))
    shown = f" (it has {', '.join(some[:8])}{', ...' if len(some) > 8 else ''})" if some else ""
    not_special = f"; {plain[0]!r} is ordinary text in it" if plain else ""
    return f"no special token that is known to end documents{shown}{not_special}"


def _bos(backend: Backend, origin: str, files: Files, named: str, known: set[int]) -> int | None:
    if named != AUTO:
        return None if named == NONE else _named(backend, origin, "data.bos", named)
    asked = files.found.get(_CONFIG, {}).get("add_bos_token")
    if asked is False:
        return None
    if asked is True:
        token, name = files.token("bos_token")
        if token:
            return _named(backend, origin, f"bos_token of {files.where / name}", token, "data.bos")
        ids = [number for number, _ in files.ids("bos_token_id") if number in known]
        if not ids:
            raise DataError(
                f"data.tokenizer: {files.where / _CONFIG} has add_bos_token, and no file beside it says which token that is: "
                f'name it in data.bos, or set data.bos = "{NONE}"'
            )
        return ids[0]
    return _put_before(backend, origin)


def _put_before(backend: Backend, origin: str) -> int | None:
    """What the tokenizer's post-processor writes before a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    starts = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    before = whole[: starts[0]] if plain and starts else []
    if len(before) > 1:
        names = ", ".join(repr(backend.id_to_token(i)) for i in before)
        raise DataError(
            f"data.tokenizer: {origin} writes {len(before)} tokens before a text ({names}): name one of them in data.bos, or "
            f'set data.bos = "{NONE}"'
        )
    return before[0] if before else None


def _named(backend: Backend, origin: str, by: str, token: str, way: str = "") -> int:
    number = backend.token_to_id(token)
    if number is None:
        some = ", ".join(sorted(_specials(backend))[:12])
        has = f"its special tokens are {some}" if some else "it has no special tokens"
        raise DataError(f"{by} = {token!r}: no token of {origin}: {f'name one in {way}' if way else 'give one that is'}; {has}")
    return number


def _specials(backend: Backend) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
