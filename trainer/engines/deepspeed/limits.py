"""What DeepSpeed cannot do, or would not do as this run needs it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from ctypes.util import find_library
from pathlib import Path

from mikoshi.trainer.engines.limit import Case, Limit, installed

_OLDEST = (0, 19)
_HEADERS = ("/usr/include", "/usr/local/include")
_NOT_QUANTIZED = "engine.deepspeed.quantized_weights=false engine.deepspeed.quantized_gradients=false"


def _too_old(case: Case) -> bool:
    if not case.on_this_machine:
        return False
    try:
        found = re.findall(r"\d+", importlib.metadata.version("deepspeed"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, found[:2])) < _OLDEST


def _offload(case: Case) -> set[str]:
    section = case.config.engine.deepspeed
    of_run = "cpu" if case.config.parallel.offload == "optimizer" else "none"
    return {section.offload_optimizer, section.offload_parameters, of_run} - {"none"}


def _no_libaio() -> bool:
    return find_library("aio") is None or not any(Path(folder, "libaio.h").exists() for folder in _HEADERS)


def _nvme(case: Case) -> bool:
    return "nvme" in _offload(case)


def _no_folder(case: Case) -> bool:
    folder = case.config.engine.deepspeed.nvme
    if not case.on_this_machine or not _nvme(case) or folder is None:
        return False
    return not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK)  # noqa: PTH112 (never raises)


def _offloads_parameters(case: Case) -> bool:
    return case.config.engine.deepspeed.offload_parameters != "none"


def _quantized(case: Case) -> bool:
    section = case.config.engine.deepspeed
    return section.quantized_weights or section.quantized_gradients


def _no_nvcc(case: Case) -> bool:
    if not (case.on_this_machine and _quantized(case) and case.cuda):
        return False
    return not (shutil.which("nvcc") and shutil.which("g++"))


DEEPSPEED: tuple[Limit, ...] = (
    Limit(
        "deepspeed", "the package is not installed", "DeepSpeed is an extra", 'pip install "mikoshi[deepspeed]"',
        lambda case: case.on_this_machine and not installed("deepspeed"),
    ),
    Limit(
        "deepspeed", "a version before 0.19", "its parameters and moments cannot be read and written as this engine does",
        'pip install "mikoshi[deepspeed]"', _too_old,
    ),
    Limit(
        "deepspeed", "parallel.tp > 1", "its engine cannot start on parameters that are DTensors",
        'parallel.tp=1 with parallel.zero=3, or engine.kind="native"', lambda case: case.layout.tp > 1,
    ),
    Limit(
        "deepspeed", "parallel.pp > 1 with parallel.zero > 1",
        "its pipeline sums up gradients where they are computed until the end of a step: it does not start with ZeRO 2 and 3",
        'parallel.zero=1, or parallel.pp=1, or engine.kind="native"',
        lambda case: case.layout.pp > 1 and case.layout.zero > 1,
    ),
    Limit(
        "deepspeed", "parallel.pp > 1 with parallel.cp > 1",
        "its pipeline knows stages and data ranks, and none that share rows",
        'parallel.cp=1, or parallel.pp=1, or engine.kind="native"', lambda case: case.layout.pp > 1 and case.layout.cp > 1,
    ),
    Limit(
        "deepspeed", 'parallel.schedule other than "1f1b", or parallel.virtual_stages > 1, with parallel.pp > 1',
        "its pipeline engine runs 1F1B, with one stage a rank",
        'parallel.schedule="1f1b" without parallel.virtual_stages, or engine.kind="native"',
        lambda case: case.layout.pp > 1 and (case.layout.schedule != "1f1b" or case.layout.virtual > 1),
    ),
    Limit(
        "deepspeed", "parallel.ep > 1", "its expert parallelism is of layers of its own",
        'parallel.ep=1 with parallel.zero=3, or engine.kind="native"', lambda case: case.layout.ep > 1,
    ),
    Limit(
        "deepspeed", "model.moe.bias_rate", "it keeps what has no gradient neither in fp32 nor among what it can be asked for",
        'leave model.moe.bias_rate out, with model.moe.aux_loss, or engine.kind="native"',
        lambda case: case.config.model.moe is not None and case.config.model.moe.bias_rate is not None,
    ),
    Limit(
        "deepspeed", 'parallel.cp > 1 with another parallel.context_kind than "ulysses"',
        "its sequence parallelism is Ulysses", 'parallel.context_kind="ulysses"',
        lambda case: case.layout.cp > 1 and case.layout.context_kind != "ulysses",
    ),
    Limit(
        "deepspeed", "parallel.replicas > 1 with parallel.zero > 0", "its ZeRO shares state out over all ranks",
        "leave parallel.replicas out, with engine.deepspeed.hpz for copies of the parameters within a node (zero 3), or "
        'engine.kind="native"', lambda case: case.layout.zero > 0 and case.layout.replicas > 1,
    ),
    Limit(
        "deepspeed", 'optim.kind = "muon"', "its Muon steps otherwise than this run's, which does not depend on the layout",
        'optim.kind="adamw", or engine.kind="native"', lambda case: case.config.optim.kind == "muon",
    ),
    Limit(
        "deepspeed", 'engine.precision = "bf16" with parallel.zero = 0', "it adds up and reduces gradients in bf16 there",
        "parallel.zero=1",
        lambda case: case.config.engine.precision == "bf16" and case.layout.zero == 0,
    ),
    Limit(
        "deepspeed", 'engine.precision = "bf16" with model.moe', "it rounds routers too, which then choose other experts",
        'engine.precision="fp32", or engine.kind="native"',
        lambda case: case.config.engine.precision == "bf16" and case.config.model.moe is not None,
    ),
    Limit(
        "deepspeed", 'engine.compile = "on" with parallel.zero = 3',
        "it gathers parameters in hooks inside a block, which a compiled block would not have",
        'parallel.zero=2, or engine.compile="off"',
        lambda case: case.config.engine.compile == "on" and case.layout.zero == 3,
    ),
    Limit(
        "deepspeed", "parallel.async_tp", "it has no tensor parallelism here", "parallel.async_tp=false",
        lambda case: case.config.parallel.async_tp,
    ),
    Limit(
        "deepspeed", "offload with parallel.zero = 0", "it offloads what ZeRO shares out", "parallel.zero=1",
        lambda case: bool(_offload(case)) and case.layout.zero == 0,
    ),
    Limit(
        "deepspeed", "engine.deepspeed.offload_parameters with parallel.zero < 3", "below ZeRO 3 parameters stay whole",
        "parallel.zero=3", lambda case: _offloads_parameters(case) and 0 < case.layout.zero < 3,
    ),
    Limit(
        "deepspeed", "offload to nvme with parallel.zero < 3", "only ZeRO 3 swaps to a disk", "parallel.zero=3",
        lambda case: case.config.engine.deepspeed.offload_optimizer == "nvme" and 0 < case.layout.zero < 3,
    ),
    Limit(
        "deepspeed", "offload to nvme without engine.deepspeed.nvme", "it must be told the folder on the disk",
        "engine.deepspeed.nvme=/local/nvme",
        lambda case: _nvme(case) and case.config.engine.deepspeed.nvme is None,
    ),
    Limit(
        "deepspeed", "offload to nvme with an engine.deepspeed.nvme that is no folder, or none to write in",
        "a misspelt one would fill another disk", "a folder that is there: mkdir -p it on the local NVMe disk first",
        _no_folder,
    ),
    Limit(
        "deepspeed", "offload to nvme without g++", "its reading and writing of the disk is compiled at the start",
        'apt-get install g++, or offload to "cpu"',
        lambda case: case.on_this_machine and _nvme(case) and shutil.which("g++") is None,
    ),
    Limit(
        "deepspeed", "offload to nvme without libaio", "its reading and writing of the disk needs the library and its header",
        'apt-get install libaio-dev, or offload to "cpu"', lambda case: case.on_this_machine and _nvme(case) and _no_libaio(),
    ),
    Limit(
        "deepspeed", "ZeRO++ (engine.deepspeed.hpz, quantized_weights, quantized_gradients) with parallel.zero < 3",
        "it is of gathered parameters", "parallel.zero=3",
        lambda case: (case.config.engine.deepspeed.hpz > 1 or _quantized(case)) and case.layout.zero < 3,
    ),
    Limit(
        "deepspeed", "engine.deepspeed.hpz that does not divide the ranks", "every group of ranks has a copy",
        "engine.deepspeed.hpz=1, or the number of GPUs of a node",
        lambda case: case.layout.world % case.config.engine.deepspeed.hpz > 0,
    ),
    Limit(
        "deepspeed", 'engine.deepspeed.hpz > 1 with engine.deepspeed.offload_parameters = "nvme"',
        "it makes the second copy of the parameters where they are, which cannot be on a disk",
        'engine.deepspeed.hpz=1, or engine.deepspeed.offload_parameters="cpu"',
        lambda case: case.config.engine.deepspeed.hpz > 1 and case.config.engine.deepspeed.offload_parameters == "nvme",
    ),
    Limit(
        "deepspeed", "engine.deepspeed.quantized_weights or quantized_gradients without CUDA", "its kernels are of CUDA",
        _NOT_QUANTIZED, lambda case: _quantized(case) and case.cuda is False,
    ),
    Limit(
        "deepspeed", "engine.deepspeed.quantized_weights or quantized_gradients without nvcc and g++",
        "its kernels are compiled at the start", f"install the CUDA toolkit and g++, or {_NOT_QUANTIZED}",
        _no_nvcc,
    ),
)  # fmt: skip
