"""The one typed schema of a run: TOML in, dotted overrides, every mistake one line that names the key and the way out."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from trainer.errors import ConfigError
from trainer.model.config import ModelConfig
from trainer.sections import CheckpointSection, Count, DataSection, GuardSection, Natural, RecoverySection, Section


class RunSection(Section):
    name: str = Field("", pattern=r"^[A-Za-z0-9][\w.-]*$|^$", description="folder of the run (default: the file's name)")
    folder: Path = Field(Path("runs"), description="where run folders are kept")
    seed: Natural = 1

    @property
    def path(self) -> Path:
        return self.folder / self.name


class TrainSection(Section):
    steps: Natural
    global_batch: Count = Field(description="rows of a step, over all ranks")
    micro_batch: Count | None = Field(None, description="rows a rank handles at once, at most (default: all of its own)")
    context: Count = Field(description="tokens of a row")


class EvalSection(Section):
    every: Natural = Field(0, description="steps between evaluations; 0: only at the end")
    batches: Count = Field(8, description="global batches of held-out text")


class ScheduleSection(Section):
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: Natural = Field(0, description="steps of linear warm-up")
    decay: Natural = Field(0, description="wsd: steps of the final linear decay")
    final: float = Field(0.1, ge=0, le=1, description="share of lr at the last step (cosine, linear, wsd)")


class OptimSection(Section):
    kind: Literal["adamw", "muon"] = Field("adamw", description="muon: hidden matrices by Muon, the rest by AdamW")
    lr: float = Field(3e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only")
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    schedule: ScheduleSection = ScheduleSection()


class ParallelSection(Section):
    """Degrees of parallelism. The ranks that tp, pp and cp leave over are data ranks: each reads other rows."""

    zero: Literal[0, 1, 2, 3] = Field(
        2,
        description="what the data ranks share out: 0 nothing, 1 optimizer, 2 and gradients (not with pp > 1, where they "
        "add up whole over a step), 3 and parameters",
    )
    replicas: Count | None = Field(
        None, description="groups of data ranks that each hold a whole state (hybrid sharding: one a node); default 1"
    )
    tp: Count = Field(1, description="tensor and sequence parallel ranks, inside a node")
    pp: Count = Field(1, description="pipeline parallel ranks")
    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev"] = "1f1b"
    virtual_stages: Count | None = Field(None, description="stages a pipeline rank (default: 2 where the schedule has them)")
    cp: Count = Field(1, description="context parallel ranks: each holds a part of every row's tokens")
    context_kind: Literal["all-gather", "ring", "ulysses"] = Field(
        "all-gather",
        description="how attention sees the whole row: keys and values gathered, going round (plain causal attention only), "
        "or heads exchanged",
    )
    ep: Count = Field(1, description="expert parallel ranks, taken from those that the other axes use for tokens")
    expert_tp: Count | None = Field(None, description="tensor parallel ranks inside an expert: 1 or tp (default tp)")
    offload: Literal["none", "optimizer"] = Field(
        "none", description="optimizer: master weights and optimizer state in the host's memory, the step taken there"
    )
    async_tp: bool = Field(False, description="overlap tensor-parallel collectives with products (CUDA, compiled)")


class EngineSection(Section):
    kind: Literal["native"] = "native"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: compute in bf16, master weights in fp32")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations made again in backward: none, all but matrix products, all of a block"
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile of each block; auto: on CUDA")


class LogSection(Section):
    every: Count = Field(1, description="steps between console lines where it is no terminal; metrics have every step")
    tensorboard: bool = True
    wandb: str = Field("", description="Weights & Biases project; empty: off")


class RunConfig(Section):
    """Everything that one training run is."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataSection
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    recovery: RecoverySection = RecoverySection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.model.position == "learned" and self.train.context > self.model.context:
            raise ValueError(
                f"train.context {self.train.context} is longer than the model's {self.model.context} learned positions: "
                "lower it or raise model.context"
            )
        for step, tokens in self.data.warmup:
            if self.train.context % tokens:
                raise ValueError(
                    f"data.warmup: from step {step} rows of train.context {self.train.context} tokens cannot be read in pieces "
                    f"of {tokens}: give a divisor"
                )
        lanes = self.data.lanes
        if lanes and self.train.global_batch % lanes:
            raise ValueError(f"data.lanes {lanes} does not divide train.global_batch {self.train.global_batch}: give a divisor")
        if self.parallel.async_tp and (self.engine.device == "cpu" or self.engine.compile == "off"):
            raise ValueError("parallel.async_tp needs CUDA and compiled blocks: unset it, or engine.device and engine.compile")
        halves = self.parallel.pp > 1 and self.parallel.schedule in ("interleaved-zb", "zbv", "dualpipev")
        if self.engine.recompute == "selective" and halves:
            raise ValueError(
                f'engine.recompute "selective" cannot go with parallel.schedule "{self.parallel.schedule}", whose backward '
                'pass runs in two halves: use engine.recompute "full" or "none", or another schedule'
            )
        if self.guard.spike == "rewind" and not self.checkpoint.every:
            raise ValueError('guard.spike = "rewind" goes back to a checkpoint: set checkpoint.every, the steps between them')
        schedule = self.optim.schedule
        if schedule.kind == "wsd" and not schedule.decay:
            raise ValueError('optim.schedule.kind = "wsd" needs optim.schedule.decay, the steps of its final decay')
        if self.train.steps and schedule.warmup + schedule.decay > self.train.steps:
            raise ValueError(
                f"optim.schedule.warmup {schedule.warmup} + decay {schedule.decay} exceeds train.steps {self.train.steps}"
            )
        return self


_NAMED = re.compile(r"(data\.mixture\.)([^.]+)\.")
"""Tables that the user names."""

Origin = dict[str, tuple[str, int]]
"""Dotted key -> the file and line where it was last set."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML, its `base` files beneath it and `a.b=c` overrides above it. Raises ConfigError."""
    path = path / "config.toml" if path.is_dir() else path  # a run folder keeps its own
    values, origin = _read(path, seen=())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r}: an override is written section.key=value")
        _set(values, key.strip(), _override_value(value), text)
        origin[key.strip()] = ("command line", 0)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        run["name"] = path.stem
    return _validate(values, origin)


def parse_config(text: str, name: str) -> RunConfig:
    """A resolved config as a run folder keeps it. Raises ConfigError."""
    try:
        return _validate(tomllib.loads(text), {})
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: {error}") from None


def to_toml(config: RunConfig) -> str:
    """The resolved config as TOML, every default written out, that load_config reads back to the same."""
    return tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True)))


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    keys = [*after, *(key for key in before if key not in after)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origin]:
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
        below, below_origin = _read(Path(os.path.normpath(path.parent / name)), (*seen, path.resolve()))
        _merge(merged, below)
        origin |= below_origin
    _merge(merged, values)
    return merged, origin | {key: (str(path), line) for key, line in _lines(text).items()}


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


def _set(tree: dict[str, Any], key: str, value: Any, text: str) -> None:
    *path, leaf = key.split(".")
    for part in path:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{text!r}: {part} is a value, not a section")
        tree = below
    tree[leaf] = value


def _validate(values: Mapping[str, Any], origin: Origin) -> RunConfig:
    try:
        # As JSON and strictly: "8" is not 8, while a list may still become a tuple and a string a path.
        return RunConfig.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as errors:
        lines = dict.fromkeys(_line(dict(error), origin) for error in errors.errors())
        raise ConfigError("\n".join(lines)) from None


def _line(error: dict[str, Any], origin: Origin) -> str:
    parts = [str(p) for p in error["loc"]]
    key, kind, message = ".".join(parts), error["type"], error["msg"].removeprefix("Value error, ")
    place = _place(parts, origin)
    if kind == "extra_forbidden":
        return f"{place}{key}: unknown key{_nearest(key)}"
    if kind == "missing":
        return f"{place}{key}: missing; {_description(parts) or 'it must be given'}"
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
            yield from _fields(get_args(below)[1], f"{prefix}{name}.*.")
        elif isinstance(below, type) and issubclass(below, BaseModel):
            yield from _fields(below, f"{prefix}{name}.")


def _nearest(key: str) -> str:
    named = _NAMED.match(key)
    names = [name.replace("*", named.group(2)) if named else name for name, _ in _fields(RunConfig)]
    table, _, leaf = key.rpartition(".")
    beside = [n for n in names if n.rpartition(".")[0] == table]
    near = difflib.get_close_matches(leaf, [n.rpartition(".")[2] for n in beside], 1, 0.6)
    elsewhere = [n for n in names if n.rpartition(".")[2] == leaf]
    if near or elsewhere:
        return f"; did you mean {f'{table}.{near[0]}'.lstrip('.') if near else elsewhere[0]}?"
    return f"; {table or 'the config'} has {', '.join(n.rpartition('.')[2] for n in beside)}"


def _description(parts: Sequence[str]) -> str:
    field = dict(_fields(RunConfig)).get(_NAMED.sub(r"\1*.", ".".join(parts)))
    return str(field.description or "") if field else ""
