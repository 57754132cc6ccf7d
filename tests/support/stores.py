"""Shards behind the faulty endpoint, and processes that fetch them: what the tests of store and cache have in common."""

import hashlib
import json
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from faulty import Fault
from mikoshi.data.io.fetch import CacheLimits, IndexedFile, open_store

ROOT = Path(__file__).parents[2]
SIZE = 200_064
BODIES = {f"{n}.shard": np.random.default_rng(n).bytes(SIZE) for n in range(8)}
BODIES["big.shard"] = np.random.default_rng(8).bytes(1_800_064)
HALF = 1_500_000  # of the big one: enough for some of it to be on disk

CLIENT = """
import hashlib, json, sys
from pathlib import Path
from mikoshi.data.io.fetch import CacheLimits, IndexedFile, open_store
told = json.loads(sys.argv[1])
with open_store(told["url"], CacheLimits(Path(told["folder"]), **told["limits"]), told["options"]) as store:
    for line in told["wanted"]:
        with store.fetch(IndexedFile(*line)) as path:
            print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
    if told["linger"]:
        sys.stdin.read()
"""

PASSING = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429),
    "cut before the body": Fault(send=0, cut=True),
    "cut in the header": Fault(send=30, cut=True),
    "cut in the body": Fault(send=150_000, cut=True),
    "a bit flipped": Fault(flip=70_000),
    "truncated": Fault(shorten=8),
    "truncated to nothing": Fault(shorten=SIZE),
    "slow": Fault(delay=0.1),
}


def wanted(name, body=None, check=None):
    body = BODIES[name] if body is None else body
    return IndexedFile(name, len(body), hashlib.sha256(body[64:]).hexdigest(), check=check)


def opened(s3, folder, **limits):
    return open_store(s3.url, CacheLimits(folder, **{"timeout": 20, **limits}), s3.options)


def read(store, name, body=None):
    with store.fetch(wanted(name, body)) as path:
        return path.read_bytes()


def left(folder):
    """What is in the cache folder but locks and users."""
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".data", ".part"))


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.005)


@contextmanager
def client(s3, folder, names, linger=False, **limits):
    """A process that fetches `names`, each line of its output the digest of a whole file, and is killed in the end."""
    lines = [[w.name, w.size, w.sha256] for w in map(wanted, names)]
    told = {"url": s3.url, "folder": str(folder), "limits": {"timeout": 20, **limits}, "options": s3.options}
    command = [sys.executable, "-c", CLIENT, json.dumps({**told, "wanted": lines, "linger": linger})]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def digests(names):
    return [hashlib.sha256(BODIES[name]).hexdigest() for name in names]


def waits_for_lock(process, folder):
    """The process has been at the lock of a file that another one fetches."""
    assert process.poll() is None
    names = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            names.add(link.readlink().name)
    return any(path.name in names for path in folder.glob("*.lock") if path.name != "folder.lock")
