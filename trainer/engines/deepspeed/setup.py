"""Imports DeepSpeed quietly, keeps it from building what it can do without, and gives it the run's configuration."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.engines.deepspeed.settings import leaves, user_settings
from mikoshi.trainer.errors import ConfigError


def import_deepspeed(device: torch.device) -> Any:
    """Returns the `deepspeed` package, set up for this process's device. Its warnings go to stderr.

    Raises RuntimeError if this process uses it for another device already.
    """
    # DeepSpeed uses a GPU if it sees one, unless this variable, read at import, says otherwise.
    os.environ["DS_ACCELERATOR"] = device.type
    # It takes this rank's GPU from the environment. Not every launcher sets it, and if each task sees only its own GPU,
    # the number is 0 whatever the launcher says.
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        # Without the number of ranks on the node it starts a program that counts NUMA nodes, at every reduction of ZeRO 3.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # DeepSpeed's calls of deprecated functions are not ours to fix.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\..*")
    import deepspeed

    if deepspeed.get_accelerator().device_name() != device.type:
        raise RuntimeError(f"DeepSpeed is set to another device than {device.type} in this process: start a new one")
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    build_no_collectives()
    return deepspeed


def build_no_collectives() -> None:
    """Leave collectives on a CPU to gloo.

    By default the first engine compiles DeepSpeed's own, which takes a C++ compiler and a minute. There is no public switch,
    so this changes DeepSpeed's table of what can be built.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def settings(config: RunConfig, layout: Layout, device: torch.device, swap: Path | None = None) -> dict[str, Any]:
    """Returns DeepSpeed's configuration: what the run says, over what the user's JSON has besides.

    DeepSpeed neither scales nor clips gradients. They belong to the summed loss, and the optimizer does both (see
    GatedAdamW). They are accumulated and reduced in fp32. Raises ConfigError.

    swap: this rank's folder on a disk; see `swap_folder`.
    """
    section = config.engine.deepspeed
    zero: dict[str, Any] = {
        "stage": layout.zero,
        # It would replace torch.nn.functional.linear for the whole process; deepspeed.model does the same for the layers of
        # this model alone.
        "memory_efficient_linear": False,
        "zero_hpz_partition_size": section.hpz,
        "zero_quantized_weights": section.quantized_weights,
        "zero_quantized_gradients": section.quantized_gradients,
    }
    for key, where in (("offload_optimizer", optimizer_home(config)), ("offload_param", section.offload_parameters)):
        if where != "none":
            zero[key] = {"device": where}
        if where == "nvme":
            zero[key]["nvme_path"] = str(swap)
    of_run = {
        "train_micro_batch_size_per_gpu": layout.micro_rows,
        "gradient_accumulation_steps": layout.micro_batches,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # it knows optimizers by their exact type; ours is AdamW
        "zero_force_ds_cpu_optimizer": False,  # its own CPU optimizer has to be compiled
    }
    pinned = {key: {"pin_memory": device.type == "cuda"} for key in zero if key.startswith("offload_")}
    return _merged(_merged({"zero_optimization": pinned}, user_settings(config, layout)), of_run)


def optimizer_home(config: RunConfig) -> str:
    """Returns where optimizer state is kept: "none" (with the parameters), "cpu" or "nvme"."""
    home = config.engine.deepspeed.offload_optimizer
    return "cpu" if home == "none" and config.parallel.offload == "optimizer" else home


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        lower = out.get(key)
        out[key] = _merged(lower, value) if isinstance(value, dict) and isinstance(lower, dict) else value
    return out


def rejection(ds_config: dict[str, Any], error: Mapping[str, Any]) -> str:
    """Returns a message for a setting that DeepSpeed does not accept.

    DeepSpeed's error names a key within a section but not the section.
    """
    key = ".".join(str(part) for part in error["loc"])
    given = (dotted for dotted, value in leaves(ds_config) if f".{dotted}".endswith(f".{key}") and value == error["input"])
    message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{next(given, key)} = {json.dumps(error['input'], default=str)}: DeepSpeed does not take it: {message}"


def initialize(
    deepspeed: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any], path: Path | None
) -> Any:
    """Returns DeepSpeed's engine.

    Raises ConfigError for settings that DeepSpeed does not accept.

    path: the user's JSON, for the message; None if settings stand in the run's config.
    """
    from pydantic import ValidationError

    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that it does not know our optimizer's type
    try:
        with redirect_stdout(io.StringIO()):  # in bf16 it prints the free memory
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    except ValidationError as error:
        place = "engine.deepspeed.settings" if path is None else f"engine.deepspeed.config = {str(path)!r}"
        raise ConfigError(f"{place}: {rejection(ds_config, error.errors()[0])}") from None
    finally:
        log.setLevel(level)
    return engine
