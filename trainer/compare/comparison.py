"""A comparison: who takes part, with one config, data and seed; and its figures, which are made of its folder alone.

OUT/
    plan.json        the contestants, and what they run on
    runs.jsonl       when each run began and ended, and how
    output.txt       what their ranks have said
    NUMBER-NAME/     contestant.toml, and a run folder for each round: round-1/metrics.jsonl ...
    summary.json  compare.md  compare.html
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from mikoshi.data.io.atomic import write_file
from mikoshi.data.io.json import dumps
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.engine import Kind
from mikoshi.trainer.config.run import ParallelSection, RunConfig, load_config, to_toml
from mikoshi.trainer.engines.parts import compiles
from mikoshi.trainer.errors import ConfigError, RunError
from mikoshi.trainer.exit_codes import DONE
from mikoshi.trainer.record.run_folder import RunFolder, predicting_steps, read_jsonl, read_metrics
from mikoshi.trainer.train.preflight import preflight

PLAN, RUNS, OUTPUT, CONTESTANT = "plan.json", "runs.jsonl", "output.txt", "contestant.toml"
WARM_UP = 3
"""First steps of every run that its figures leave out: compilation, first touch of memory."""
_OF_A_LAYOUT = ("parallel.", "engine.", "train.micro_batch")
_SETTING = re.compile(r"[,;]([\w.]+)=")


@dataclass(frozen=True)
class Contestant:
    """One engine in one layout.

    folder: its name inside the comparison's folder. refused: why it cannot run, empty if it can. compiled: whether torch
    compiles its blocks.
    """

    engine: str
    layout: str
    folder: str
    refused: str = ""
    compiled: bool = False

    @property
    def name(self) -> str:
        """Engine and layout, as tables and charts show them."""
        return f"{self.engine}, {self.layout}" if self.layout else self.engine


@dataclass(frozen=True)
class ComparisonPlan:
    """The runs of a comparison.

    machine, versions: the hardware and software that the figures belong to.
    """

    config: str
    command: str
    ranks: int
    steps: int
    rounds: int
    contestants: list[Contestant]
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def schedule(self) -> list[tuple[int, int]]:
        """(round, contestant) of all runs, in order.

        Each round runs every contestant once, and every second round in reverse order, so that noise of the machine affects
        all of them alike.
        """
        able = [number for number, one in enumerate(self.contestants) if not one.refused]
        return [(turn, number) for turn in range(1, self.rounds + 1) for number in (able if turn % 2 else able[::-1])]


def run_of(config: RunConfig, folder: Path, turn: int) -> RunConfig:
    """The config of one round of a contestant: it saves no checkpoint, logs to no outside service, and does not restart."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": folder, "name": f"round-{turn}"}),
            "checkpoint": config.checkpoint.model_copy(update={"folder": "", "every": 0}),
            "log": config.log.model_copy(update={"wandb": "", "tensorboard": False}),
            "recovery": config.recovery.model_copy(update={"restarts": 0}),
        }
    )


def make_comparison(
    path: Path, overrides: Sequence[str], engines: str, layouts: Sequence[str], ranks: int, steps: int, out: Path
) -> tuple[list[Contestant], list[RunConfig]]:
    """Contestants, engine by engine in each layout, and their configs.

    A contestant that cannot run is listed with the reason. Raises ConfigError for an invalid option, RunError or DataError for
    what would stop every contestant.
    """
    shared = load_config(path, overrides)
    if steps < WARM_UP + 2:
        raise ConfigError(f"--steps {steps}: too few: the first {WARM_UP} of a run are to warm up: give {WARM_UP + 2} or more")
    if steps > shared.train.steps:
        raise ConfigError(f"--steps {steps}: the run has but {shared.train.steps}: give fewer, or raise train.steps")
    pairs = [(engine, " ".join(text.split())) for text in list(layouts) or [""] for engine in _engines(engines)]
    configs = [_with(path, overrides, engine, layout) for engine, layout in pairs]
    if out.exists():
        raise ConfigError(f"--out {out}: exists already: remove it, or give another --out")
    contestants = []
    for number, ((engine, layout), config) in enumerate(zip(pairs, configs, strict=True), 1):
        folder = f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', f'{engine} {layout}').strip('-')[:60]}"
        refused = ""
        try:
            preflight(run_of(config, out / folder, 1), ranks)
        except (LayoutError, ConfigError) as error:
            refused = "; ".join(str(error).splitlines())
        cuda = config.engine.device != "cpu" and torch.cuda.is_available()
        compiled = compiles(config, torch.device("cuda" if cuda else "cpu"))
        contestants.append(Contestant(engine, layout, folder, refused, compiled))
    return contestants, configs


def _engines(text: str) -> list[str]:
    if not text.strip():
        raise ConfigError(f"--engines '': names no engine: give some of {', '.join(get_args(Kind))}, or leave it out")
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in get_args(Kind):
            raise ConfigError(f"--engines {text}: {name!r} is none of {', '.join(get_args(Kind))}")
    return names


def _is_key(text: str) -> bool:
    return text.startswith(_OF_A_LAYOUT) or text in ParallelSection.model_fields


def _with(path: Path, overrides: Sequence[str], engine: str, layout: str) -> RunConfig:
    """The run's config under an engine and a layout. Raises ConfigError."""
    settings: dict[str, str] = {}
    for setting in layout.split():
        key, equals, value = setting.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f'--layouts "{layout}": {setting!r} is no setting: write key=value, such as "tp=2 zero=1"')
        key = key if "." in key else f"parallel.{key}"
        if not key.startswith(_OF_A_LAYOUT) or key == "engine.kind":
            raise ConfigError(
                f'--layouts "{layout}": {key} is not of a layout, which is made of parallel.*, engine.* and '
                "train.micro_batch: give it for all, as an override, and engines by --engines"
            )
        if key in settings:
            raise ConfigError(
                f'--layouts "{layout}": {key} is there twice, as {settings[key]} and as {value}: keep one, or give --layouts '
                "once more for the other"
            )
        if value[-1] in ",;" or ((after := _SETTING.search(value)) and _is_key(after[1])):
            raise ConfigError(f'--layouts "{layout}": {setting!r}: settings are separated by spaces: write "tp=2 zero=1"')
        settings[key] = value
    try:
        return load_config(path, [*overrides, f'engine.kind="{engine}"', *map("=".join, settings.items())])
    except ConfigError as error:
        raise ConfigError(f'--layouts "{layout}": {error}' if layout else str(error)) from None


def write_comparison_plan(plan: ComparisonPlan, configs: Sequence[RunConfig], out: Path) -> None:
    """Create the folder `out` and write the plan and every contestant's config into it. Raises RunError."""
    try:
        for one, config in zip(plan.contestants, configs, strict=True):
            (out / one.folder).mkdir(parents=True, exist_ok=True)
            write_file(out / one.folder / CONTESTANT, to_toml(config).encode())
        write_file(out / PLAN, dumps(asdict(plan), indent=2).encode())
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {error.strerror}: give another folder") from None


def read_comparison_plan(out: Path) -> ComparisonPlan:
    """The plan of the comparison in folder `out`. Raises RunError where there is none."""
    try:
        values = json.loads((out / PLAN).read_text(encoding="utf-8"))
        return ComparisonPlan(**{**values, "contestants": [Contestant(**one) for one in values["contestants"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{out}: no folder of a comparison ({type(error).__name__}: {error}): give a run's TOML file") from None


@dataclass(frozen=True)
class Round:
    """What a run recorded. steps: of its metrics. memory, reserved: peaks of every rank in bytes, as far as they are known."""

    number: int
    steps: list[dict[str, Any]]
    memory: list[int]
    reserved: list[int]

    @property
    def counted(self) -> list[dict[str, Any]]:
        """Records of the steps after the warm-up."""
        return self.steps[WARM_UP:]

    @property
    def rate(self) -> float:
        """Median tokens/s of the counted steps."""
        return float(statistics.median(r["tokens_per_second"] for r in self.counted))


@dataclass(frozen=True)
class Difference:
    """The largest difference of a figure from the first contestant's, the largest relative one, and the step of the former.
    What is not a number in one of the two alone is infinitely far."""

    absolute: float
    relative: float
    step: int


@dataclass(frozen=True)
class Figures:
    """Medians over all counted steps, which are those that predict a token. quartiles: of tokens/s. rounds: its median in
    each. ratio: to the first contestant's in the same round, the median of all rounds; ratios: the smallest and the largest,
    None of one round, which has no range. own: the largest difference of losses among its own rounds. left: steps that were
    not applied."""

    tokens_per_second: float
    quartiles: tuple[float, float]
    rounds: list[float]
    ratio: float
    ratios: tuple[float, float] | None
    step_ms: float
    mfu: float | None
    memory: list[int]
    reserved: list[int]
    loss: Difference
    grad_norm: Difference
    same_first_loss: bool
    own: float
    left: int


@dataclass(frozen=True)
class ContestantResult:
    """What one contestant's rounds measured.

    failed: how its last run ended, empty if it ended well. figures: None where no round has a counted step.
    """

    contestant: Contestant
    failed: str
    rounds: list[Round]
    figures: Figures | None


@dataclass(frozen=True)
class Comparison:
    """first: number of the row that the others are compared with. complete: whether every run has ended, well or not."""

    plan: ComparisonPlan
    rows: list[ContestantResult]
    runs: list[dict[str, Any]]
    first: int | None
    complete: bool

    def as_json(self) -> dict[str, Any]:
        """The plan, the runs and every contestant's figures as JSON values; infinity and NaN become their names."""
        record = asdict(self.plan) | {"warm_up": WARM_UP, "complete": self.complete, "first": self.first, "runs": self.runs}
        record["contestants"] = [
            asdict(row.contestant) | {"failed": row.failed, "figures": None if row.figures is None else asdict(row.figures)}
            for row in self.rows
        ]
        plain: dict[str, Any] = _plain(record)
        return plain


def _plain(value: Any) -> Any:
    """JSON knows no infinity and no NaN: their names instead."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_comparison(out: Path) -> Comparison:
    """The runs recorded so far and their figures. Raises RunError."""
    plan = read_comparison_plan(out)
    runs = read_jsonl(out / RUNS)
    failed = {run["contestant"]: run["why"] for run in runs if run.get("code", DONE) != DONE}
    measured = [_rounds(out / one.folder, plan.rounds) for one in plan.contestants]
    first = next((number for number, rounds in enumerate(measured) if rounds), None)
    rows = [
        ContestantResult(
            one, failed.get(number, ""), rounds, figures(rounds, measured[first]) if rounds and first is not None else None
        )
        for number, (one, rounds) in enumerate(zip(plan.contestants, measured, strict=True))
    ]
    ended = {(run["round"], run["contestant"]) for run in runs if "ended" in run}
    complete = all((turn, number) in ended or number in failed for turn, number in plan.schedule)
    return Comparison(plan, rows, runs, first, complete)


def refused_comparison(plan: ComparisonPlan) -> Comparison:
    """The comparison for a plan whose contestants are all refused. Reads no files."""
    return Comparison(plan, [ContestantResult(one, "", [], None) for one in plan.contestants], [], None, True)


def _rounds(folder: Path, rounds: int) -> list[Round]:
    """Those of which at least one step counts."""
    found = []
    for number in range(1, rounds + 1):
        run = RunFolder(folder / f"round-{number}")
        steps = predicting_steps(read_metrics(run.metrics))
        end = next((event for event in read_jsonl(run.events) if event["event"] == "end"), {})
        if len(steps) > WARM_UP:
            memory = end.get("memory") or [steps[-1]["memory_bytes"]]  # one that was cut short has told of rank 0 alone
            found.append(Round(number, steps, memory, end.get("reserved", [])))
    return found


def figures(rounds: Sequence[Round], first: Sequence[Round]) -> Figures:
    """Figures of one contestant's rounds, compared with the first contestant's."""
    counted = [record for each in rounds for record in each.counted]
    rates = [record["tokens_per_second"] for record in counted]
    middle = statistics.median(rates)
    low, _, high = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else (middle,) * 3
    theirs = {each.number: each for each in first}
    ratios = [each.rate / theirs.get(each.number, first[0]).rate for each in rounds]
    mfu = [record["mfu"] for record in counted if "mfu" in record]
    pairs = [(each, theirs.get(each.number, first[0])) for each in rounds]
    return Figures(
        middle, (low, high), [each.rate for each in rounds], statistics.median(ratios),
        (min(ratios), max(ratios)) if len(ratios) > 1 else None,
        1000 * statistics.median(record["step_seconds"] for record in counted), statistics.median(mfu) if mfu else None,
        _most([each.memory for each in rounds]), _most([each.reserved for each in rounds]),
        _furthest(pairs, "loss"), _furthest(pairs, "grad_norm"),
        all(ours.steps[0]["loss"] == other.steps[0]["loss"] for ours, other in pairs),
        _furthest([(each, rounds[0]) for each in rounds], "loss").absolute,
        sum(not record["applied"] for each in rounds for record in each.steps),
    )  # fmt: skip


def _most(rounds: Sequence[list[int]]) -> list[int]:
    """Of every rank, over the rounds."""
    longest = max(len(each) for each in rounds)
    return [max(each[rank] for each in rounds if len(each) > rank) for rank in range(longest)]


def _furthest(pairs: Sequence[tuple[Round, Round]], key: str) -> Difference:
    both = [(a, b) for ours, other in pairs for a, b in zip(ours.steps, other.steps, strict=False)]
    absolute = [(difference(a[key], b[key]), a["step"]) for a, b in both]
    relative = [difference(a[key], b[key], relative=True) for a, b in both]
    most, step = max(absolute, key=lambda pair: pair[0])
    return Difference(most, max(relative), step)


def difference(a: float, b: float, relative: bool = False) -> float:
    """|a - b|, or its share of |b|; 0 where neither is a number, infinite where one is not."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    apart = abs(a - b)
    if not math.isfinite(apart):
        return math.inf
    return apart / abs(b) if relative and b else math.inf if relative else apart
