"""The GPUs of this machine as their driver reports them: how many there are, their health, and who uses them."""

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
_TIMEOUT = 30.0


def count_visible_gpus(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs that CUDA or ROCm shows to a process, without loading either."""
    nvidia = len(list((root / "dev").glob("nvidia[0-9]*")))
    if nvidia:
        texts = (_text(file) for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")))
        uuids = [found[1] for text in texts if (found := re.search(r"^GPU UUID:\s*(\S+)", text, re.MULTILINE))]
        return count_shown(nvidia, env.get("CUDA_VISIBLE_DEVICES"), uuids)
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    amd = sum(_text(file).strip() not in ("", "0") for file in nodes)
    # ROCR's list applies first, and HIP's to what is left. HIP also reads CUDA's variable if its own is unset.
    amd = count_shown(amd, env.get("ROCR_VISIBLE_DEVICES"))
    return count_shown(amd, env.get("HIP_VISIBLE_DEVICES", env.get("CUDA_VISIBLE_DEVICES")))


def count_shown(there: int, visible: str | None, uuids: Sequence[str] = ()) -> int:
    """Count the GPUs that a list like CUDA_VISIBLE_DEVICES leaves visible, by CUDA's rules.

    Entries are numbers, or UUIDs that may be cut short. Entries after the first invalid one do not count, and a repeated
    one leaves none. Of MIG slices CUDA shows one.

    there: number of GPUs of the machine
    visible: the list; None: unset
    uuids: UUIDs of the GPUs, if they are known
    """
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
    valid = list(takewhile(lambda number: number >= 0, numbers))
    return 0 if len(set(valid)) < len(valid) else len(list(takewhile(lambda number: number < there, valid)))


def query_gpus() -> dict[str, Any]:
    """Query the GPUs: {"gpus": one record each, with the processes on it, "driver", "xid": the last GPU fault in the kernel
    log}.

    Without NVIDIA's tools there are none. If the tools fail, as after a GPU has fallen off its bus, the result has "error".
    """
    try:
        table = _run(["nvidia-smi", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader,nounits"])
    except FileNotFoundError:
        return {"gpus": [], "driver": "", "xid": ""}
    except (OSError, subprocess.SubprocessError) as error:
        return {"gpus": [], "driver": "", "xid": xid(), "error": f"nvidia-smi: {_reason(error)}"}
    found = parse_gpus(table)
    try:
        busy = _run(["nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError):
        busy = ""
    for gpu in found:
        gpu["pids"] = [int(pid) for uuid, pid in re.findall(r"^(\S+), *(\d+)", busy, re.MULTILINE) if uuid == gpu["uuid"]]
    return {"gpus": found, "driver": str(found[0]["driver"]) if found else "", "xid": xid()}


def parse_gpus(table: str) -> list[dict[str, Any]]:
    """Parse the output of nvidia-smi --format=csv,noheader,nounits; None stands for a number that it does not know."""
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
    """The last GPU error in the kernel log (NVRM: Xid), or "" if there is none or the log may not be read."""
    if log is None:
        try:
            log = _run(["dmesg"])
        except (OSError, subprocess.SubprocessError):
            return ""
    found = [line.strip() for line in log.splitlines() if "NVRM: Xid" in line]
    return found[-1][:200] if found else ""


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True, errors="replace").stdout


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {_TIMEOUT:g} s"
    if isinstance(error, subprocess.CalledProcessError):
        return " ".join((error.stdout or error.stderr or "").split())[:200] or f"exit code {error.returncode}"
    return str(error)
