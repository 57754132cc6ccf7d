"""What every contender of the data benchmark is put through: the corpus, the clock and the questions.

A contender is a script with two functions. `convert(sources, task)` writes the corpus in its own format, with what it
needs to resume after `task.depth` samples. `batches(task, start)` yields batches without end: the token ids of ROWS rows
of `task.context` (or one more) each, as its users get them, of two sources mixed by WEIGHTS and shuffled, the first of
them the one that follows `start` consumed samples. With `task.masks`, a batch is what a step of training on packed
documents takes: labels that end with their document, and positions and document numbers that begin anew in each. Where a
library has none of these itself, they are made here from its rows, with numpy, a whole batch at a time, as its user would.

The scripts run as `convert`, `read`, `resume` or `through`; all but the first print a line of JSON.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROWS = 8
WEIGHTS = {"web": 0.7, "code": 0.3}
VOCAB, SEPARATOR = 50_000, 0
# The ids of the two sources are apart, so that a row tells where it came from.
IDS = {"web": (1, 25_000), "code": (25_000, VOCAB)}
WARM_UP = 150  # batches
IGNORED = -100


@dataclass(frozen=True)
class Task:
    folder: Path
    context: int
    depth: int
    masks: bool


@dataclass(frozen=True)
class Source:
    name: str
    tokens: np.ndarray
    ends: np.ndarray

    def documents(self):
        return np.split(self.tokens, self.ends[:-1])

    def rows(self, context):
        """Rows of context + 1 tokens, end to end."""
        whole = len(self.tokens) // (context + 1)
        return self.tokens[: whole * (context + 1)].reshape(whole, context + 1)


def make_corpus(folder, tokens):
    """Documents of log-normal length, about 600 tokens on average, each with a separator at its end."""
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        draw = np.random.default_rng([7, number])
        size = int(tokens * weight)
        ids = draw.integers(*IDS[name], size, dtype=np.uint16)
        lengths = draw.lognormal(6.0, 0.9, size // 100).astype(np.int64) + 2
        ends = np.cumsum(lengths)
        ends = np.append(ends[ends < size], size)
        ids[ends - 1] = SEPARATOR
        np.save(folder / f"{name}.tokens.npy", ids)
        np.save(folder / f"{name}.ends.npy", ends)


def read_corpus(folder):
    def loaded(name, what):
        return np.load(folder / f"{name}.{what}.npy", mmap_mode="r")

    return [Source(name, loaded(name, "tokens"), loaded(name, "ends")) for name in WEIGHTS]


def check(rows):
    """The rows are of both sources in their proportion, shuffled, and no row came twice."""
    code = np.mean([row.max() >= IDS["code"][0] for row in rows])
    if not abs(code - WEIGHTS["code"]) < 0.07:
        raise SystemExit(f"{code:.0%} of the rows are of the source that should give {WEIGHTS['code']:.0%}: not the same work")
    if len({row.tobytes() for row in rows}) < len(rows):
        raise SystemExit("a row came twice: not the same work")


def masked(batch):
    """Tokens, labels, document numbers and positions of rows of one token more than the context, int64."""
    ids = np.asarray(batch).astype(np.int64)
    tokens, labels = ids[:, :-1], ids[:, 1:].copy()
    last = tokens == SEPARATOR
    labels[last] = IGNORED
    row, begin = np.nonzero(last[:, :-1])
    begin += 1
    docs = np.zeros_like(tokens)
    docs[row, begin] = 1
    same_row = np.append(False, row[1:] == row[:-1])
    steps = np.ones_like(tokens)
    steps[:, 0] = 0
    steps[row, begin] = 1 - begin + np.where(same_row, np.append(0, begin[:-1]), 0)
    return tokens, labels, np.cumsum(docs, axis=1), np.cumsum(steps, axis=1)


def read(stream, context, seconds):
    begun = time.perf_counter()
    batch = next(stream)
    first = time.perf_counter() - begun
    rows = list(tokens_of(batch))
    for _ in range(WARM_UP):
        rows.extend(tokens_of(next(stream)))
    check(rows)
    count, wall, begun = 0, time.perf_counter(), time.process_time()
    while (used := time.process_time() - begun) < seconds or count < 20:
        batch = next(stream)
        shape = (batch[0] if isinstance(batch, tuple) else batch).shape
        if tuple(shape) not in ((ROWS, context), (ROWS, context + 1)):
            raise SystemExit(f"a batch of {shape}, where {ROWS} rows of {context} were asked for")
        count += 1
    tokens = count * ROWS * context
    return {"tokens": tokens, "cpu_seconds": used, "seconds": time.perf_counter() - wall, "first_batch": first}


def tokens_of(batch):
    return np.array(batch[0] if isinstance(batch, tuple) else batch)


def first_rows(stream):
    begun = time.perf_counter()
    batch = next(stream)
    return {"seconds": time.perf_counter() - begun, "rows": [row[:8].tolist() for row in tokens_of(batch)]}


def main(convert, batches, has_masks=False):
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["convert", "read", "resume", "through"])
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--masks", action="store_true")
    args = parser.parse_args()
    task = Task(args.folder, args.context, args.depth, args.masks)
    if args.what == "convert":
        convert(read_corpus(args.corpus), task)
        return
    stream = batches(task, args.depth if args.what == "resume" else 0)
    if args.masks and not has_masks:
        stream = map(masked, stream)
    if args.what == "read":
        print(json.dumps(read(stream, args.context, args.seconds)))
        return
    if args.what == "through":  # the rows that a run comes to which was not interrupted
        for _ in range(args.depth // ROWS):
            next(stream)
    print(json.dumps(first_rows(stream)))
