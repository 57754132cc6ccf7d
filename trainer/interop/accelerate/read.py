"""Reads another tool's YAML and JSON as plain values, and records which keys were used, so that the rest can be reported."""

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
"""Limits: bytes of a file and depth of nested tables; real files have a few thousand bytes and three levels."""

_SHOWN = 400
"""Characters of a value that a message repeats, enough for a whole path."""

_OFF = (None, False, "", "no", "none", "NO", -1, 0)
"""Values that request nothing."""

_PLAIN = re.compile(r"[\w.-]{1,80}")

_TRUE, _FALSE = ("true", "yes", "y", "on", "1"), ("false", "no", "n", "off", "0", "none", "")


@dataclass
class ConfigTable:
    """A table of a file, and which of its keys were used.

    name: its dotted name in the file; empty for the whole file.
    parts: tables below it that were used.
    """

    values: Mapping[str, Any]
    name: str
    path: Path
    used: set[str] = field(default_factory=set)
    parts: list[ConfigTable] = field(default_factory=list)

    def error(self, key: str, why: str, value: Any = None) -> ConfigError:
        """Returns a ConfigError about a key, for the caller to raise."""
        shown = self.values.get(key) if value is None else value
        where = ".".join(part for part in (self.name, key) if part)
        assignment = "" if not key else f" = {json.dumps(shown, default=str)[:_SHOWN]}"
        return ConfigError(f"{self.path}: {where}{assignment}: {why}")

    def get(self, key: str) -> Any:
        """Returns the value of a key, or None, and marks the key as used."""
        self.used.add(key)
        return self.values.get(key)

    def section(self, key: str, prefix: str) -> ConfigTable:
        """Returns the table at a key.

        Raises ConfigError if it is not a table.

        prefix: put before keys that lack it, as accelerate allows one to leave it out.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "a table is expected")
        if not all(isinstance(name, str) for name in value or {}):  # YAML 1.1 reads on and no as true and false
            raise self.error(key, "a table of names is expected: quote on, off, yes, no and numbers")
        named = {k if k.startswith(prefix) else prefix + k: v for k, v in (value or {}).items()}
        part = ConfigTable(named, ".".join(p for p in (self.name, key) if p), self.path)
        self.parts.append(part)
        return part

    def text(self, key: str, default: str) -> str:
        """Returns a string. Raises ConfigError for a table or a list."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool):  # YAML 1.1 reads no and off as false
            return "yes" if value else "no"
        if isinstance(value, (dict, list)):
            raise self.error(key, "a word is expected")
        return str(value)

    def flag(self, key: str) -> bool:
        """Returns a boolean, False by default. Raises ConfigError for any other value."""
        return self.as_flag(key, self.get(key), False)

    def as_flag(self, key: str, value: Any, default: bool) -> bool:
        """Returns `value` as a boolean. Raises ConfigError, with the key, for any other value."""
        if value is None or value == "auto":
            return default
        if str(value).lower() in (*_TRUE, *_FALSE):
            return str(value).lower() in _TRUE
        raise self.error(key, "true or false is expected")

    def count(self, key: str, default: int | None, least: int = 1, most: int = 1 << 31) -> int | None:
        """Returns a whole number from `least` to `most`, or `default`. Raises ConfigError for any other value."""
        value = self.get(key)
        if value is None or value == "auto":
            return default
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"a whole number of {least} to {most} is expected")
        return value

    def peek_count(self, key: str, default: int) -> int:
        """Returns a whole number without marking the key as used."""
        value = self.values.get(key)
        return value if type(value) is int else default

    def number(self, key: str, default: float | None) -> float | None:
        """Returns a number of at least 0, or `default`. Raises ConfigError for any other value."""
        value = self.get(key)
        if value is None or value in ("auto", "none"):
            return default
        try:
            out = float(value)
        except (TypeError, ValueError):
            raise self.error(key, "a number is expected") from None
        if isinstance(value, bool) or not 0 <= out < float("inf"):
            raise self.error(key, "a number of at least 0 is expected")
        return out

    def _rest(self) -> Iterator[tuple[str, Any]]:
        for key, value in self.values.items():
            if key not in self.used and value not in _OFF and value not in ({}, []):
                yield ".".join(part for part in (self.name, key) if part), value
        for part in self.parts:
            yield from part._rest()

    def unused(self) -> list[tuple[str, Any]]:
        """Returns keys and values that were not used and that request something."""
        return list(self._rest())

    def explained(self, why: Mapping[str, str]) -> list[tuple[str, Any, str]]:
        """Returns key, value and reason of the unused keys that `why` has a reason for, and marks them as used."""
        out = [(key, value, why[key]) for key, value in self._rest() if key in why]
        for table in (self, *self.parts):
            prefix = f"{table.name}." if table.name else ""
            table.used |= {key.removeprefix(prefix) for key, _, _ in out if key.startswith(prefix)}
        return out


@dataclass
class Conversion:
    """The result of converting a file.

    values: settings by section of a run's config.
    notes: what the user has to set.
    unsupported: keys without a setting here, with values and reasons.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def set(self, dotted: str, value: Any) -> None:
        """Set the value of a dotted key."""
        *path, leaf = dotted.split(".")
        section: dict[str, Any] = self.values
        for part in path:
            section = section.setdefault(part, {})
        section[leaf] = value


def safe(key: str) -> str:
    """Returns a key in a form that is safe in a TOML comment."""
    return key if _PLAIN.fullmatch(key) else shown(key)


def shown(value: Any) -> str:
    """Returns a value on one line, without anything that would end a TOML comment."""
    text = json.dumps(value, default=str).replace("\x7f", "\\u007f")
    return text if len(text) <= 120 else text[:117] + "..."


def read_yaml(path: Path) -> ConfigTable:
    """Returns a YAML file of plain values (JSON is YAML too).

    Raises ConfigError for anything else: tags, aliases, or a file that is too large.
    """
    text = _text(path)
    try:
        _look_through(path, text)
        values = yaml.safe_load(text)
    except ConfigError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: not plain YAML: {problem}") from None
    return ConfigTable(_table(path, values), "", path)


def _look_through(path: Path, text: str) -> None:
    """Raises ConfigError, quickly, for what makes a small file a huge value or a long wait."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: has YAML aliases (*name), which accelerate does not write: write the values out")
        if depth > _DEEPEST:
            raise ConfigError(f"{path}: not plain YAML: more than {_DEEPEST} tables in tables")


def read_json(table: ConfigTable, key: str, name: str) -> ConfigTable:
    """Returns the JSON file that a key names, found beside the YAML or else, as accelerate does, in the current folder.

    Raises ConfigError.
    """
    tried = list(dict.fromkeys((table.path.parent / name, Path(name))))
    path = next((place for place in tried if os.path.exists(place)), None)  # noqa: PTH110 (never raises)
    if path is None:
        looked = " nor ".join(str(place) for place in tried)
        raise table.error(key, f"there is no {looked}: put the DeepSpeed JSON there, or give its full path")
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        problem = error if isinstance(error, ConfigError) else f"{path}: not JSON: {error}"
        raise ConfigError(f"{table.name}.{key}: {problem}") from None
    return ConfigTable(_table(path, values), "", path)


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
