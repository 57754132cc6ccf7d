"""TOML files against a pydantic schema: every mistake one line that names file, line, key and the nearest right name."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mikoshi.trainer.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

_NAMED = re.compile(r"(data\.mixture\.)([^.]+)\.")
"""Tables that the user names."""

Origin = dict[str, tuple[str, int]]
"""Dotted key -> the file and line where it was last set."""


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Origin]:
    """A file's values over those of the `base` files that it names, and where each was set. Raises ConfigError."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files go round in a circle")
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the config is not UTF-8 text: byte {error.start} cannot be read") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    base = values.pop("base", [])
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: base = {base!r}: give a file name or a list of them")
    merged: dict[str, Any] = {}
    origin: Origin = {}
    for name in bases:
        below, below_origin = read(Path(os.path.normpath(path.parent / name)), (*seen, path.resolve()))
        _merge(merged, below)
        origin |= below_origin
    _merge(merged, values)
    return merged, origin | {key: (str(path), line) for key, line in _lines(text).items()}


def override(model: type[BaseModel], values: dict[str, Any], origin: Origin, texts: Sequence[str]) -> None:
    """Set `a.b=c` overrides of the command line in place. A value is read as TOML; where `model` has a text, it is the text as
    typed, so that a name may look like a number. Raises ConfigError."""
    kinds = dict(_fields(model))
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"{text!r}: an override is written section.key=value")
        if not is_unicode(text):
            raise ConfigError(f"{text!a}: an override is UTF-8 text")
        read_as = _override_value(value)
        if not isinstance(read_as, str) and _is_text(_kind_of(kinds, key.strip())):
            read_as = value.strip()
        _set(values, key.strip(), read_as, text)
        origin[key.strip()] = ("command line", 0)


def _lines(text: str) -> dict[str, int]:
    """The line of every `[table]` and `key =` of a TOML text: tomllib keeps no positions, and tables of plain keys,
    which is what a config is, can be read off line by line."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = head.group(1) + "."
            lines[head.group(1)] = number
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            lines[table + key.group(1)] = number
    return lines


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _override_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word: a string


def is_unicode(text: str) -> bool:
    """Whether a word of the command line or a file's name was UTF-8: Python keeps other bytes as halves of characters."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _kind_of(kinds: Mapping[str, Any], key: str) -> Any:
    """What the schema has for a dotted key, in tables whose keys the user names too."""
    if (field := kinds.get(key)) or (field := kinds.get(_NAMED.sub(r"\1*.", key))):
        return field.annotation
    table = kinds.get(key.rpartition(".")[0])
    return get_args(table.annotation)[1] if table is not None and get_origin(table.annotation) is dict else None


def _is_text(kind: Any) -> bool:
    """Whether a value of this type can be nothing but text, or be left out."""
    if get_origin(kind) is Annotated:
        return _is_text(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return all(isinstance(one, str) for one in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return all(one is NoneType or _is_text(one) for one in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, str | PurePath)


def _set(tree: dict[str, Any], key: str, value: Any, text: str) -> None:
    *path, leaf = key.split(".")
    for part in path:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{text!r}: {part} is a value, not a section")
        tree = below
    tree[leaf] = value


def validate(model: type[M], values: Mapping[str, Any], origin: Origin) -> M:
    """The values as `model` has them. Raises ConfigError, a line for each mistake."""
    try:
        # As JSON and strictly: "8" is not 8, while a list may still become a tuple and a string a path.
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as errors:
        lines = dict.fromkeys(_line(model, dict(error), origin) for error in errors.errors())
        raise ConfigError("\n".join(lines)) from None


def _line(model: type[BaseModel], error: dict[str, Any], origin: Origin) -> str:
    parts = [str(p) for p in error["loc"]]
    key, kind, message = ".".join(parts), error["type"], error["msg"].removeprefix("Value error, ")
    place = _place(parts, origin)
    if kind == "extra_forbidden":
        return f"{place}{key}: unknown key{_nearest(model, key)}"
    if kind == "missing":
        return f"{place}{key}: missing; {_description(model, parts) or 'it must be given'}"
    if not parts or isinstance(error.get("input"), dict):
        return f"{place}{key + ': ' if key else ''}{message}"
    if kind == "string_pattern_mismatch":
        message = "letters, digits, dots, dashes and underscores only, a letter or digit first"
    return f"{place}{key} = {json.dumps(error['input'])}: {message[0].lower()}{message[1:]}{_choices(error)}"


def _choices(error: Mapping[str, Any]) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    names = re.findall(r"'([^']+)'", error["ctx"]["expected"])
    near = difflib.get_close_matches(error["input"], names, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _place(parts: Sequence[str], origin: Origin) -> str:
    """`file:line: ` of the key, or of the nearest table above it that a file sets."""
    for depth in range(len(parts), 0, -1):
        key = ".".join(parts[:depth])
        if any(not line for k, (_, line) in origin.items() if k.startswith(key + ".")):
            return "command line: "
        if found := origin.get(key) or next((at for k, at in origin.items() if k.startswith(key + ".")), None):
            file, line = found
            return f"{file}:{line}: " if line else f"{file}: "
    return ""


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        below = field.annotation
        if get_origin(below) is dict:
            below, name = get_args(below)[1], f"{name}.*"
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield from _fields(below, f"{prefix}{name}.")


def _nearest(model: type[BaseModel], key: str) -> str:
    named = _NAMED.match(key)
    names = [name.replace("*", named.group(2)) if named else name for name, _ in _fields(model)]
    table, _, leaf = key.rpartition(".")
    beside = [n for n in names if n.rpartition(".")[0] == table]
    near = difflib.get_close_matches(leaf, [n.rpartition(".")[2] for n in beside], 1, 0.6)
    elsewhere = [n for n in names if n.rpartition(".")[2] == leaf]
    if near or elsewhere:
        return f"; did you mean {f'{table}.{near[0]}'.lstrip('.') if near else elsewhere[0]}?"
    return f"; {table or 'the config'} has {', '.join(n.rpartition('.')[2] for n in beside)}"


def _description(model: type[BaseModel], parts: Sequence[str]) -> str:
    field = dict(_fields(model)).get(_NAMED.sub(r"\1*.", ".".join(parts)))
    return str(field.description or "") if field else ""
