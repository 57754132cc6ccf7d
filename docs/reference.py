"""The tables of keys in the pages of config and clusters are made from the schema: `python docs/reference.py` writes them.

A test compares the pages with what is made here.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mikoshi.launch.config.cluster import KINDS, Base
from mikoshi.trainer.config.data import MixedSection
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.model.config import ModelConfig

DOCS = Path(__file__).parent
MARK = "<!-- from here on made by docs/reference.py: a test compares -->\n"
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = ((Gt, "gt", "above"), (Ge, "ge", "at least"), (Lt, "lt", "below"), (Le, "le", "at most"))
_LARGE = 1 << 24
"""A bound beyond this is no one's concern."""


def config_keys() -> str:
    """The tables of a run's config, one a section."""
    return "\n".join(_sections("", RunConfig, "", "###"))


def cluster_keys() -> str:
    """The tables of a cluster file: the keys that every kind has."""
    return "\n".join(_sections("", Base, "Keys of every cluster file", "##"))


def kind_keys(kind: str) -> str:
    """The table of the keys that a cluster file of one kind has for itself."""
    own = {key: field for key, field in KINDS[kind].model_fields.items() if key not in Base.model_fields and key != "kind"}
    return f'## Keys of `kind = "{kind}"` alone\n\n{_HEAD}{"".join(_row(key, field) for key, field in own.items())}'


def pages() -> dict[Path, str]:
    """Each page as it should be: what a person wrote, and below the mark what is made."""
    made = {
        "config": config_keys(),
        "cluster": cluster_keys(),
        **{kind: kind_keys(kind) for kind in ("ssh", "slurm", "kubernetes")},
    }
    paths = {DOCS / f"{name}.md": text for name, text in made.items()}
    return {path: path.read_text().partition(MARK)[0] + MARK + "\n" + text for path, text in paths.items()}


def _sections(prefix: str, model: type[BaseModel], title: str, level: str, about: str = "") -> Iterator[str]:
    """A table of a model's own keys, then those of the sections in it."""
    below: list[tuple[str, type[BaseModel], str]] = []
    rows = ""
    for name, field in model.model_fields.items():
        inner, key = _section_of(field.annotation), prefix + name
        if inner is None:
            rows += _row(key, field, name if model is MixedSection else "")
        else:
            named = get_origin(field.annotation) is dict
            below.append((f"{key}.NAME" if named else key, inner, field.description or _docstring(inner)))
    if rows:
        heading = title or f"`[{prefix.removesuffix('.')}]`"
        yield f"{level} {heading}\n\n{about and _sentence(about) + chr(10) * 2}{_HEAD}{rows}"
    for key, inner, description in below:
        yield from _sections(f"{key}.", inner, "", level, description)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, of one that may be left out, or of one that the user names."""
    if get_origin(annotation) is dict:
        return _section_of(get_args(annotation)[1])
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _docstring(model: type[BaseModel]) -> str:
    if model is ModelConfig:
        return "sizes in elements"
    return " ".join((model.__dict__.get("__doc__") or "").split())


def _row(key: str, field: FieldInfo, inherited: str = "") -> str:
    meaning = field.description or (f"as `data.{inherited}`, for this source" if inherited else "")
    if not meaning:
        raise ValueError(f"{key}: the schema has no description of it")
    return f"| `{key}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {_cell(meaning)} |\n"


def _type(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0], [*metadata, *_flat(parts[1:])])
    if origin in (Union, types.UnionType):
        (inner,) = (part for part in parts if part is not type(None))
        return _type(inner, metadata)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(part)}`" for part in parts)
    if origin is list:
        return f"list of {_plural(parts[0])}"
    if origin is tuple:
        inner = {_type(part) for part in parts if part is not Ellipsis}
        return f"list of {_plural(parts[0])}" if Ellipsis in parts or len(inner) > 1 else f"list of {len(parts)}: {inner.pop()}"
    if origin is dict:
        return "table"
    return _NAMES.get(annotation, "text") + _bounds(metadata)


def _plural(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is tuple:
        return f"[{', '.join(_type(part).partition(',')[0] for part in get_args(annotation))}]"
    if origin is dict:
        return "tables"
    name = _type(annotation)
    return {"text": "texts"}.get(name, name.replace("integer", "integers", 1).replace("number", "numbers", 1))


def _flat(metadata: Any) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _bounds(metadata: Any) -> str:
    told = []
    for item in _flat(metadata):
        for kind, name, words in _BOUNDS:
            if isinstance(item, kind) and abs(limit := getattr(item, name)) < _LARGE:
                told.append(f"{words} {limit}")
    return f", {', '.join(told)}" if told else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return ""
    value = [*field.default] if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(value, default=str)}`"


def _sentence(text: str) -> str:
    text = _cell(text)
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _cell(text: str) -> str:
    """As Markdown: a key, a file or a value in the words stays as it is written."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
