"""The batch at step n is a function: of no rank count, no history, and of the very tokens that were prepared."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import IGNORED, Loader, evaluation_batches, open_split, read_rows
from data.prepare import Recipe, prepare
from data.shards import open_shard, read_index, write_shard
from data.tokenizer import load_tokenizer


def loader(dataset, context=32, batch=24, rank=0, world=1, seed=1, mask=True):
    split, _ = open_split(dataset, "train", context)
    return Loader(split, seed, batch, rank, world, mask)


@given(step=st.integers(0, 10**6), world=st.sampled_from([1, 2, 3, 4, 8, 12]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_ranks_rows_together_are_the_one_ranks_batch(dataset, step, world, seed):
    one = loader(dataset, seed=seed).batch(step)
    parts = [loader(dataset, seed=seed, rank=r, world=world).batch(step) for r in range(world)]
    for name in ("tokens", "labels", "docs", "positions"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(one, name))


def test_every_epoch_reads_every_sample_once_in_another_order(dataset):
    one = loader(dataset, batch=1)
    n = one.split.samples
    epochs = [[int(one.samples(g)[0]) for g in range(e * n, (e + 1) * n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n))
    assert epochs[0] != epochs[1]


def test_a_batch_across_the_end_of_an_epoch_has_both_epochs(dataset):
    one = loader(dataset, batch=24)
    n = one.split.samples
    assert n % 24, "the case needs an epoch that ends inside a batch"
    stream = np.concatenate([one.samples(s) for s in range(-(-2 * n // 24))])
    assert sorted(stream[:n]) == sorted(stream[n : 2 * n]) == list(range(n))


def test_rows_are_the_tokens_of_the_text(dataset):
    tokenizer = load_tokenizer(dataset / "tokenizer.json")
    split, info = open_split(dataset, "train", 32)
    batch = read_rows(split, np.arange(split.samples), document_mask=False)
    tokens = split.shards[0].tokens
    assert np.array_equal(batch.tokens.ravel(), tokens[: batch.tokens.size])
    assert np.array_equal(batch.labels.ravel(), tokens[1 : batch.tokens.size + 1])
    text = tokenizer.decode(tokens[: int(split.shards[0].ends[0]) - 1].tolist())
    assert text.encode() in b"".join(p.read_bytes() for p in sorted((dataset.parent / "text").iterdir()))
    assert info.separator == tokens[int(split.shards[0].ends[0]) - 1]


def test_document_masks_follow_the_document_index(tmp_path):
    documents = [np.arange(n) + 10 * i for i, n in enumerate([5, 1, 9, 30, 3, 40])]
    info = write_shard(tmp_path / "a.shard", documents, 2)
    shard = open_shard(tmp_path / "a.shard", info)
    from data.loader import Split

    split = Split((shard,), np.array([0, (len(shard.tokens) - 1) // 8]), 8)
    batch = read_rows(split, np.arange(split.samples), document_mask=True)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    inside = np.concatenate([np.arange(len(d)) for d in documents])
    for row in range(split.samples):
        at = slice(row * 8, row * 8 + 8)
        assert np.array_equal(np.diff(batch.docs[row]), (np.diff(owner[at]) > 0).astype(int))
        begins = np.maximum(row * 8, np.arange(at.start, at.stop) - inside[at])
        assert np.array_equal(batch.positions[row], np.arange(at.start, at.stop) - begins)
        crosses = owner[at] != owner[at.start + 1 : at.stop + 1]
        assert np.array_equal(batch.labels[row] == IGNORED, crosses)


def test_evaluation_rows_are_the_same_whatever_the_ranks_and_pad_at_the_end(dataset):
    split, _ = open_split(dataset, "held_out", 32)
    rows = 1 << (split.samples.bit_length())  # more than there are
    for world in (1, 2, 4):
        got = [list(evaluation_batches(split, rows, 9, r, world, False)) for r in range(world)]
        assert all(len(batches) == 1 for batches in got)
        labels = np.concatenate([batches[0].labels for batches in got])
        assert ((labels == IGNORED).all(1)).sum() == rows - split.samples
        assert np.array_equal(labels[: split.samples], read_rows(split, np.arange(split.samples), False).labels)


def test_the_stream_is_the_batches(dataset):
    one = loader(dataset)
    for step, batch in enumerate(one.stream(5, 9), 5):
        assert np.array_equal(batch.tokens, one.batch(step).tokens)
    assert list(one.stream(3, 3)) == []


def test_preparing_is_repeatable_to_the_byte_and_known_again(dataset, tmp_path):
    recipe = Recipe(str(dataset.parent / "text"), vocab=384, held_out=0.1)
    info, made = prepare(recipe, tmp_path / "again")
    assert made
    assert info.fingerprint == read_index(dataset).fingerprint
    digest = lambda folder: {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}  # noqa: E731
    assert digest(tmp_path / "again") == digest(dataset)
    assert prepare(recipe, tmp_path / "again") == (info, False)


def test_small_shards_hold_the_same_documents(dataset, tmp_path):
    info, _ = prepare(Recipe(str(dataset.parent / "text"), vocab=384, held_out=0.1, shard_tokens=5000), tmp_path / "d")
    assert len(info.splits["train"]) > 5
    whole = open_split(dataset, "train", 32)[0].shards[0].tokens
    parts = np.concatenate([s.tokens for s in open_split(tmp_path / "d", "train", 32)[0].shards])
    assert np.array_equal(whole, parts)


def test_one_long_document_is_held_out_at_its_end(dataset, tmp_path):
    text = "".join(p.read_text() for p in sorted((dataset.parent / "text").iterdir()))
    (tmp_path / "one.txt").write_text(text)
    info, _ = prepare(Recipe(str(tmp_path / "one.txt"), vocab=384, held_out=0.1), tmp_path / "d")
    tokenizer = load_tokenizer(tmp_path / "d" / "tokenizer.json")
    parts = [open_split(tmp_path / "d", name, 32)[0].shards[0].tokens for name in ("train", "held_out")]
    assert len(parts[1]) == pytest.approx(0.1 * (len(parts[0]) + len(parts[1])), rel=0.01)
    assert tokenizer.decode(np.concatenate(parts)[:-1].tolist()) == text
    assert 0 < info.unigram_nats < np.log(384) * 1.2


def test_a_long_document_is_held_out_at_its_end_also_beyond_a_shard(dataset, tmp_path):
    text = "".join(p.read_text() for p in sorted((dataset.parent / "text").iterdir()))
    (tmp_path / "one.txt").write_text(text)
    info, _ = prepare(Recipe(str(tmp_path / "one.txt"), vocab=384, held_out=0.1, shard_tokens=500), tmp_path / "d")
    assert info.tokens("held_out") == pytest.approx(0.1 * (info.tokens("train") + info.tokens("held_out")), rel=0.01)


def test_a_tokenizers_own_cutting_filling_and_special_words_are_not_applied(dataset, tmp_path):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(dataset / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "t.json"))
    tokenizer, plain = load_tokenizer(tmp_path / "t.json"), load_tokenizer(dataset / "tokenizer.json")
    texts = ["def main(): return 1", "x", "a <|endoftext|> b"]
    assert tokenizer.encode_batch(texts) == plain.encode_batch(texts) == [plain.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert tokenizer.separator not in tokenizer.encode(texts[2])
    assert tokenizer.fingerprint == plain.fingerprint


def test_the_unigram_loss_is_the_loss_of_token_frequencies():
    from data.prepare import unigram_nats

    uniform = np.full(64, 1000)
    assert unigram_nats(uniform, uniform) == pytest.approx(np.log(64))
    certain = np.array([10**9, 0])
    assert unigram_nats(certain, np.array([5, 0])) == pytest.approx(0, abs=1e-6)


def test_a_kill_while_preparing_leaves_nothing_in_the_way(dataset, tmp_path):
    stale = tmp_path / ".again.partial"
    stale.mkdir()
    (stale / "train-00000.shard").write_bytes(b"half")
    prepare(Recipe(str(dataset.parent / "text"), vocab=384, held_out=0.1), tmp_path / "again")
    assert not stale.exists()


def test_a_single_flipped_bit_of_a_shard_is_found(dataset, tmp_path):
    from data.errors import DataError
    from data.shards import verify_shard

    content = bytearray((dataset / "train-00000.shard").read_bytes())
    (tmp_path / "a.shard").write_bytes(content)
    verify_shard(tmp_path / "a.shard")
    content[4000] ^= 4
    (tmp_path / "a.shard").write_bytes(content)
    with pytest.raises(DataError, match="do not match its digest"):
        verify_shard(tmp_path / "a.shard")
