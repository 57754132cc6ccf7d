"""Mikoshi: the loader that training reads through, with its thread, its digest of what was consumed and its mixture."""

import numpy as np
from frame import ROWS, SEPARATOR, VOCAB, WEIGHTS, main

from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.dataset.shards import TRAIN, DatasetInfo, dataset_fingerprint, write_index, write_shard
from mikoshi.data.dataset.split import open_corpus
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.loader.loader import Loader
from mikoshi.data.sampling.curriculum import MixtureRequest, new_history
from mikoshi.data.sampling.sampler import make_sampler

SHARD = 1 << 24  # tokens


def convert(sources, task):
    for source in sources:
        place = task.folder / source.name
        place.mkdir()
        documents = source.documents()
        cuts = np.searchsorted(source.ends, np.arange(SHARD, len(source.tokens), SHARD))
        parts = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(documents)], strict=True)]
        shards = [write_shard(place / f"{number:04}.shard", part, 2) for number, part in enumerate(parts)]
        splits = {TRAIN: shards}
        info = DatasetInfo(dataset_fingerprint("none", splits), "none", "none", VOCAB, SEPARATOR, splits, 0.0, {})
        write_index(place, info)


def batches(task, start):
    limits = CacheLimits(task.folder / "cache")
    corpora = [open_corpus(open_dataset(str(task.folder / name), limits), TRAIN, task.context, name=name) for name in WEIGHTS]
    history = new_history(MixtureRequest(((0, dict(WEIGHTS)),), dict.fromkeys(WEIGHTS)))
    loader = Loader(make_sampler(corpora, history, 1), ROWS, 0, 1, task.masks)
    step = start // ROWS
    loader.resume_at(step, "")
    for batch in loader.stream(step, 1 << 60):
        yield batch.tokens


if __name__ == "__main__":
    main(convert, batches, has_masks=True)
