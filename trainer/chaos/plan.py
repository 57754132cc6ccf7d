"""A plan of faults: which, in what step and phase, on which rank. The same seed and the same run make the same plan.

[[fault]]
kind = "kill"
step = 12
phase = "backward"
rank = 2
"""

from __future__ import annotations

import difflib
import json
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from mikoshi.trainer.errors import ConfigError

KINDS = {
    "kill": "SIGKILL of a rank",
    "stop": "SIGSTOP of a rank: it hangs",
    "slow": "a rank computes as much again as its work, for 25 steps",
    "nan": "a NaN in one rank's gradient",
    "flip": "one bit of one rank's copy of a weight",
    "fill": "no room on the disk for one rank's part of a save",
    "corrupt": "one byte of the newest checkpoint, and SIGKILL of a rank",
    "launcher": "SIGKILL of what started the ranks",
    "node": "SIGKILL of both",
    "preempt": "a request to stop, by SIGTERM, SIGUSR1 or SIGUSR2",
    "raise": "an error in a rank",
}
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")
SLOW_STEPS = 25

STEP_PHASES = ("data", "forward", "backward", "reduce", "update", "agree")
PHASES = ("load", *STEP_PHASES, "evaluate", "save", "end")
"""Those of the heartbeat in which a fault can strike: a rank is built by then."""

PHASES_OF: dict[str, tuple[str, ...]] = {"nan": ("reduce",), "flip": ("data",), "fill": ("save",), "slow": ("data",)}
"""Where a kind can strike, if not everywhere."""

_FIRST = 3
"""Steps after a start before a fault: the first ones are not like the others."""


@dataclass(frozen=True)
class Fault:
    """One fault of a plan. step: 1 is the first; 0 with phase "load", while a run is started. signal: of "preempt"."""

    kind: str
    step: int
    phase: str
    rank: int
    signal: str = "SIGTERM"

    @property
    def name(self) -> str:
        """Kind of the fault, with its signal where the kind is "preempt"."""
        return f"{self.kind} ({self.signal})" if self.kind == "preempt" else self.kind

    @property
    def description(self) -> str:
        """One line for people: kind, rank, step and phase."""
        return f"{self.name}, rank {self.rank}, step {self.step}, in {self.phase}"


@dataclass(frozen=True)
class FaultPlan:
    """The faults of a run, in the order in which they are to strike."""

    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class FaultSetting:
    """The run that a plan is for. every: steps between its checkpoints, 0: none on the way. compare: steps between
    comparisons of replicas, 0: never. replicas: whether several ranks hold the same weights. restarts: how many the run is
    allowed for one cause before a newer checkpoint is there. gradients: whether a rank has them where a NaN can be put into."""

    steps: int
    ranks: int
    every: int = 0
    compare: int = 0
    replicas: bool = False
    restarts: int = 8
    gradients: bool = True

    def refusal(self, kind: str) -> str | None:
        """Why a kind of fault cannot be tried on this run, and what to do; None where it can."""
        if kind == "nan" and not self.gradients:
            return 'DeepSpeed keeps gradients to itself: use engine.kind="native", or other --kinds'
        if kind in ("fill", "corrupt") and not self.every:
            return "the run saves nothing on the way: set checkpoint.every"
        if kind == "slow" and self.ranks < 2:
            return "a lone rank has no peers to be compared with: use --ranks 2 or more"
        if kind == "flip" and not self.replicas:
            return "no two ranks hold the same weights: use parallel.zero=0, parallel.replicas or parallel.tp"
        if kind == "flip" and not self.compare:
            return "ranks do not compare their weights: set guard.compare"
        return None

    def room(self, kind: str, close: bool) -> int:
        """Steps from one fault to the next, in which it shows what became of the first. Not `close`: there is a newer
        checkpoint by then, so that faults do not count as faults in a row."""
        if kind == "slow":
            return SLOW_STEPS + _FIRST
        if kind == "nan":
            return _FIRST
        if kind == "flip" and close:
            return _FIRST + min(n for n in (self.every, self.compare) if n)
        return _FIRST + (self.every if kind in ("fill", "corrupt") or not close else 0)


def make_fault_plan(seed: int, count: int, kinds: Sequence[str], setting: FaultSetting) -> FaultPlan:
    """`count` faults of all `kinds` about equally often, spread over a run so that each has the room it needs. Their order,
    steps, phases and ranks are drawn from the seed. Raises ConfigError where the run is too short for them."""
    rng = random.Random(seed)
    drawn = [kinds[n % len(kinds)] for n in range(count)]
    rng.shuffle(drawn)
    faults = [_draw(rng, kind, setting) for kind in drawn]
    gaps = [rng.random() for _ in faults]
    close = setting.every == 0 or (
        count <= setting.restarts and _placed(faults, [0] * count, setting, False)[1] > setting.steps
    )
    _, needed = _placed(faults, [0] * count, setting, close)
    if needed > setting.steps or (close and count > setting.restarts):
        raise ConfigError(
            f"train.steps = {setting.steps}, checkpoint.every = {setting.every}: no room for {count} faults of these kinds: "
            + (f"they need {needed} steps: raise train.steps, " if setting.every else "set checkpoint.every, ")
            + "or ask for fewer faults"
        )
    slack = float(setting.steps - needed)
    while True:  # going up to the next save takes steps too: try with less and less to spare
        widths = [int(gap * slack / max(1.0, sum(gaps))) for gap in gaps]
        placed, end = _placed(faults, widths, setting, close)
        if end <= setting.steps:
            return FaultPlan(tuple(placed))
        slack *= 0.8


def _draw(rng: random.Random, kind: str, setting: FaultSetting) -> Fault:
    phases: tuple[str, ...] = PHASES_OF.get(kind, STEP_PHASES)
    if kind == "kill" and setting.every:
        phases = (*STEP_PHASES, "save")
    # Rank 0 also writes the run's logs, to the same disk: there a lack of room costs lines of them.
    ranks = range(1, setting.ranks) if kind == "fill" and setting.ranks > 1 else range(setting.ranks)
    return Fault(kind, 0, rng.choice(phases), rng.choice(ranks), rng.choice(SIGNALS) if kind == "preempt" else SIGNALS[0])


def _placed(faults: Sequence[Fault], gaps: Sequence[int], setting: FaultSetting, close: bool) -> tuple[list[Fault], int]:
    """The faults with their steps, and the step by which the last one is over."""
    placed, step = [], _FIRST
    for fault, gap in zip(faults, gaps, strict=True):
        step += gap
        if fault.kind == "corrupt":
            # An older one is there to fall back to, and no newer one about to be committed.
            step = max(step, 2 * setting.every)
            step += setting.every - 1 - step % setting.every
        if fault.phase == "save":
            step = -(-step // setting.every) * setting.every
        placed.append(replace(fault, step=step))
        step += setting.room(fault.kind, close)
    return placed, step


def write_fault_plan(plan: FaultPlan) -> str:
    """As TOML that read_plan reads back to the same."""
    tables = [{k: v for k, v in asdict(f).items() if k != "signal" or f.kind == "preempt"} for f in plan.faults]
    return tomli_w.dumps({"fault": tables})


def read_fault_plan(path: Path, ranks: int) -> FaultPlan:
    """From a TOML file, or a .json file of the same shape. Raises ConfigError, with the line where it is TOML."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--plan {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--plan {path}: not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    tables = values.get("fault") if isinstance(values, dict) else None
    if not isinstance(tables, list) or not tables or set(values) != {"fault"}:
        raise ConfigError(f"--plan {path}: give a list of [[fault]] tables and nothing else")
    lines = {} if path.suffix == ".json" else _lines(text)
    return FaultPlan(tuple(_fault(table, number, ranks, path, lines) for number, table in enumerate(tables)))


def _fault(table: Any, number: int, ranks: int, path: Path, lines: Mapping[tuple[int, str], int]) -> Fault:
    def wrong(key: str, why: str) -> ConfigError:
        line = lines.get((number, key)) or lines.get((number, ""))
        name = f"fault {number + 1}" + (f", {key}" if key else "")
        return ConfigError(f"{path}{f':{line}' if line else ''}: {name}: {why}")

    if not isinstance(table, dict):
        raise wrong("", "give a table of kind, step, phase and rank")
    known = [f.name for f in fields(Fault)]
    for key in table:
        if key not in known:
            raise wrong(str(key), f"unknown key; a fault has {', '.join(known)}")
    for key, allowed in (("kind", tuple(KINDS)), ("phase", PHASES), ("signal", SIGNALS)):
        if key in table and table[key] not in allowed:
            near = difflib.get_close_matches(str(table[key]), allowed, 1)
            raise wrong(
                key, f"{table[key]!r} is none of {', '.join(allowed)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    for key in known[:4]:
        if key not in table:
            raise wrong(key, "missing")
    for key, most in (("step", 1 << 48), ("rank", ranks - 1)):
        if type(table[key]) is not int or not 0 <= table[key] <= most:
            raise wrong(key, f"{table[key]!r} is not a whole number from 0 to {most}")
    fault = Fault(**table)
    if fault.phase not in (phases := PHASES_OF.get(fault.kind, PHASES)):
        raise wrong("phase", f'"{fault.kind}" strikes in {" or ".join(phases)}')
    if "signal" in table and fault.kind != "preempt":
        raise wrong("signal", 'only "preempt" has one')
    return fault


def _lines(text: str) -> dict[tuple[int, str], int]:
    """The line of every fault's head, under "", and of every key of it."""
    found: dict[tuple[int, str], int] = {}
    number = -1
    for line, words in enumerate(text.splitlines(), 1):
        if re.match(r"\s*\[\[\s*fault\s*\]\]", words):
            number += 1
            found[number, ""] = line
        elif key := re.match(r"\s*(\w+)\s*=", words):
            found[number, key.group(1)] = line
    return found
