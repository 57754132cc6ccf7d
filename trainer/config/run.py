"""The one typed schema of a run: TOML in, dotted overrides, every mistake one line that names the key and the way out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, field_validator, model_validator

from mikoshi.trainer.config.data import CheckpointSection, Count, DataSection, GuardSection, Natural, RecoverySection, Section
from mikoshi.trainer.config.engine import EngineSection
from mikoshi.trainer.config.toml import is_unicode, override, read, validate
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.model.config import ModelConfig

LONGEST_NAME = 100
MOST_BYTES = 200
"""Signs and bytes of a run's name: file systems take 255 bytes, of which a job's and a file's own names need some."""


class RunSection(Section):
    """Name, folder and seed."""

    name: str = Field(
        "",
        max_length=LONGEST_NAME,
        pattern=r"^[A-Za-z0-9][\w.-]*$|^$",
        description="folder of the run (default: the file's name)",
    )
    folder: Path = Field(Path("runs"), description="where run folders are kept")
    seed: Natural = Field(1, description="what initial weights and the order of the samples are made from")

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if (size := len(name.encode())) > MOST_BYTES:
            raise ValueError(f"{size} bytes: {MOST_BYTES} at most: file systems count bytes, of which a sign may need 4")
        return name

    @property
    def path(self) -> Path:
        """Path of the run folder."""
        return self.folder / self.name


class TrainSection(Section):
    """Length of the run and size of its batches."""

    steps: Natural = Field(description="steps of the run, each an update of the weights")
    global_batch: Count = Field(description="rows of a step, over all ranks")
    micro_batch: Count | None = Field(None, description="rows a rank handles at once, at most (default: all of its own)")
    context: Count = Field(description="tokens of a row")


class EvalSection(Section):
    """How often and on how much held-out text the run is evaluated."""

    every: Natural = Field(0, description="steps between evaluations; 0: only at the end")
    batches: Count = Field(
        8,
        description="global batches of held-out text; the loss is over the tokenizer's ids, without rows that pad the model's",
    )


class ScheduleSection(Section):
    """Learning rate over the steps."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up; wsd: constant, then a linear decay at the end"
    )
    steps: Count | None = Field(
        None,
        description="its length, after which the rate stays where it ended (default: train.steps, so that a longer "
        "train.steps stretches it and moves the rate)",
    )
    warmup: Natural = Field(0, description="steps of linear warm-up")
    decay: Natural = Field(0, description="wsd: steps of the final linear decay")
    final: float = Field(0.1, ge=0, le=1, description="share of lr at the last step (cosine, linear, wsd)")


class OptimSection(Section):
    """Optimizer, learning rate, weight decay and clipping."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: the blocks' matrices, each expert's too, by Muon; routers and the rest by AdamW "
        "(`mikoshi config RUN --optim` lists them)",
    )
    lr: float = Field(3e-4, gt=0, description="the largest learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="of AdamW: decay of its first and second moment"
    )
    eps: float = Field(1e-8, gt=0, description="of AdamW: added to the root of the second moment")
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
    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv", "dualpipev"] = Field(
        "1f1b", description="the order of the pipeline's forward and backward passes"
    )
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


class LogSection(Section):
    """Where metrics go, and how often the console prints them."""

    every: Count = Field(1, description="steps between console lines where it is no terminal; metrics have every step")
    tensorboard: bool = Field(True, description="also write the metrics for TensorBoard, into the run folder")
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
        if self.guard.spike == "rewind" and not self.checkpoint.regular:
            raise ValueError('guard.spike = "rewind" goes back to a checkpoint: set checkpoint.every, the steps between them')
        schedule = self.optim.schedule
        if schedule.kind == "wsd" and not schedule.decay:
            raise ValueError('optim.schedule.kind = "wsd" needs optim.schedule.decay, the steps of its final decay')
        length, key = schedule.steps or self.train.steps, "optim.schedule.steps" if schedule.steps else "train.steps"
        if length and schedule.warmup + schedule.decay > length:
            raise ValueError(
                f"optim.schedule.warmup {schedule.warmup} + decay {schedule.decay} exceeds {key} {length}: "
                f"a run as short needs a shorter optim.schedule.warmup or .decay, or more {key}"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML, its `base` files beneath it and `a.b=c` overrides above it. Raises ConfigError."""
    path = path / "config.toml" if path.is_dir() else path  # a run folder keeps its own
    values, origin = read(path)
    override(RunConfig, values, origin, overrides)
    run = values.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        if not is_unicode(path.stem):
            raise ConfigError(f"{str(path)!a}: the file's name is not UTF-8 text: rename it, or give run.name")
        run["name"] = path.stem
    return validate(RunConfig, values, origin)


def parse_config(text: str, name: str) -> RunConfig:
    """A resolved config as a run folder keeps it. Raises ConfigError."""
    try:
        return validate(RunConfig, tomllib.loads(text), {})
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
