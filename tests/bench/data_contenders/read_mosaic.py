"""mosaicml-streaming: MDS shards, two streams with proportions, torch's DataLoader. It has no document masks."""

import torch
from frame import ROWS, WEIGHTS, main
from torch.utils.data import DataLoader


def library():
    """Its import brings torchvision's, which beside a CPU build of torch finds no operators and fails without their names."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    return streaming


def convert(sources, task):
    its = library()
    columns = {"tokens": f"ndarray:uint16:{task.context + 1}"}
    for source in sources:
        with its.MDSWriter(out=str(task.folder / source.name), columns=columns, size_limit=1 << 26) as out:
            for row in source.rows(task.context):
                out.write({"tokens": row.copy()})


def batches(task, start):
    its = library()
    streams = [its.Stream(local=str(task.folder / name), proportion=weight) for name, weight in WEIGHTS.items()]
    data = its.StreamingDataset(streams=streams, shuffle=True, batch_size=ROWS, num_canonical_nodes=1, shuffle_seed=1)
    if start:
        data.load_state_dict({**data.state_dict(start, from_beginning=True), "epoch": 0})
    reader = DataLoader(data, batch_size=ROWS, num_workers=0, drop_last=True)
    while True:
        for batch in reader:
            yield batch["tokens"]


if __name__ == "__main__":
    library()  # so that no clock counts it
    main(convert, batches)
