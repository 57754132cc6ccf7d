"""What a second request past the 95th percentile buys: `python tests/bench/hedge.py [--fetches 600]`.

Shards of 64 KiB from moto's S3 server behind a proxy that makes requests late in two ways, fetched by four threads into a
cache that holds few of them, without hedging and with it. Prints seconds a fetch and requests a fetch, as JSON lines.
"""

import argparse
import hashlib
import json
import logging
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]

from faulty import Fault, faulty_s3  # noqa: E402
from mikoshi.data.io.fetch import CacheLimits, IndexedFile, open_store  # noqa: E402

SIZE, THREADS = 65_536, 4


def spread(seed: int):
    """Every request is late by a log-normal time of median 60 ms: its 95th percentile is 0.31 s, its 99th 0.61 s."""
    late = random.Random(seed)
    return lambda _: Fault(delay=0.06 * late.lognormvariate(0, 1))


def rare(seed: int):
    """Three requests in a hundred hang for 1 s, the others take 20 ms."""
    late = random.Random(seed)
    return lambda _: Fault(delay=1.0 if late.random() < 0.03 else 0.02)


def measure(server, bodies, fetches: int, hedge: float) -> dict[str, float]:
    wanted = [IndexedFile(name, SIZE, hashlib.sha256(body[64:]).hexdigest()) for name, body in bodies.items()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        limits = CacheLimits(Path(folder), bytes=3 * THREADS * SIZE, hedge=hedge)
        with open_store(server.url, limits, server.options) as store:

            def one(n: int) -> float:
                began = time.monotonic()
                with store.fetch(wanted[n % len(wanted)]):
                    return time.monotonic() - began

            seconds = list(pool.map(one, range(fetches)))
            stats = store.stats()
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    extra = stats.requests / stats.misses - 1
    return {
        "p50": round(p50, 3),
        "p95": round(p95, 3),
        "p99": round(p99, 3),
        "worst": round(max(seconds), 3),
        "extra": round(extra, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fetches", type=int, default=600)
    fetches = parser.parse_args().fetches
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    bodies = {f"{n:03}.shard": np.random.default_rng(n).bytes(SIZE) for n in range(200)}
    with faulty_s3(bodies) as server:
        for tail in (spread, rare):
            for hedge in (0.0, 0.1):
                server.forget()
                server.always(tail(1))
                print(
                    json.dumps({"tail": tail.__name__, "hedge": hedge, **measure(server, bodies, fetches, hedge)}), flush=True
                )


if __name__ == "__main__":
    main()
