"""What `mikoshi prepare` does beside tokenizing: its speed next to the bare tokenizer's on the same texts and cores.

    python -P tests/bench/preparing.py [--bytes 256000000] [--rounds 3] [--workers 2] [--format jsonl]

Texts are the .py, .txt, .md and .rst files of this Python and its packages, again and again. Rounds alternate; figures are
medians. Bare is
tiktoken's `encode_ordinary_batch` with GPT-2's vocabulary in as many processes, its texts in memory before the clock starts.
Preparing is a whole call of `prepare`: starting its workers, reading, hashing, tokenizing, writing, syncing, the commit.
Seconds of CPU are told beside those of the clock, because a busy machine changes the latter. Ends with 1 below 0.95.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mikoshi.data.prepare.prepare import Recipe, prepare
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

BARE = """
import json, sys, time
from mikoshi.data.tokenizer.tokenizer import load_tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")][int(sys.argv[2])::int(sys.argv[3])]
encoding = load_tokenizer("gpt2")._fast.encoding
encoding.encode_ordinary("warm")
print("ready", flush=True)
sys.stdin.readline()
wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
for start in range(0, len(texts), 64):
    tokens += sum(map(len, encoding.encode_ordinary_batch(texts[start:start + 64], num_threads=1)))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, tokens]))
"""


def gather(folder: Path, size: int, kind: str) -> tuple[Path, Path, int]:
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    texts, held = [], 0
    for path in sorted({p for root in roots for p in root.rglob("*") if p.suffix in (".py", ".txt", ".md", ".rst")}):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text and len(text) < 1 << 20:
            texts.append(text)
            held += len(text.encode())
        if held >= min(size, 1 << 26):
            break
    once = len(texts)
    while held < size:
        texts.append(texts[len(texts) % once])
        held += len(texts[-1].encode())
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = lines
    if kind == "parquet":
        source = folder / "texts.parquet"
        pq.write_table(pa.table({"text": texts}), source, row_group_size=200)
    return lines, source, held


def bare(lines: Path, workers: int) -> tuple[float, float, int]:
    """Seconds of the clock until the last is done, seconds of CPU of all, tokens."""
    processes = []
    for number in range(workers):
        command = [sys.executable, "-c", BARE, str(lines), str(number), str(workers)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in processes]
    walls, cpus, tokens = zip(*results, strict=True)
    return max(walls), sum(cpus), sum(tokens)


def used() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def prepared(source: Path, workers: int) -> tuple[float, float, int]:
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), used()
        info, _ = prepare(Recipe(str(source), tokenizer="gpt2"), Path(folder) / "data", workers=workers)
        return time.perf_counter() - wall, used() - cpu, sum(map(info.tokens, info.splits)) - info.report["documents"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=256_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines, source, size = gather(Path(folder), asked.bytes, asked.format)
        load_tokenizer("gpt2")
        rounds = []
        for _ in range(asked.rounds):
            rounds.append((bare(lines, asked.workers), prepared(source, asked.workers)))
            assert rounds[-1][0][2] == rounds[-1][1][2], "not the same tokens"
    tokens = rounds[0][0][2]
    print(f"{size / 1e6:.0f} MB of text, {tokens / 1e6:.1f} M tokens, {asked.workers} workers, {asked.format}")
    ratios = {}
    for at, name in ((0, "clock"), (1, "CPU")):
        plain, ours = (statistics.median(r[which][at] for r in rounds) for which in (0, 1))
        ratios[name] = statistics.median(r[0][at] / r[1][at] for r in rounds)
        told = f"bare {tokens / plain / 1e6:.2f} M tokens/s, prepare {tokens / ours / 1e6:.2f}"
        print(f"{name:>5}: {told}, ratio {ratios[name]:.3f}")
    sys.exit(max(ratios.values()) < 0.95)


if __name__ == "__main__":
    main()
