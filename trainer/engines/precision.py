"""Which precision a run computes in where its config leaves that open: decided once, by all ranks alike, and said."""

from __future__ import annotations

import torch

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.checkpoint.agree import of_all_ranks, on_first_rank
from mikoshi.trainer.config.run import RunConfig, load_config
from mikoshi.trainer.engines.limits import bf16_refused
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record.run_folder import RunFolder


def has_bf16(device: str, capability: tuple[int, int] = (0, 0), hip: bool = False) -> bool:
    """Whether a device of this type multiplies matrices in bf16 at speed: NVIDIA's from Ampere (8.0) on, AMD's that ROCm's
    torch runs on. A CPU is not asked: its runs are in fp32."""
    return device == "cuda" and (hip or capability >= (8, 0))


def choose(config: RunConfig, layout: Layout, device: str, able: bool, begun: str | None = None) -> tuple[RunConfig, str]:
    """A config whose engine.precision is no longer "auto", and what is to be said of it. `able`: whether every rank's device
    has bf16. `begun`: the precision of a run that goes on."""
    if config.engine.precision != "auto":
        return config, ""
    if begun is not None:
        return _with(config, begun), f'precision: {begun}, as the run was begun (engine.precision = "auto")'
    if device == "cpu":
        return _with(config, "fp32"), ""
    if not able:
        return _with(config, "fp32"), "precision: fp32 without TF32, for not every GPU here has bf16"
    if why := bf16_refused(config, layout):
        return _with(config, "fp32"), f"precision: fp32 without TF32, for {config.engine.kind} cannot have bf16 here: {why}"
    return _with(
        config, "bf16"
    ), 'precision: bf16, which the GPUs have (master weights fp32; engine.precision="fp32": all of it)'


def settled(config: RunConfig, layout: Layout, device: torch.device, folder: RunFolder | None = None) -> tuple[RunConfig, str]:
    """`choose` for the ranks of a run; `folder`: of a run that may have been begun. Collective, unless precision is given."""
    if config.engine.precision != "auto":
        return config, ""
    begun = None if folder is None else on_first_rank(lambda: _begun(folder))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    able = has_bf16(device.type, capability, torch.version.hip is not None)
    return choose(config, layout, device.type, all(of_all_ranks(able)), begun)


def _begun(folder: RunFolder) -> str | None:
    """The precision that a run has computed in so far; None for one that has made no step."""
    try:
        if not folder.metrics.stat().st_size:
            return None
        found = load_config(folder.path).engine.precision
    except (OSError, ConfigError):
        return None
    return None if found == "auto" else found


def _with(config: RunConfig, precision: str) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": precision})})
