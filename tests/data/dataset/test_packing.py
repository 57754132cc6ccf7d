"""Rows fitted to documents: what best-fit decreasing gives, no document cut that fits a row, nothing lost or doubled."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.dataset.packing import best_fit_decreasing, fit_shard
from mikoshi.data.dataset.predicted import check_predicts, count_unpredicted_rows, predicts_nothing, unpredicted_share
from mikoshi.data.dataset.rows import IGNORED, read_rows
from mikoshi.data.dataset.shards import DatasetInfo, dataset_fingerprint, write_index, write_shard
from mikoshi.data.dataset.split import open_corpus
from mikoshi.data.errors import DataError


def simple_best_fit(lengths, capacity):
    """Best-fit decreasing as a textbook has it: the room left in every row."""
    rooms = []
    for i in np.argsort(-lengths, kind="stable"):
        fits = [r for r in range(len(rooms)) if rooms[r] >= lengths[i]]
        at = min(fits, key=lambda r: rooms[r], default=None)
        if at is None:
            rooms.append(capacity)
            at = len(rooms) - 1
        rooms[at] -= lengths[i]
    return sorted(rooms)


@given(st.integers(2, 60), st.data())
@settings(max_examples=150, deadline=None)
def test_the_rows_are_those_of_best_fit_decreasing(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=70)))
    rows = best_fit_decreasing(lengths, capacity)
    used = np.bincount(rows, weights=lengths)
    assert sorted((capacity - used).tolist()) == simple_best_fit(lengths, capacity)


def make(folder, documents, learned=None, shards=1):
    folder.mkdir()
    infos = []
    for n in range(shards):
        part = slice(n, None, shards)
        flags = None if learned is None else learned[part]
        infos.append(write_shard(folder / f"train-{n:05d}.shard", documents[part], 2, flags))
    splits = {"train": infos}
    write_index(folder, DatasetInfo(dataset_fingerprint("t", splits), "r", "t", 1000, 0, splits, 1.0, {}))
    return folder


def opened(folder, context, packing):
    from mikoshi.data.io.fetch import CacheLimits

    return open_corpus(open_dataset(str(folder), CacheLimits(folder / "cache")), "train", context, packing)


def all_rows(corpus):
    places = [corpus.locate(s, r) for s, count in enumerate(corpus.counts.tolist()) for r in range(count)]
    return read_rows(places, len(places), corpus.context, True)


@given(st.lists(st.integers(1, 40), min_size=3, max_size=60), st.sampled_from([8, 16, 33]), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_pair_of_neighbours_in_a_document_is_predicted_once(tmp_path_factory, lengths, context, shards):
    if sum(lengths) == len(lengths):
        return
    first = np.cumsum([0, *lengths])[:-1]
    documents = [np.arange(n) + f for n, f in zip(lengths, first, strict=True)]  # no two tokens are the same
    corpus = opened(make(tmp_path_factory.mktemp("fit") / "d", documents, shards=shards), context, "fit")
    rows = all_rows(corpus)
    predicted = rows.labels != IGNORED
    assert (rows.labels[predicted] == rows.tokens[predicted] + 1).all()
    expected = {int(t) for d in documents for t in d[:-1]}
    assert sorted(rows.tokens[predicted].tolist()) == sorted(expected)
    for row in range(len(rows.tokens)):
        for document in np.unique(rows.docs[row]):
            here = rows.docs[row] == document
            assert (rows.positions[row][here] == np.arange(here.sum())).all()
            owners = np.searchsorted(first, rows.tokens[row][here & predicted[row]], side="right")
            assert len(set(owners.tolist())) <= 1, "attention stays inside one document"
    for document in documents:
        if 1 < len(document) <= context + 1:
            at = np.isin(rows.tokens, document[:-1]) & predicted
            assert (at.any(1)).sum() == 1, "a document that fits a row is not cut"


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=4, max_size=60), st.sampled_from([8, 13]),
       st.integers(1, 3), st.booleans())  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rows_that_predict_nothing_are_counted_as_they_are_read(tmp_path_factory, documents, context, shards, flagged):
    """Of each document its length and how much of its beginning is a prompt."""
    tokens = [np.arange(1, length + 1) for length, _ in documents]
    learned = [np.arange(length) >= prompt for length, prompt in documents] if flagged else None
    if sum(length for length, _ in documents) < shards * (context + 2) or len(documents) == sum(n for n, _ in documents):
        return
    folder = make(tmp_path_factory.mktemp("nothing") / "d", tokens, learned, shards=shards)
    for packing, mask in (("cut", True), ("cut", False), ("fit", True)):
        try:
            corpus = opened(folder, context, packing)
        except DataError:  # not a row in any shard
            continue
        places = [corpus.locate(s, r) for s, count in enumerate(corpus.counts.tolist()) for r in range(count)]
        empty = (read_rows(places, len(places), context, mask).labels == IGNORED).all(1)
        assert count_unpredicted_rows(corpus, mask) == empty.sum()
        assert unpredicted_share(corpus, mask) == empty.mean()
        if packing == "cut":
            assert [predicts_nothing(place, context, mask) for place in places] == empty.tolist()
        with pytest.raises(DataError, match="nothing can be learned") if empty.all() else nullcontext():
            check_predicts(corpus, mask)


def test_a_prompt_is_read_and_not_predicted_cut_or_fitted(tmp_path):
    documents = [np.arange(1 + 20 * n, 15 + 20 * n) for n in range(8)]
    learned = [np.arange(14) >= 5 + n % 3 for n in range(8)]
    folder = make(tmp_path / "d", documents, learned)
    known = {int(t): bool(f) for d, told in zip(documents, learned, strict=True) for t, f in zip(d, told, strict=True)}
    for packing in ("cut", "fit"):
        rows = all_rows(opened(folder, 16, packing))
        told = rows.labels[rows.labels != IGNORED]
        assert len(told) > 40
        assert all(known[int(t)] for t in told)
        if packing == "fit":
            assert sorted(told.tolist()) == [t for t, f in known.items() if f]


def test_a_plan_of_other_data_or_cut_short_is_refused(tmp_path):
    folder = make(tmp_path / "d", [np.arange(n) for n in (5, 9, 30, 12)])
    assert opened(folder, 16, "fit").samples
    plan, starts = folder / "fit-16-train.json", folder / "fit-16-train.starts"
    whole, text = starts.read_bytes(), plan.read_text()
    starts.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"starts: has \d+ bytes"):
        opened(folder, 16, "fit")
    starts.write_bytes(whole)
    plan.write_text(json.dumps(json.loads(text) | {"dataset": "0" * 64}))
    with pytest.raises(DataError, match="of other data"):
        opened(folder, 16, "fit")
    plan.write_text(text[:40])
    with pytest.raises(DataError, match="damaged"):
        opened(folder, 16, "fit")


def test_fitting_a_shard_fills_rows_well():
    ends = np.cumsum(np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int) + 2)
    plan = fit_shard(ends, 1024)
    assert plan["length"].sum() / ((plan["row"][-1] + 1) * 1024) > 0.99
