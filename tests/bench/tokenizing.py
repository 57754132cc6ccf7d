"""The benchmark of tokenizing: encode_batch beside bare tiktoken and bare `tokenizers` on the same texts.

    python -P tests/bench/tokenizing.py [--rounds N] [--megabytes M] [--tokenizer gpt2]

First a vocabulary that tiktoken can run, then one that stays with `tokenizers`; on one thread, then on all cores. In every
round each contender encodes all the texts, in an order that turns with the round; a ratio is that of two turns of one round.
Prints Markdown tables with the versions, the device and the commit. Ends with 1 if the median ratio of encode_arrays, which
`prepare` uses, to the faster bare backend is below 0.95, or the ids are not the same.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer as Backend

from mikoshi.data.tokenizer.merge_ranks import PATTERNS, unicode_to_bytes
from mikoshi.data.tokenizer.tokenizer import load_tokenizer, parse_tokenizer

LEAST = 0.95


def stdlib_texts(size):
    """English and code: the modules of the standard library and their documentation topics, up to `size` bytes."""
    from pydoc_data.topics import topics

    texts = [*topics.values()]
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and sum(map(len, texts)) < size:
            texts.append(path.read_text(errors="replace"))
    return [text for text in texts if text]


def bare_tiktoken(backend):
    """The same vocabulary for tiktoken, with the pattern that it has itself for GPT-2's."""
    from tiktoken_ext.openai_public import r50k_pat_str

    parts = json.loads(backend.to_str())
    special = {token["content"]: token["id"] for token in parts["added_tokens"]}
    ranks = {unicode_to_bytes(token): i for token, i in parts["model"]["vocab"].items() if token not in special}
    steps = parts["pre_tokenizer"].get("pretokenizers", [])
    pattern = steps[0]["pattern"]["Regex"] if steps else PATTERNS["gpt2"]
    pattern = r50k_pat_str if pattern == PATTERNS["gpt2"] else pattern
    return tiktoken.Encoding("bare", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def contenders(tokenizer, texts):
    """What each does with a number of threads; all hand back one sequence of ids a text."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True

    def hugging_face(threads):
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        return [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]

    found = {
        "Mikoshi, arrays": lambda threads: tokenizer.encode_arrays(texts, threads),
        "Mikoshi, lists": lambda threads: tokenizer.encode_batch(texts, threads),
        "bare `tokenizers`": hugging_face,
    }
    if tokenizer.backend_name == "tiktoken":
        encoding = bare_tiktoken(backend)
        found["bare tiktoken"] = lambda threads: encoding.encode_ordinary_batch(texts, num_threads=threads)
    return found


def measure(runs, threads, rounds):
    """Seconds of each by round: of CPU with one thread, which what else the machine does hardly changes, else of the clock."""
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begun = clock()
            runs[name](threads)
            seconds[name].append(clock() - begun)
    return seconds


def table(seconds, threads, tokens, characters):
    of = f"{'seconds of CPU' if threads == 1 else 'seconds'}, medians of {len(seconds['Mikoshi, arrays'])} rounds"
    print(f"\n{threads} thread(s), {of}; in brackets, half of the ratios:\n")
    print("| | tokens/s | MB/s | arrays beside it | lists beside it |\n|---|---|---|---|---|")
    worst = {}
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        told = ""
        if name.startswith("bare"):
            for ours in ("Mikoshi, arrays", "Mikoshi, lists"):
                low, ratio, high = statistics.quantiles(a / b for a, b in zip(taken, seconds[ours], strict=True))
                told += f" {ratio:.2f}x ({low:.2f}x to {high:.2f}x) |"
                worst[ours] = min(ratio, worst.get(ours, ratio))
        print(f"| {name} | {tokens / middle:,.0f} | {characters / middle / 1e6:.1f} |{told or ' | |'}")
    return worst["Mikoshi, arrays"]


def machine():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tiktoken", "tokenizers"))
    commit = "unknown"
    if shutil.which("git"):
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or commit
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; {versions}; commit {commit}"


def race(called, tokenizer, texts, rounds):
    begun = time.perf_counter()
    name = tokenizer.backend_name
    print(f"\n{called}, by {name}: found in {time.perf_counter() - begun:.2f} s; {len(texts)} texts")
    runs = contenders(tokenizer, texts)
    found = {name: [list(ids) for ids in run(1)] for name, run in runs.items()}  # and warm
    if any(ids != found["Mikoshi, lists"] for ids in found.values()):
        raise SystemExit("the ids are not the same: not the same work")
    tokens, characters = sum(map(len, found["Mikoshi, lists"])), sum(map(len, texts))
    del found
    return min(table(measure(runs, n, rounds), n, tokens, characters) for n in sorted({1, os.cpu_count() or 1}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--tokenizer", default="gpt2")
    arguments = parser.parse_args()
    print(machine())
    tokenizer = load_tokenizer(arguments.tokenizer)
    texts = stdlib_texts(arguments.megabytes * 1e6)
    worst = race(arguments.tokenizer, tokenizer, texts, arguments.rounds)
    # The same with a normalizer, which leaves it to `tokenizers`: five times slower, so fewer texts.
    parts = json.loads(tokenizer.backend.to_str()) | {"normalizer": {"type": "NFC"}}
    slow = parse_tokenizer(json.dumps(parts).encode(), "with NFC")
    worst = min(worst, race(f"{arguments.tokenizer} with NFC", slow, texts[::5], arguments.rounds))
    sys.exit(f"{worst:.2f}x of a bare backend: below {LEAST}x" if worst < LEAST else 0)


if __name__ == "__main__":
    main()
