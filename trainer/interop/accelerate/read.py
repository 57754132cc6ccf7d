"""Reading another maker's YAML and JSON: plain values alone, each key asked for once, and those nobody asked for told at the
end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mikoshi.trainer.errors import ConfigError

_LARGEST, _DEEPEST = 1 << 17, 16
"""Bytes of a file, and tables in tables; real ones have a few thousand, and three."""

_SHOWN = 400
"""Signs of a value that a message repeats: a path is told whole."""

_OFF = (None, False, "", "no", "none", "NO", -1, 0)
"""Values that ask for nothing."""

_PLAIN = re.compile(r"[\w.-]{1,80}")

_TRUE, _FALSE = ("true", "yes", "y", "on", "1"), ("false", "no", "n", "off", "0", "none", "")


@dataclass
class Asked:
    """A table of a file, and which of its keys were taken. place: its dotted name in the file; empty for the whole file."""

    values: Mapping[str, Any]
    place: str
    path: Path
    taken: set[str] = field(default_factory=set)
    parts: list[Asked] = field(default_factory=list)

    def error(self, key: str, why: str, value: Any = None) -> ConfigError:
        """About a key; for the caller to raise."""
        shown = self.values.get(key) if value is None else value
        where = ".".join(part for part in (self.place, key) if part)
        told = "" if not key else f" = {json.dumps(shown, default=str)[:_SHOWN]}"
        return ConfigError(f"{self.path}: {where}{told}: {why}")

    def take(self, key: str) -> Any:
        self.taken.add(key)
        return self.values.get(key)

    def below(self, key: str, prefix: str) -> Asked:
        """The table at a key, its keys with the prefix that accelerate lets one leave out."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "a table is expected")
        if not all(isinstance(name, str) for name in value or {}):  # YAML 1.1 reads on and no as true and false
            raise self.error(key, "a table of names is expected: quote on, off, yes, no and numbers")
        named = {k if k.startswith(prefix) else prefix + k: v for k, v in (value or {}).items()}
        part = Asked(named, ".".join(p for p in (self.place, key) if p), self.path)
        self.parts.append(part)
        return part

    def text(self, key: str, default: str) -> str:
        value = self.take(key)
        if value is None:
            return default
        if isinstance(value, bool):  # YAML 1.1 reads no and off as false
            return "yes" if value else "no"
        if isinstance(value, (dict, list)):
            raise self.error(key, "a word is expected")
        return str(value)

    def flag(self, key: str) -> bool:
        return self.as_flag(key, self.take(key), False)

    def as_flag(self, key: str, value: Any, default: bool) -> bool:
        if value is None or value == "auto":
            return default
        if str(value).lower() in (*_TRUE, *_FALSE):
            return str(value).lower() in _TRUE
        raise self.error(key, "true or false is expected")

    def count(self, key: str, default: int | None, least: int = 1, most: int = 1 << 31) -> int | None:
        value = self.take(key)
        if value is None or value == "auto":
            return default
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"a whole number of {least} to {most} is expected")
        return value

    def peek_count(self, key: str, default: int) -> int:
        """The same of a key that is taken elsewhere."""
        value = self.values.get(key)
        return value if type(value) is int else default

    def number(self, key: str, default: float | None) -> float | None:
        value = self.take(key)
        if value is None or value in ("auto", "none"):
            return default
        try:
            found = float(value)
        except (TypeError, ValueError):
            raise self.error(key, "a number is expected") from None
        if isinstance(value, bool) or not 0 <= found < float("inf"):
            raise self.error(key, "a number of at least 0 is expected")
        return found

    def _rest(self) -> Iterator[tuple[str, Any]]:
        for key, value in self.values.items():
            if key not in self.taken and value not in _OFF and value not in ({}, []):
                yield ".".join(part for part in (self.place, key) if part), value
        for part in self.parts:
            yield from part._rest()

    def left(self) -> list[tuple[str, Any]]:
        """Keys that nobody took and that ask for something."""
        return list(self._rest())

    def explained(self, why: Mapping[str, str]) -> list[tuple[str, Any, str]]:
        """Of those the ones with a reason, which are then taken."""
        found = [(key, value, why[key]) for key, value in self._rest() if key in why]
        for table in (self, *self.parts):
            prefix = f"{table.place}." if table.place else ""
            table.taken |= {key.removeprefix(prefix) for key, _, _ in found if key.startswith(prefix)}
        return found


@dataclass
class Found:
    """What was made of a file so far. values: of the run's sections. notes: what the user has to set, in words.
    left: keys that have no setting here, with their values and the reason."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def set(self, dotted: str, value: Any) -> None:
        *path, leaf = dotted.split(".")
        section: dict[str, Any] = self.values
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value


def safe(key: str) -> str:
    return key if _PLAIN.fullmatch(key) else shown(key)


def shown(value: Any) -> str:
    """On one line, and with nothing that would end a comment of TOML."""
    text = json.dumps(value, default=str).replace("\x7f", "\\u007f")
    return text if len(text) <= 120 else text[:117] + "..."


def read_yaml(path: Path) -> Asked:
    """A YAML file of plain values (JSON is YAML too). Raises ConfigError for all else: tags, aliases, what is too large."""
    text = _text(path)
    try:
        _look_through(path, text)
        values = yaml.safe_load(text)
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not plain YAML: {told}") from None
    return Asked(_table(path, values), "", path)


def _look_through(path: Path, text: str) -> None:
    """Raises ConfigError, at once, for what makes a small file a large value or a long wait."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: has YAML aliases (*name), which accelerate does not write: write the values out")
        if depth > _DEEPEST:
            raise ConfigError(f"{path}: not plain YAML: more than {_DEEPEST} tables in tables")


def read_json(asked: Asked, key: str, name: str) -> Asked:
    """The JSON file that a key of a YAML names, from where the YAML lies or else, as accelerate does, from the current folder.
    Raises ConfigError."""
    tried = list(dict.fromkeys((asked.path.parent / name, Path(name))))
    path = next((place for place in tried if os.path.exists(place)), None)  # noqa: PTH110 (never raises)
    if path is None:
        looked = " nor ".join(str(place) for place in tried)
        raise asked.error(key, f"there is no {looked}: put the DeepSpeed JSON there, or give its full path")
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        told = error if isinstance(error, ConfigError) else f"{path}: not JSON: {error}"
        raise ConfigError(f"{asked.place}.{key}: {told}") from None
    return Asked(_table(path, values), "", path)


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder: give the file in it")
        if not path.is_file():
            raise ConfigError(f"{path}: no such file: give the YAML that `accelerate config` wrote")
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ConfigError(f"{path}: larger than {_LARGEST} bytes: not a config file")
        return raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} cannot be read") from None


def _table(path: Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: not a table of settings: give the YAML that `accelerate config` wrote")
    return values
