"""Decides the precision of a run whose config leaves it open ("auto"): once, the same on all ranks, and with a message."""

from __future__ import annotations

import torch

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.checkpoint.agree import all_gather_json, on_first_rank
from mikoshi.trainer.config.run import RunConfig, load_config
from mikoshi.trainer.engines.limits import bf16_refused
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.record.run_folder import RunFolder


def has_bf16(device: str, capability: tuple[int, int] = (0, 0), hip: bool = False) -> bool:
    """Whether a type of device multiplies matrices in bf16 at full speed.

    True for NVIDIA GPUs from Ampere (8.0) on and for AMD GPUs that torch's ROCm build runs on. False for CPUs, whose runs are
    in fp32.
    """
    return device == "cuda" and (hip or capability >= (8, 0))


def choose_precision(
    config: RunConfig, layout: Layout, device: str, bf16_everywhere: bool, begun_precision: str | None = None
) -> tuple[RunConfig, str]:
    """Returns the config with a definite engine.precision, and a message about the choice (empty if there is nothing to say).

    bf16_everywhere: whether the device of every rank has bf16.
    begun_precision: the precision of a run that is resumed.
    """
    if config.engine.precision != "auto":
        return config, ""
    if begun_precision is not None:
        return _with_precision(
            config, begun_precision
        ), f'precision: {begun_precision}, as the run was begun (engine.precision = "auto")'
    if device == "cpu":
        return _with_precision(config, "fp32"), ""
    if not bf16_everywhere:
        return _with_precision(config, "fp32"), "precision: fp32 without TF32, for not every GPU here has bf16"
    if why := bf16_refused(config, layout):
        return _with_precision(
            config, "fp32"
        ), f"precision: fp32 without TF32, for {config.engine.kind} cannot have bf16 here: {why}"
    return _with_precision(
        config, "bf16"
    ), 'precision: bf16, which the GPUs have (master weights fp32; engine.precision="fp32": all of it)'


def resolve_precision(
    config: RunConfig, layout: Layout, device: torch.device, folder: RunFolder | None = None
) -> tuple[RunConfig, str]:
    """Returns what `choose_precision` does for the ranks of a run. Collective if engine.precision is "auto".

    folder: the folder of a run that may have begun already.
    """
    if config.engine.precision != "auto":
        return config, ""
    begun_precision = None if folder is None else on_first_rank(lambda: _begun_precision(folder))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    bf16_here = has_bf16(device.type, capability, torch.version.hip is not None)
    return choose_precision(config, layout, device.type, all(all_gather_json(bf16_here)), begun_precision)


def _begun_precision(folder: RunFolder) -> str | None:
    """Returns the precision that a run has computed in so far, or None if it has made no step."""
    try:
        if not folder.metrics.stat().st_size:
            return None
        found = load_config(folder.path).engine.precision
    except (OSError, ConfigError):
        return None
    return None if found == "auto" else found


def _with_precision(config: RunConfig, precision: str) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"precision": precision})})
