"""megatron-core: two GPTDatasets blended by weight. Loss mask and position ids follow the documents; the T x T attention
mask is left out, as kernels that mask by themselves let it. Its samples are shuffled when its index is built."""

import numpy as np
import torch
from frame import ROWS, SEPARATOR, VOCAB, WEIGHTS, main
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch.utils.data import DataLoader


class Tokenizer:
    """As much of a tokenizer as GPTDataset asks for."""

    vocab_size, eod, pad = VOCAB, SEPARATOR, VOCAB
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def convert(sources, task):
    for source in sources:
        builder = IndexedDatasetBuilder(str(task.folder / f"{source.name}.bin"), dtype=np.uint16)
        for document in source.documents():
            builder.add_document(document, [len(document)])
        builder.finalize(str(task.folder / f"{source.name}.idx"))
    with_one_rank()
    for masks in (True, False):
        samples(task.folder, task.context, masks)


def with_one_rank():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


def samples(folder, context, masks):
    rows = sum(len(np.memmap(folder / f"{name}.bin", np.uint16, "r")) for name in WEIGHTS) // context
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=context, split="1,0,0", path_to_cache=str(folder / f"cache-{context}"),
        blend=([str(folder / name) for name in WEIGHTS], list(WEIGHTS.values())), tokenizer=Tokenizer(),
        reset_position_ids=masks, reset_attention_mask=False, eod_mask_loss=masks, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, [int(rows * 0.9), 0, 0], lambda: True, config).build()[0]


def batches(task, start):
    with_one_rank()
    data = samples(task.folder, task.context, task.masks)
    while True:
        order = range(start, len(data) // ROWS * ROWS)
        reader = DataLoader(data, batch_size=ROWS, sampler=order, num_workers=0)
        for batch in reader:
            yield batch["tokens"]
        start = 0


if __name__ == "__main__":
    main(convert, batches, has_masks=True)
