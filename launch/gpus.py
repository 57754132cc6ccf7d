"""The GPUs of this machine as their driver tells of them: how many, how well, and who else is on them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Any

_FIELDS = {
    "index": "index", "uuid": "uuid", "name": "name", "memory_mib": "memory.total", "used_mib": "memory.used",
    "celsius": "temperature.gpu", "ecc": "ecc.errors.uncorrected.volatile.total", "driver": "driver_version",
}  # fmt: skip
_PATIENCE = 30.0


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


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {_PATIENCE:g} s"
    if isinstance(error, subprocess.CalledProcessError):
        return " ".join((error.stdout or error.stderr or "").split())[:200] or f"exit code {error.returncode}"
    return str(error)
