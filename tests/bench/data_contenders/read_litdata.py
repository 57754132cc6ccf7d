"""litdata: token chunks, two StreamingDatasets combined by weight, its StreamingDataLoader. It has no document masks."""

import json

import torch
from frame import ROWS, WEIGHTS, main
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming import Cache

MEBIBYTE = 1 << 20


def convert(sources, task):
    for source in sources:
        item = TokensLoader(task.context + 1)
        cache = Cache(str(task.folder / source.name), chunk_bytes=64 * MEBIBYTE, item_loader=item)
        for number, row in enumerate(source.rows(task.context)):
            cache[number] = torch.from_numpy(row.copy())
        cache.done()
        cache.merge()
    reader = loader(task.folder, task.context)
    for number, _ in enumerate(reader, 1):
        if number * ROWS == task.depth:
            break
    (task.folder / "state.json").write_text(json.dumps(reader.state_dict()))


def loader(folder, context):
    parts = [
        StreamingDataset(str(folder / name), item_loader=TokensLoader(context + 1), shuffle=True, drop_last=True, seed=1)
        for name in WEIGHTS
    ]
    both = CombinedStreamingDataset(parts, seed=1, weights=list(WEIGHTS.values()), iterate_over_all=False)
    return StreamingDataLoader(both, batch_size=ROWS, num_workers=0)


def batches(task, start):
    reader = loader(task.folder, task.context)
    if start:
        state = json.loads((task.folder / "state.json").read_text())
        yielded = {int(worker): counts for worker, counts in state["num_samples_yielded"].items()}
        reader.load_state_dict({**state, "num_samples_yielded": yielded})
    while True:
        yield from (batch for batch in reader if len(batch) == ROWS)


if __name__ == "__main__":
    main(convert, batches)
