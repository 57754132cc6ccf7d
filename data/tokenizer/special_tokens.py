"""Which tokens begin and end a document, and at which a model stops, as the tokenizer's files say. Nothing is guessed.

The files are those that Hugging Face models have beside tokenizer.json. The token that ends a document is, in this order: the
one the user names, `eos_token` of tokenizer_config.json, of special_tokens_map.json, `eos_token_id` of generation_config.json,
of config.json, and without any of these the one special token whose name is known to end documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mikoshi.data.errors import DataError, storage_error
from mikoshi.data.tokenizer.merge_ranks import SEPARATOR

AUTO, NONE = "auto", "none"
_CONFIG, _MAP, _GENERATION, _MODEL = (
    "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"
)  # fmt: skip
_ENDS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>")
_END_OF_TURN = "<|im_end|>"
_LEGACY_ENDS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>", _END_OF_TURN)


@dataclass(frozen=True)
class BoundaryTokens:
    """Ids at the boundaries of documents.

    separator: ends a document.
    bos: begins a document; None if it begins with its text.
    stops: ids after which generation stops, including the separator.
    """

    separator: int
    bos: int | None
    stops: frozenset[int]


@dataclass(frozen=True)
class TokenizerFiles:
    """The JSON files beside a tokenizer.json, by name."""

    where: Path
    found: Mapping[str, Mapping[str, Any]]

    def token(self, key: str) -> tuple[str, str]:
        """The token called `key` ("eos_token") and the file that names it; two "" if none does."""
        for name in (_CONFIG, _MAP):
            value = self.found.get(name, {}).get(key)
            value = value.get("content") if isinstance(value, dict) else value  # an AddedToken, written out
            if isinstance(value, str) and value:
                return value, name
        return "", ""

    def ids(self, key: str) -> list[tuple[int, str]]:
        """The ids called `key` ("eos_token_id") and the files that name them, in order."""
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


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the files beside a tokenizer.json. Raises DataError for a file that cannot be read."""
    found = {}
    for name in (_CONFIG, _MAP, _GENERATION, _MODEL):
        path = folder / name
        try:
            if not path.is_file():
                continue
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise storage_error(error, f"data.tokenizer: cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            reason = f"data.tokenizer: {path}, beside the tokenizer, is not JSON ({error}): mend it or move it"
            raise DataError(reason) from None
        if not isinstance(content, dict):
            raise DataError(f"data.tokenizer: {path}, beside the tokenizer, holds no object: mend it or move it")
        found[name] = content
    return TokenizerFiles(folder, found)


def find_boundaries(
    backend: Backend, origin: str, files: TokenizerFiles | None, separator: str = "", bos: str = AUTO
) -> BoundaryTokens:
    """The boundary tokens of a tokenizer called `origin`.

    separator, bos: names of tokens, if the user gives them.

    Raises DataError if nothing says what ends a document, if the token named does not exist, or if several tokens fit.
    """
    files = files or TokenizerFiles(Path(), {})
    known = set(backend.get_vocab().values())
    end = _separator(backend, origin, files, separator, known)
    token, _ = files.token("eos_token")
    stops = {end, *(number for number, _ in files.ids("eos_token_id"))}
    if token and (number := backend.token_to_id(token)) is not None:
        stops.add(number)
    return BoundaryTokens(end, _bos(backend, origin, files, bos, known), frozenset(stops & known))


def legacy_separator(backend: Backend) -> int | None:
    """The separator of earlier versions, which did not read the files. Data made with it keeps its fingerprint."""
    return next((i for i in map(backend.token_to_id, _LEGACY_ENDS) if i is not None), None)


def legacy_boundaries(backend: Backend) -> BoundaryTokens | None:
    """The boundary tokens of a saved tokenizer without files beside it."""
    end = legacy_separator(backend)
    return None if end is None else BoundaryTokens(end, None, frozenset({end}))


def boundary_files(backend: Backend, boundaries: BoundaryTokens) -> dict[str, bytes]:
    """The files that record the boundaries beside a tokenizer.json, in Hugging Face's format; none if tokenizer.json alone
    is enough."""
    if boundaries == legacy_boundaries(backend):
        return {}
    begin = {
        "bos_token": None if boundaries.bos is None else backend.id_to_token(boundaries.bos),
        "add_bos_token": boundaries.bos is not None,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": backend.id_to_token(boundaries.separator), **begin}
    stops = [boundaries.separator, *sorted(boundaries.stops - {boundaries.separator})]
    plain = {_CONFIG: config, _GENERATION: {"eos_token_id": stops}}
    return {name: (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode() for name, content in plain.items()}


def _separator(backend: Backend, origin: str, files: TokenizerFiles, named: str, known: set[int]) -> int:
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
    plain = [token for token in _LEGACY_ENDS if backend.token_to_id(token) is not None]
    some = sorted(_specials(backend))
    shown = f" (it has {', '.join(some[:8])}{', ...' if len(some) > 8 else ''})" if some else ""
    not_special = f"; {plain[0]!r} is ordinary text in it" if plain else ""
    return f"no special token that is known to end documents{shown}{not_special}"


def _bos(backend: Backend, origin: str, files: TokenizerFiles, named: str, known: set[int]) -> int | None:
    if named != AUTO:
        return None if named == NONE else _named(backend, origin, "data.bos", named)
    add_bos = files.found.get(_CONFIG, {}).get("add_bos_token")
    if add_bos is False:
        return None
    if add_bos is True:
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
    return _post_processor_bos(backend, origin)


def _post_processor_bos(backend: Backend, origin: str) -> int | None:
    """The token that the tokenizer's post-processor writes before a text."""
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


def _named(backend: Backend, origin: str, by: str, token: str, key: str = "") -> int:
    number = backend.token_to_id(token)
    if number is None:
        some = ", ".join(sorted(_specials(backend))[:12])
        has = f"its special tokens are {some}" if some else "it has no special tokens"
        raise DataError(f"{by} = {token!r}: no token of {origin}: {f'name one in {key}' if key else 'give one that is'}; {has}")
    return number


def _specials(backend: Backend) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
