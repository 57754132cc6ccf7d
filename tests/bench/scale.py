"""A corpus of a million million tokens in a hundred thousand shards: what opening it, the first batch and a resume cost.

    python -P tests/bench/scale.py [--shards N] [--folder PATH]

The shards are one sparse file under many names, so that nothing of the size is really there but everything that grows with
it is: the index, the sizes that are checked, the order of all samples, and shards that are opened anew at every row. Each
figure is of a process of its own; imports are not counted in the time, and are in the memory.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXT, BATCH, DOCUMENTS = 2048, 8, 16
TOKENS = 10_000_000
LINKS = 30_000  # names that a file may have: ext4 allows 65,000

CHILD = """
import json, resource, sys, time
from pathlib import Path
from mikoshi.data.dataset.split import open_corpus
from mikoshi.data.sampling.sampler import make_sampler
from mikoshi.data.sampling.curriculum import MixtureRequest, new_history
from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.loader.loader import Loader
from mikoshi.data.io.fetch import CacheLimits

folder, step, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
began = time.perf_counter()
corpus = open_corpus(open_dataset(folder, CacheLimits(Path(folder) / "cache")), "train", int(sys.argv[4]))
history = new_history(MixtureRequest(((0, {"": 1.0}),), {"": None}))
loader = Loader(make_sampler((corpus,), history, 1, window), int(sys.argv[5]), 0, 1, True)
opened = time.perf_counter() - began
loader.resume_at(step, "")
state = None
for batch in loader.stream(step, step + 2):
    state = state or loader.state(step + 1)
    break
first = time.perf_counter() - began
loader.replay(loader.state(step + 1), step + 1)
told = {"open": opened, "first batch": first, "shards": len(corpus.shards), "samples": corpus.samples,
        "shape": batch.tokens.shape, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "resume": time.perf_counter() - began - first}
print(json.dumps(told))
"""


def make(folder, shards, tokens=TOKENS):
    """The corpus: an index of so many shards, and a few sparse files under as many names."""
    from mikoshi.data.dataset.shards import (
        HEADER_BYTES,
        MAGIC,
        VERSION,
        DatasetInfo,
        ShardInfo,
        dataset_fingerprint,
        write_index,
    )

    folder.mkdir(parents=True)
    size = HEADER_BYTES + 2 * tokens + 8 * DOCUMENTS
    ends = [tokens // DOCUMENTS * n for n in range(1, DOCUMENTS)] + [tokens]
    infos = []
    for number in range(shards):
        path = folder / f"train-{number:06d}.shard"
        if number % LINKS == 0:
            one = path
            with path.open("wb") as out:
                out.write(struct.pack("<8sIHHQQ32s", MAGIC, VERSION, 2, 0, tokens, DOCUMENTS, b"\0" * 32))
                out.truncate(size)
                out.seek(size - 8 * DOCUMENTS)
                out.write(struct.pack(f"<{DOCUMENTS}Q", *ends))
        else:
            path.hardlink_to(one)
        infos.append(ShardInfo(path.name, tokens, DOCUMENTS, size, "00" * 32))
    splits = {"train": infos}
    write_index(folder, DatasetInfo(dataset_fingerprint("t", splits), "r", "t", 50_000, 0, splits, 1.0, {}))


def measure(folder, step, window):
    command = [sys.executable, "-P", "-c", CHILD, str(folder), str(step), str(window), str(CONTEXT), str(BATCH)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where to make it (default: a temporary folder)")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        began = time.perf_counter()
        make(root / "corpus", args.shards)
        print(f"{args.shards:,} shards, {args.shards * TOKENS:,} tokens (made in {time.perf_counter() - began:.0f} s)\n")
        print("| shuffled together | after | open | first batch | resume | memory |\n|---|---|---|---|---|---|")
        for window in (0, 1000):
            for step in (0, 10**9 // BATCH):
                told = [measure(root / "corpus", step, window) for _ in range(3)]
                mid = {key: sorted(t[key] for t in told)[1] for key in ("open", "first batch", "resume", "memory")}
                times = " | ".join(f"{mid[key]:.2f} s" for key in ("open", "first batch", "resume"))
                print(f"| {window or 'all'} shards | {step * BATCH:,} samples | {times} | {mid['memory'] / 1e6:.0f} MB |")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
