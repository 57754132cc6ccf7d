"""DeepSpeed is brought in quietly, builds nothing it can do without, and is told what the run's own sections say."""

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


def bring_in(device: torch.device) -> Any:
    """The `deepspeed` package, for this process's device. Its log goes to stderr, warnings and up."""
    # It takes a GPU where it sees one; only the environment, read at import, says otherwise.
    os.environ["DS_ACCELERATOR"] = device.type
    # It asks the environment alone which of the GPUs seen here is this rank's; not every launcher says, and where each task
    # sees its own alone, that is number 0 whatever the launcher says.
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        # Not told how many of a node's ranks there are, it starts a program that counts the node's memories, at every
        # reduction of ZeRO 3.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # What torch says of its calls is not ours to mend.
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
    """Leave collectives on a CPU to gloo: by default the first engine compiles DeepSpeed's own, which takes a C++ compiler
    and a minute. There is no public switch; what is set here is its table of what may be built."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def settings(config: RunConfig, layout: Layout, device: torch.device, swap: Path | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: what the run says, and beneath it what the user's JSON has besides. `swap`: this
    rank's folder on a disk, see deepspeed_swap.

    Gradients are not scaled and not clipped by DeepSpeed: they are of the summed loss, and the optimizer does both (see
    GatedAdamW). They add up in fp32 and are reduced in fp32. Raises ConfigError.
    """
    own = config.engine.deepspeed
    zero: dict[str, Any] = {
        "stage": layout.zero,
        # It would replace torch.nn.functional.linear for the whole process; see deepspeed_model, which does the same for
        # the layers of this model alone.
        "memory_efficient_linear": False,
        "zero_hpz_partition_size": own.hpz,
        "zero_quantized_weights": own.quantized_weights,
        "zero_quantized_gradients": own.quantized_gradients,
    }
    for key, where in (("offload_optimizer", optimizer_home(config)), ("offload_param", own.offload_parameters)):
        if where != "none":
            zero[key] = {"device": where}
        if where == "nvme":
            zero[key]["nvme_path"] = str(swap)
    ours = {
        "train_micro_batch_size_per_gpu": layout.micro_rows,
        "gradient_accumulation_steps": layout.micro_batches,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # it knows optimizers by their exact type; ours is AdamW
        "zero_force_ds_cpu_optimizer": False,  # its own for the host has to be compiled
    }
    pinned = {key: {"pin_memory": device.type == "cuda"} for key in zero if key.startswith("offload_")}
    return _over(_over({"zero_optimization": pinned}, user_settings(config, layout)), ours)


def optimizer_home(config: RunConfig) -> str:
    """Where optimizer state is kept: "none" (with the parameters), "cpu" or "nvme"."""
    own = config.engine.deepspeed.offload_optimizer
    return "cpu" if own == "none" and config.parallel.offload == "optimizer" else own


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        mine = out.get(key)
        out[key] = _over(mine, value) if isinstance(value, dict) and isinstance(mine, dict) else value
    return out


def not_taken(said: dict[str, Any], error: Mapping[str, Any]) -> str:
    """DeepSpeed's error in words: it names a key within one of its sections, and not the section."""
    key = ".".join(str(part) for part in error["loc"])
    given = (dotted for dotted, value in leaves(said) if f".{dotted}".endswith(f".{key}") and value == error["input"])
    told = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    return f"{next(given, key)} = {json.dumps(error['input'], default=str)}: DeepSpeed does not take it: {told}"


def initialize(
    deepspeed: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, said: dict[str, Any], path: Path | None
) -> Any:
    """DeepSpeed's engine. Raises ConfigError for values of the user's JSON, at `path`, or settings that it does not take."""
    from pydantic import ValidationError

    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)  # that it does not know our optimizer's type is no news
    try:
        with redirect_stdout(io.StringIO()):  # in bf16 it prints how much memory there is
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=said, dist_init_required=False)
    except ValidationError as error:
        place = "engine.deepspeed.settings" if path is None else f"engine.deepspeed.config = {str(path)!r}"
        raise ConfigError(f"{place}: {not_taken(said, error.errors()[0])}") from None
    finally:
        log.setLevel(level)
    return engine
