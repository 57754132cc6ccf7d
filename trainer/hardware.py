"""One table of what GPUs can do (configs/hardware/gpus.toml), by the whole name that a driver prints: never a guess."""

from __future__ import annotations

import sysconfig
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PLACES = (Path(__file__).resolve().parents[1] / "configs/hardware", Path(sysconfig.get_path("data"), "share/mikoshi/hardware"))


@dataclass(frozen=True)
class Gpu:
    """One device. peak: dense FLOP/s by precision ("bf16", "fp16", "fp8", "tf32"), without those that it has not. memory:
    bytes. bandwidth: of the memory, bytes a second. source: where the figures are from."""

    name: str
    peak: dict[str, float]
    memory: float
    bandwidth: float
    source: str


@cache
def table() -> dict[str, Gpu]:
    """Every GPU that is known, by name."""
    file = next(place / "gpus.toml" for place in _PLACES if (place / "gpus.toml").exists())
    found = {}
    for row in tomllib.loads(file.read_text(encoding="utf-8"))["gpu"]:
        peak = {precision: tera * 1e12 for precision, tera in row["peak"].items()}
        for name in row["names"]:
            found[name] = Gpu(name, peak, row["memory"] * 1e9, row["bandwidth"] * 1e12, row["source"])
    return found


def gpu_named(name: str) -> Gpu | None:
    """None for a name that is not in the table, as of a slice of a card ("... MIG 1g.10gb")."""
    return table().get(name.strip())
