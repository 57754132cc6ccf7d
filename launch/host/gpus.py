"""The GPUs of this machine as their driver tells of them: how many, how well, and who else is on them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

_FIELDS = {
    "index": "index", "uuid": "uuid", "name": "name", "memory_mib": "memory.total", "used_mib": "memory.used",
    "celsius": "temperature.gpu", "ecc": "ecc.errors.uncorrected.volatile.total", "driver": "driver_version",
}  # fmt: skip
_PATIENCE = 30.0


def gpus_here(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """GPUs of this machine that CUDA or ROCm shows to a process, counted without loading either."""
    nvidia = len(list((root / "dev").glob("nvidia[0-9]*")))
    if nvidia:
        told = (_text(file) for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")))
        uuids = [found[1] for text in told if (found := re.search(r"^GPU UUID:\s*(\S+)", text, re.MULTILINE))]
        return shown(nvidia, env.get("CUDA_VISIBLE_DEVICES"), uuids)
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    amd = sum(_text(file).strip() not in ("", "0") for file in nodes)
    # The runtime beneath chooses first, HIP among what is left; CUDA's variable is HIP's where that has none.
    amd = shown(amd, env.get("ROCR_VISIBLE_DEVICES"))
    return shown(amd, env.get("HIP_VISIBLE_DEVICES", env.get("CUDA_VISIBLE_DEVICES")))


def shown(there: int, visible: str | None, uuids: Sequence[str] = ()) -> int:
    """How many of the `there` GPUs a list as CUDA_VISIBLE_DEVICES leaves, by CUDA's rules: numbers, or UUIDs that may be cut
    short; what comes after the first that is no GPU here does not count, and with one named twice nothing does. Of MIG
    slices CUDA shows one. `uuids`: those of the GPUs, where they are known."""
    if visible is None:
        return there
    names = [name.strip() for name in visible.split(",")]
    if names[0].startswith("MIG-"):
        return min(there, 1)
    if names[0].startswith("GPU-"):
        found = list(takewhile(lambda name: name.startswith("GPU-"), names))
        if len(set(found)) < len(found):
            return 0
        here = found if not uuids else list(takewhile(lambda name: sum(uuid.startswith(name) for uuid in uuids) == 1, found))
        return min(there, len(here))
    numbers = [int(match[0]) if (match := re.match(r"[+-]?\d+", name)) else -1 for name in names]
    asked = list(takewhile(lambda number: number >= 0, numbers))
    return 0 if len(set(asked)) < len(asked) else len(list(takewhile(lambda number: number < there, asked)))


def gpus() -> dict[str, Any]:
    """{"gpus": a record each, with the processes on it, "driver", "xid": the kernel's last word of a GPU's fault}; without
    NVIDIA's tools there is none; {"error"} where they fail, which a GPU that has fallen off its bus causes."""
    try:
        table = _run(["nvidia-smi", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader,nounits"])
    except FileNotFoundError:
        return {"gpus": [], "driver": "", "xid": ""}
    except (OSError, subprocess.SubprocessError) as error:
        return {"gpus": [], "driver": "", "xid": xid(), "error": f"nvidia-smi: {_why(error)}"}
    found = parse_gpus(table)
    try:
        busy = _run(["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError):
        busy = ""
    for gpu in found:
        gpu["pids"] = [int(pid) for uuid, pid in re.findall(r"^(\S+), *(\d+)", busy, re.MULTILINE) if uuid == gpu["uuid"]]
    return {"gpus": found, "driver": str(found[0]["driver"]) if found else "", "xid": xid()}


def parse_gpus(table: str) -> list[dict[str, Any]]:
    """Records of the lines of nvidia-smi --format=csv,noheader,nounits; numbers, or None where it has none to tell."""
    found = []
    for line in filter(None, map(str.strip, table.splitlines())):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS):
            continue
        record: dict[str, Any] = dict(zip(_FIELDS, values, strict=True))
        for key in ("index", "memory_mib", "used_mib", "celsius", "ecc"):
            record[key] = int(record[key]) if record[key].isdigit() else None
        found.append(record)
    return found


def xid(log: str | None = None) -> str:
    """The last error of a GPU that the kernel has logged (NVRM: Xid), if this user may read its log; else nothing."""
    if log is None:
        try:
            log = _run(["dmesg"])
        except (OSError, subprocess.SubprocessError):
            return ""
    found = [line.strip() for line in log.splitlines() if "NVRM: Xid" in line]
    return found[-1][:200] if found else ""


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True, errors="replace").stdout


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {_PATIENCE:g} s"
    if isinstance(error, subprocess.CalledProcessError):
        return " ".join((error.stdout or error.stderr or "").split())[:200] or f"exit code {error.returncode}"
    return str(error)
