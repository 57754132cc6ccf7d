"""Answers questions about this node, JSON in and JSON out, without changing anything."""

from __future__ import annotations

import contextlib
import platform
import resource
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from mikoshi.data.io.cores import cores
from mikoshi.launch.host.gpus import query_gpus
from mikoshi.launch.host.network import select_interface
from mikoshi.trainer.errors import LaunchError

_IB = Path("/sys/class/infiniband")
_HELLO = 16


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer {"ask": about | clock | shared | listen | connect, ...}; {"error": one line} if that is not possible."""
    questions = {"about": about, "clock": clock, "shared": shared, "listen": listen, "connect": connect}
    handler: Callable[[dict[str, Any]], dict[str, Any]] | None = questions.get(str(question.get("ask")))
    if handler is None:
        return {
            "error": f"{question.get('ask')!r} is no question that this version of Mikoshi knows: install the same everywhere"
        }
    try:
        return handler(question)
    except LaunchError as error:
        return {"error": str(error)}
    except (OSError, ValueError, KeyError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def about(question: dict[str, Any]) -> dict[str, Any]:
    """Describe the node: {"versions", "gpus", "cores", "memory", "disk", "limits", "network", ...}; sizes in bytes.

    question: has "workdir" and "interface"
    """
    seen = query_gpus()
    return {
        "host": socket.gethostname(),
        "versions": {**_versions(), "driver": seen.pop("driver"), "kernel": platform.release()},
        **seen,
        "torch_gpus": _torch_gpus(),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "disk": _disks(str(question["workdir"])),
        "limits": {"nofile": _soft_limit(resource.RLIMIT_NOFILE), "memlock": _soft_limit(resource.RLIMIT_MEMLOCK)},
        "network": _network(str(question.get("interface", ""))),
    }


def clock(_question: dict[str, Any]) -> dict[str, Any]:
    """Return {"time": this node's clock in Unix seconds}."""
    return {"time": time.time()}


def shared(question: dict[str, Any]) -> dict[str, Any]:
    """Check that the folder is shared: the file of another machine is visible, and a new file is written for it.

    Returns {"seen": bool, "wrote": the new file's name, "token": its contents, "kind": file system, "why": what is wrong}.
    It waits up to "patience" seconds, since NFS caches what it knows of a folder.

    question: has "folder", and "name" and "token" of the other machine's file
    """
    folder, token = Path(str(question["folder"])), str(question["token"])
    kind, until = file_system(folder), time.monotonic() + float(question.get("patience", 5.0))
    why = wait_for_file(folder, str(question["name"]), token, until)
    if why:
        return {"seen": False, "kind": kind, "why": why}
    own, mine = f"node-{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        (folder / own).write_text(mine, encoding="ascii")
    except OSError as error:
        return {"seen": True, "kind": kind, "why": f"cannot write there: {error.strerror}"}
    return {"seen": True, "kind": kind, "why": "", "wrote": own, "token": mine}


def wait_for_file(folder: Path, name: str, token: str, until: float) -> str:
    """Wait until a file has the contents `token`. Returns "", or what is wrong at the monotonic time `until`."""
    while True:
        with contextlib.suppress(OSError):
            list(folder.iterdir())  # makes NFS refresh its cache
        try:
            found = (folder / name).read_text(encoding="ascii", errors="replace")
        except OSError as error:
            why = "the folder is there and what others write in it is not" if folder.is_dir() else f"{error.strerror}"
        else:
            if found == token:
                return ""
            why = "it has other contents there"
        if time.monotonic() > until:
            return why
        time.sleep(0.1)


def listen(question: dict[str, Any]) -> dict[str, Any]:
    """Open a port on this node's interface that sends a greeting to every client for "seconds".

    Returns {"address", "port", "hello"}.
    """
    _, address = select_interface(str(question.get("interface", "")))
    hello = secrets.token_hex(_HELLO // 2)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family, backlog=1024)
    threading.Thread(target=_serve_hello, args=(server, hello.encode(), float(question["seconds"])), daemon=True).start()
    return {"address": address, "port": server.getsockname()[1], "hello": hello}


def _serve_hello(server: socket.socket, hello: bytes, seconds: float) -> None:
    until = time.monotonic() + seconds
    with server:
        while (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError), server.accept()[0] as caller:
                caller.settimeout(1.0)
                caller.sendall(hello)


def connect(question: dict[str, Any]) -> dict[str, Any]:
    """Connect to all ports of "to", {name: [address, port, hello]}, within "patience" seconds each.

    Returns {"reached": {name: {"ms"} or {"error"}}}.
    """
    to, patience = dict(question["to"]), float(question["patience"])
    with ThreadPoolExecutor(max_workers=min(64, len(to)) or 1) as pool:
        tries = {name: pool.submit(_reach, str(at[0]), int(at[1]), str(at[2]), patience) for name, at in to.items()}
        return {"reached": {name: done.result() for name, done in tries.items()}}


def _reach(address: str, port: int, hello: str, patience: float) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        with socket.create_connection((address, port), timeout=patience) as peer:
            took = time.perf_counter() - start
            received = b""
            while len(received) < _HELLO and (more := peer.recv(_HELLO)):
                received += more
    except OSError as error:
        return {"error": f"{address} port {port}: {error.strerror or error or 'no answer'}"}
    if received.decode("ascii", "replace") != hello:
        return {"error": f"{address} is another machine"}
    return {"ms": took * 1000}


def file_system(folder: Path, mounts: str | None = None) -> str:
    """The kind of file system that a path is on: nfs4, lustre, ext4, overlay, ..."""
    text = mounts
    if text is None:
        try:
            text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    path, best, kind = str(folder.resolve()), -1, ""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        at = fields[4].replace("\\040", " ")
        if (path == at or path.startswith(at.rstrip("/") + "/")) and len(at) >= best:
            best, kind = len(at), right.split()[0]
    return kind


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        own = version("mikoshi")
    except PackageNotFoundError:
        own = "not installed"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
    cuda = torch.version.cuda or ""
    return {"mikoshi": own, "python": platform.python_version(), "torch": torch.__version__, "cuda": cuda, "nccl": nccl}


def _torch_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _disks(workdir: str) -> dict[str, Any]:
    """Free bytes of each folder; None if it does not exist."""
    found: dict[str, Any] = {}
    for name, path in (("workdir", workdir), ("tmp", tempfile.gettempdir()), ("shm", "/dev/shm")):
        try:
            found[name] = shutil.disk_usage(path).free
        except OSError:
            found[name] = None
    return found


def _soft_limit(kind: int) -> int:
    """The soft limit of a resource; -1 if there is none."""
    return resource.getrlimit(kind)[0]


def _network(wanted: str) -> dict[str, Any]:
    """{"interface", "address", "mbit": 0 where the kernel cannot say, "infiniband": {port: state}}."""
    name, address = select_interface(wanted)
    stats = psutil.net_if_stats().get(name)
    return {"interface": name, "address": address, "mbit": stats.speed if stats else 0, "infiniband": infiniband()}


def infiniband(root: Path = _IB) -> dict[str, str]:
    """The state of every port of every adapter, such as {"mlx5_0/1": "ACTIVE 400 Gb/sec (4X NDR)"}."""
    found = {}
    for port in sorted(root.glob("*/ports/*")):
        with contextlib.suppress(OSError):
            state = (port / "state").read_text(encoding="ascii").strip().partition(": ")[2]
            rate = (port / "rate").read_text(encoding="ascii").strip()
            found[f"{port.parent.parent.name}/{port.name}"] = f"{state} {rate}"
    return found
