"""Hugging Face `datasets`, streaming: Arrow files, shuffled through a buffer, interleaved by probability. It has no
document masks. Its state after `depth` samples is had by reading them once, when the corpus is converted."""

import json

import numpy as np
import pyarrow as pa
from datasets import Dataset, interleave_datasets, load_dataset
from frame import ROWS, WEIGHTS, main


def convert(sources, task):
    for source in sources:
        rows = source.rows(task.context)
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), task.context + 1)
        Dataset(pa.table({"tokens": column})).save_to_disk(str(task.folder / source.name), num_shards=16)
    stream = opened(task.folder)
    rows = iter(stream.iter(batch_size=ROWS))
    for _ in range(task.depth // ROWS):
        next(rows)
    (task.folder / "state.json").write_text(json.dumps(stream.state_dict()))


def opened(folder):
    parts = []
    for name in WEIGHTS:
        files = sorted(map(str, (folder / name).glob("*.arrow")))
        part = load_dataset("arrow", data_files=files, split="train", streaming=True, cache_dir=str(folder / "cache"))
        parts.append(part.shuffle(seed=1, buffer_size=1000))
    return interleave_datasets(parts, probabilities=list(WEIGHTS.values()), seed=1).with_format("numpy")


def batches(task, start):
    stream = opened(task.folder)
    if start:
        stream.load_state_dict(json.loads((task.folder / "state.json").read_text()))
    while True:
        for batch in stream.iter(batch_size=ROWS, drop_last_batch=True):
            yield batch["tokens"]


if __name__ == "__main__":
    main(convert, batches)
