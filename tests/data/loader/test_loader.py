"""The batch at step n is a function: of no rank count, no history, and of the very tokens that were prepared."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.dataset.rows import IGNORED, column_ranges, read_rows
from mikoshi.data.dataset.shards import DatasetInfo, dataset_fingerprint, open_shard, verify_shard, write_index, write_shard
from mikoshi.data.dataset.split import open_corpus
from mikoshi.data.errors import DataError
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.loader.loader import Loader, evaluation_batches, read_samples
from mikoshi.data.loader.resume_state import make_record, resume_from_record
from mikoshi.data.sampling.curriculum import MixtureRequest, new_history
from mikoshi.data.sampling.sampler import make_sampler, make_skips
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

FIELDS = ("tokens", "labels", "docs", "positions")


def corpus_of(folder, split="train", context=32, packing="cut", name=""):
    return open_corpus(open_dataset(str(folder), CacheLimits(Path(folder) / "cache")), split, context, packing, name)


def lone(corpora):
    return new_history(MixtureRequest(((0, {c.name: 1.0 for c in corpora}),), {c.name: None for c in corpora}))


def loader(folder, context=32, batch=24, rank=0, world=1, seed=1, mask=True, packing="cut", columns=None, window=0):
    corpora = (corpus_of(folder, context=context, packing=packing),)
    made = Loader(make_sampler(corpora, lone(corpora), seed, window), batch, rank, world, mask, columns)
    made.resume_at(0, "")
    return made


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three sources of a few shards each, every token of all of them another."""
    root, first = tmp_path_factory.mktemp("mixed"), 0
    rng = np.random.default_rng(5)
    for name, shards in (("a", 3), ("b", 5), ("c", 1)):
        (root / name).mkdir()
        infos = []
        for n in range(shards):
            documents = [np.arange(size) for size in rng.integers(2, 60, size=int(rng.integers(20, 60)))]
            documents = [d + o for d, o in zip(documents, first + np.cumsum([0, *map(len, documents)])[:-1], strict=True)]
            first += sum(map(len, documents))
            infos.append(write_shard(root / name / f"train-{n:05d}.shard", documents, 4))
        splits = {"train": infos}
        write_index(root / name, DatasetInfo(dataset_fingerprint("t", splits), "r", "t", 1 << 20, 0, splits, 1.0, {}))
    return root


ASKED = MixtureRequest(
    ((0, {"a": 5.0, "b": 2.0, "c": 1.0}), (400, {"a": 1.0, "b": 1.0, "c": 1.0})), {"a": None, "b": None, "c": 90}
)
LEFT_OUT = make_skips([(30, 41), (100, 148)])


def mixed_loader(root, rank=0, world=1, packing="cut", window=2, history=None, left_out=LEFT_OUT, batch=24, seed=3):
    history = history or new_history(ASKED)
    corpora = tuple(corpus_of(root / name, context=16, packing=packing, name=name) for name in history.requests[-1][1].names)
    course = make_sampler(corpora, history, seed, window, left_out, [(96, 4), (192, 8), (288, 16)])
    made = Loader(course, batch, rank, world, True)
    made.resume_at(0, "begin")
    return made


def equal(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS if getattr(b, f) is not None)


def joined(parts, rows):
    """The rows of all ranks, without the padding that comes after the last."""
    return [np.concatenate([getattr(p, f) for p in parts])[:rows] for f in FIELDS]


@given(step=st.integers(0, 10**6), world=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 24, 30]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_ranks_rows_together_are_the_one_ranks_batch(dataset, step, world, seed):
    one = loader(dataset, seed=seed).batch(step)
    parts = [loader(dataset, seed=seed, rank=r, world=world).batch(step) for r in range(world)]
    for found, name in zip(joined(parts, 24), FIELDS, strict=True):
        assert np.array_equal(found, getattr(one, name))
    assert len({len(p.tokens) for p in parts}) == 1
    padding = np.concatenate([p.labels for p in parts])[24:]
    assert (padding == IGNORED).all()


@given(
    step=st.integers(0, 60), world=st.sampled_from([1, 2, 3, 4, 8]), packing=st.sampled_from(["cut", "fit"]),
    window=st.sampled_from([0, 1, 2]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_so_they_are_of_any_mixture_packing_and_window(mixed, step, world, packing, window):
    one = mixed_loader(mixed, packing=packing, window=window).batch(step)
    parts = [mixed_loader(mixed, r, world, packing, window).batch(step) for r in range(world)]
    for found, name in zip(joined(parts, 24), FIELDS, strict=True):
        assert np.array_equal(found, getattr(one, name))


@given(cp=st.sampled_from([2, 4]), step=st.integers(0, 40), packing=st.sampled_from(["cut", "fit"]), mask=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_context_parallel_rank_reads_its_columns_of_the_same_rows(dataset, cp, step, packing, mask):
    mask = mask or packing == "fit"
    whole = loader(dataset, mask=mask, packing=packing).batch(step)
    chunks = np.split(np.arange(32), 2 * cp)
    for rank in range(cp):
        columns = column_ranges(np.concatenate((chunks[rank], chunks[2 * cp - 1 - rank])))
        part = loader(dataset, mask=mask, packing=packing, columns=columns).batch(step)
        assert equal(part, whole.select_columns(columns))


@pytest.mark.parametrize("window", [0, 1, 3])
def test_every_epoch_reads_every_sample_once_in_another_order(mixed, window):
    corpora = (corpus_of(mixed / "b", context=16, name="b"),)
    one = Loader(make_sampler(corpora, lone(corpora), 1, window), 1, 0, 1, True)
    n = corpora[0].samples
    epochs = []
    for e in range(2):
        samples = one.sampler.samples(e * n, (e + 1) * n)
        epochs.append(list(zip(samples.shard.tolist(), samples.row.tolist(), strict=True)))
    everything = [(s, r) for s, count in enumerate(corpora[0].counts.tolist()) for r in range(count)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    if window == 1:
        shards = [s for s, _ in epochs[0]]
        assert sum(a != b for a, b in itertools.pairwise(shards)) == len(corpora[0].counts) - 1
        assert shards[0] != next(s for s, _ in epochs[1]) or shards != [s for s, _ in epochs[1]]


def test_what_is_skipped_is_left_out_and_the_rest_stays(mixed):
    all_of_it = mixed_loader(mixed, left_out=make_skips([])).sampler.samples(0, 700)
    left = mixed_loader(mixed).sampler.samples(0, 600)
    kept = np.array([p for p in range(700) if not (30 <= p < 41 or 100 <= p < 148)])[:600]
    for name in ("position", "source", "draw", "shard", "row"):
        assert np.array_equal(getattr(left, name), getattr(all_of_it, name)[kept])
    assert make_skips([(5, 8), (8, 9), (1, 2)]).spans == ((1, 2), (5, 9))
    with pytest.raises(DataError, match="holds no position"):
        make_skips([(5, 5)])


def test_a_warm_up_cuts_attention_and_positions_and_no_label(mixed):
    made = mixed_loader(mixed)
    plain = Loader(make_sampler(made.sampler.corpora, new_history(ASKED), 3, 2, LEFT_OUT), 24, 0, 1, True)
    for step in range(16):
        warm, whole = made.batch(step), plain.batch(step)
        assert np.array_equal(warm.tokens, whole.tokens)
        assert np.array_equal(warm.labels, whole.labels)
        positions = made.samples(step).position
        for row, position in enumerate(positions.tolist()):
            piece = 4 if 96 <= position < 192 else 8 if 192 <= position < 288 else 16
            assert warm.positions[row].max() < piece
            assert (np.diff(warm.docs[row])[piece - 1 :: piece] == 1).all()
            assert (np.diff(warm.docs[row]) >= np.diff(whole.docs[row])).all()


def test_rows_are_the_tokens_of_the_text(dataset):
    tokenizer = load_tokenizer(dataset / "tokenizer.json")
    corpus = corpus_of(dataset)
    places = [corpus.locate(0, row) for row in range(int(corpus.counts[0]))]
    batch = read_rows(places, len(places), 32, document_mask=False)
    shard = places[0].shard
    assert np.array_equal(batch.tokens.ravel(), shard.tokens[: batch.tokens.size])
    assert np.array_equal(batch.labels.ravel(), shard.tokens[1 : batch.tokens.size + 1])
    text = tokenizer.decode(shard.tokens[: int(shard.ends[0]) - 1].tolist())
    assert text.encode() in b"".join(p.read_bytes() for p in sorted((dataset.parent / "text").iterdir()))
    assert corpus.info.separator == shard.tokens[int(shard.ends[0]) - 1]


def test_document_masks_follow_the_document_index(tmp_path):
    documents = [np.arange(n) + 10 * i for i, n in enumerate([5, 1, 9, 30, 3, 40])]
    info = write_shard(tmp_path / "train-00000.shard", documents, 2)
    write_index(
        tmp_path, DatasetInfo(dataset_fingerprint("t", {"train": [info]}), "r", "t", 1000, 0, {"train": [info]}, 1.0, {})
    )
    corpus = corpus_of(tmp_path, context=8)
    batch = read_rows([corpus.locate(0, r) for r in range(corpus.samples)], corpus.samples, 8, document_mask=True)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    inside = np.concatenate([np.arange(len(d)) for d in documents])
    for row in range(corpus.samples):
        at = slice(row * 8, row * 8 + 8)
        assert np.array_equal(np.diff(batch.docs[row]), (np.diff(owner[at]) > 0).astype(int))
        begins = np.maximum(row * 8, np.arange(at.start, at.stop) - inside[at])
        assert np.array_equal(batch.positions[row], np.arange(at.start, at.stop) - begins)
        crosses = owner[at] != owner[at.start + 1 : at.stop + 1]
        assert np.array_equal(batch.labels[row] == IGNORED, crosses)


def test_evaluation_rows_are_the_same_whatever_the_ranks_and_pad_at_the_end(dataset):
    corpus = corpus_of(dataset, "held_out")
    rows = 1 << (corpus.samples.bit_length())  # more than there are
    whole = read_rows([corpus.locate(0, r) for r in range(corpus.samples)], corpus.samples, 32, False)
    for world in (1, 2, 3, 4):
        got = [list(evaluation_batches(corpus, rows, 9, r, world, False)) for r in range(world)]
        assert all(len(batches) == 1 for batches in got)
        labels = np.concatenate([batches[0].labels for batches in got])
        assert ((labels == IGNORED).all(1)).sum() == len(labels) - corpus.samples
        assert np.array_equal(labels[: corpus.samples], whole.labels)


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_the_stream_is_the_batches(dataset, ahead):
    one = loader(dataset)
    for step, batch in enumerate(one.stream(5, 19, ahead=ahead), 5):
        assert equal(batch, one.batch(step))
    assert list(one.stream(3, 3)) == []


def test_what_reading_raises_is_raised_at_its_step_and_the_thread_ends(dataset):
    import threading

    one = loader(dataset)

    def ready(batch):
        if len(seen) == 3:
            raise DataError("the fourth")
        seen.append(batch)
        return batch

    seen = []
    with pytest.raises(DataError, match="the fourth"):
        list(one.stream(0, 9, ready))
    assert len(seen) == 3
    partly = one.stream(0, 9)
    next(partly)
    partly.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_a_single_flipped_bit_of_a_shard_is_found(dataset, tmp_path):
    content = bytearray((dataset / "train-00000.shard").read_bytes())
    (tmp_path / "a.shard").write_bytes(content)
    verify_shard(tmp_path / "a.shard")
    content[4000] ^= 4
    (tmp_path / "a.shard").write_bytes(content)
    with pytest.raises(DataError, match="do not match its digest"):
        verify_shard(tmp_path / "a.shard")


def test_a_shard_missing_or_cut_short_is_named_before_anything_is_read(mixed, tmp_path):
    import shutil

    folder = tmp_path / "b"
    shutil.copytree(mixed / "b", folder, ignore=shutil.ignore_patterns("fit-*", "cache"))
    shard = folder / "train-00003.shard"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-00003\.shard: the shard has \d+ bytes"):
        corpus_of(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00003\.shard: cannot read"):
        corpus_of(folder)
    shard.write_bytes(b"X" * len(whole))
    with pytest.raises(DataError, match="no header"):
        open_shard(shard)
    changed = bytearray(whole)
    changed[9] = 77
    shard.write_bytes(changed)
    with pytest.raises(DataError, match="format version"):
        open_shard(shard)


def test_ids_beyond_the_vocabulary_are_refused_by_name(tmp_path):
    info = write_shard(tmp_path / "train-00000.shard", [np.array([1, 2, 700, 3, 4, 5, 6, 7, 8, 9])], 2)
    write_index(
        tmp_path, DatasetInfo(dataset_fingerprint("t", {"train": [info]}), "r", "t", 500, 0, {"train": [info]}, 1.0, {})
    )
    with pytest.raises(DataError, match=r"train-00000\.shard: token id 700 is beyond the vocabulary of 500"):
        loader(tmp_path, context=8, batch=1).batch(0)


def identity(**changes):
    return {"run.seed": 3, "data.tokenizer": "t" * 64, "sources": {"a": "1" * 64, "b": "2" * 64, "c": "3" * 64}, **changes}


def consumed(made, steps):
    for _ in made.stream(0, steps):
        pass
    return make_record(made, steps, identity(), new_history(ASKED), lambda numbers: numbers)


def test_the_record_is_small_and_the_same_whatever_the_ranks(mixed):
    record = consumed(mixed_loader(mixed), 30)
    assert consumed(mixed_loader(mixed, 0, 3), 30) == record
    assert record["samples"] == 720
    assert record["position"] == 720 + 11 + 48
    assert len(json.dumps(record)) < 2000
    far = mixed_loader(mixed)
    far.resume_at(10**6, "x")
    assert len(json.dumps(make_record(far, 10**6, identity(), new_history(ASKED), None))) < 2000


def test_a_resumed_run_follows_its_last_steps(mixed):
    record = json.loads(json.dumps(consumed(mixed_loader(mixed), 30)))
    again = mixed_loader(mixed)
    again.replay(record["state"], 30)
    assert {k: again.state(30)[k] for k in ("digest", "content")} == {k: record["state"][k] for k in ("digest", "content")}
    for other in (
        mixed_loader(mixed, seed=4),
        mixed_loader(mixed, window=0),
        mixed_loader(mixed, left_out=make_skips([(30, 40)])),
    ):
        with pytest.raises(DataError, match="not those that the run consumed"):
            other.replay(record["state"], 30)


@pytest.mark.parametrize("step", [-1, -(10**18), 31, 10**18, 1.5, "3", True, None, [2]], ids=repr)
def test_a_record_whose_earlier_step_cannot_be_is_refused_at_once(mixed, step):
    record = consumed(mixed_loader(mixed), 30)
    record["state"]["earlier"]["step"] = step
    with pytest.raises(
        DataError, match=r"^data: the record says earlier\.step = .* no whole number from 0 to 30: .*run\.name$"
    ):
        mixed_loader(mixed).replay(record["state"], 30)


def test_nor_is_one_followed_from_longer_ago_than_a_loader_keeps(mixed):
    made = mixed_loader(mixed)
    made.resume_at(10**6, "x")
    state = made.state(10**6)
    made.replay(state, 10**6)
    with pytest.raises(DataError, match="no whole number from 998976 to 1000000"):
        made.replay({**state, "earlier": {"step": 0, "digest": "x"}}, 10**6)
    for key, value in (("digest", 7), ("earlier", {"step": 10**6, "digest": None})):
        with pytest.raises(DataError, match="is no text"):
            made.replay({**state, key: value}, 10**6)


@pytest.mark.parametrize("ahead", [1, 2, 40])
def test_what_is_written_is_never_from_longer_ago(dataset, ahead):
    made = loader(dataset)
    for step, _ in enumerate(made.stream(0, 150, ahead=ahead), 1):
        assert 0 <= step - made.state(step)["earlier"]["step"] <= 64


HOSTILE = {
    "samples": lambda r: r.update(samples=-1),
    "samples as text": lambda r: r.update(samples="720"),
    "position": lambda r: r.update(position=10**30),
    "position before the samples": lambda r: r.update(position=3),
    "skipped": lambda r: r["skipped"].append([5.5, 9]),
    "skipped backwards": lambda r: r["skipped"].append([9, 5]),
    "curriculum": lambda r: r["curriculum"][0].__setitem__(0, -(10**18)),
    "curriculum that is empty": lambda r: r["curriculum"].clear(),
    "stages": lambda r: r["curriculum"][0][1]["stages"][0].__setitem__(0, 7),
    "caps": lambda r: r["curriculum"][0][1]["caps"].update(a=1e30),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_numbers_of_a_record_that_cannot_be_are_refused_by_name(mixed, what):
    record = json.loads(json.dumps(consumed(mixed_loader(mixed), 30)))
    assert resume_from_record(record, identity(), ASKED, LEFT_OUT.spans, False).changes == ()
    HOSTILE[what](record)
    with pytest.raises(DataError, match=f"^data: the record.*{what.split()[0]}"):
        resume_from_record(record, identity(), ASKED, LEFT_OUT.spans, False)


def test_a_shard_altered_in_place_is_noticed_on_resume(mixed, tmp_path):
    import shutil

    root = tmp_path / "m"
    shutil.copytree(mixed, root, ignore=shutil.ignore_patterns("fit-*", "cache"))
    made = mixed_loader(root)
    record = consumed(made, 30)
    last = made.samples(29)
    name = "abc"[int(last.source[0])]
    shard = root / name / f"train-{int(last.shard[0]):05d}.shard"
    content = bytearray(shard.read_bytes())
    content[64 + 4 * (16 * int(last.row[0]) + 5)] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="a shard was altered"):
        mixed_loader(root).replay(record["state"], 30)


def test_what_may_not_change_is_refused_by_name_and_what_may_is_recorded(mixed):
    record = consumed(mixed_loader(mixed), 30)
    spans = LEFT_OUT.spans
    assert resume_from_record(None, identity(), ASKED, (), False).history == new_history(ASKED)
    assert resume_from_record(record, identity(), ASKED, spans, False).changes == ()
    refused = [
        (identity(**{"run.seed": 4}), ASKED, spans, "run.seed = 4: the run was begun with 3"),
        (identity(**{"data.tokenizer": "u" * 64}), ASKED, spans, r"data\.tokenizer: .*\(fingerprint uuuuuuuuuuuu"),
        (identity(sources={"a": "1" * 64, "b": "9" * 64, "c": "3" * 64}), ASKED, spans, r"data\.mixture\.b: the data is not"),
        (identity(sources={"a": "1" * 64, "b": "2" * 64}), ASKED, spans, r"data\.mixture\.c: a source that is gone"),
        (identity(), MixtureRequest(((0, {"a": 1.0, "b": 1.0, "c": 1.0}),), ASKED.caps), spans, 'data.on_change="accept"'),
        (identity(), ASKED, ((30, 41),), "consumed already"),
    ]
    for now, asked, left_out, message in refused:
        with pytest.raises(DataError, match=message):
            resume_from_record(record, now, asked, left_out, False)
    other = MixtureRequest(((0, {"a": 1.0, "b": 1.0}),), {"a": None, "b": None})
    two = identity(sources={"a": "1" * 64, "b": "2" * 64})
    continued = resume_from_record(record, two, other, (*spans, (900, 999)), True)
    assert len(continued.changes) == 2
    assert continued.history.requests[-1] == (record["position"], other)
    before, after = (
        mixed_loader(mixed, history=h, left_out=make_skips([*spans, (900, 999)]))
        for h in (new_history(ASKED), continued.history)
    )
    assert before.samples(29).digest("") == after.samples(29).digest("")
    assert set(after.samples(40).source.tolist()) == {0, 1}
    with pytest.raises(DataError, match=r"'c', which is not in the mixture any more"):
        read_samples(after.sampler, after.sampler.samples(0, 24), 24, True)


CONSUMER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[6])
from test_loader import *
root, log, world, ahead, start = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
ranks = [mixed_loader(root, r, world) for r in range(world)]
if start:
    record = json.loads((log / "record.json").read_text())
    for r in ranks:
        r.replay(record["state"], start)
for step, parts in enumerate(zip(*(r.stream(start, 10**6, ahead=ahead) for r in ranks)), start):
    rows = np.concatenate([p.tokens for p in parts])[:24]
    (log / f"{step}.tokens").write_bytes(rows.astype("<i4").tobytes())
    record = make_record(ranks[0], step + 1, identity(), new_history(ASKED), None)
    (log / ".record").write_text(json.dumps(record))
    (log / ".record").rename(log / "record.json")
"""


def killed_and_resumed(mixed, folder, kills, seed):
    """Batches as a run that is killed again and again consumed them, with other ranks and prefetch depths each time."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for kill in range(kills):
        world, ahead = int(rng.choice([1, 2, 3, 4, 8])), int(rng.choice([1, 2, 5]))
        record = folder / "record.json"
        start = json.loads(record.read_text())["samples"] // 24 if record.exists() else 0
        arguments = [str(mixed), str(folder), str(world), str(ahead), str(start), str(Path(__file__).parent)]
        child = subprocess.Popen([sys.executable, "-c", CONSUMER, *arguments], cwd=Path(__file__).parents[3])
        target = start + int(rng.integers(1, 12))
        while child.poll() is None and not (folder / f"{target}.tokens").exists():
            time.sleep(0.002)
        assert child.poll() is None, f"the consumer of kill {kill} ended by itself"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    return json.loads((folder / "record.json").read_text())["samples"] // 24


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_anywhere_and_resumed_on_other_ranks_the_tokens_are_those_of_one_rank(mixed, tmp_path, kills):
    steps = killed_and_resumed(mixed, tmp_path / "log", kills, seed=kills)
    one = mixed_loader(mixed)
    for step in range(steps):
        found = np.frombuffer((tmp_path / "log" / f"{step}.tokens").read_bytes(), "<i4").reshape(24, 16)
        assert np.array_equal(found, one.batch(step).tokens), step
