"""Straight from raw sources: the same rows whatever the ranks, gone on with at the very next one, none lost or doubled."""

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.data.dataset.rows import IGNORED
from mikoshi.data.errors import DataError
from mikoshi.data.loader import lanes as rooms
from mikoshi.data.loader import prefetch
from mikoshi.data.loader.lanes import Lane, Stream
from mikoshi.data.loader.stream import StreamLoader
from mikoshi.data.prepare.piece import Selection, is_held_out, text_digest
from mikoshi.data.prepare.quality import Filters
from mikoshi.data.sampling.curriculum import MixtureRequest, new_history
from mikoshi.data.sampling.sampler import make_skips
from mikoshi.data.sources.sources import SourceSpec, open_source, pieces
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

CONTEXT, BATCH, LANES = 16, 24, 6
SHARE = 0.1


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two sources of some files each, every document of all of them another."""
    root = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(3)
    for name, files in (("a", 9), ("b", 7)):
        (root / name).mkdir()
        for n in range(files):
            with (root / name / f"{n}.jsonl").open("w") as out:
                for i in range(int(rng.integers(15, 40))):
                    words = " ".join(str(w) for w in rng.integers(0, 10**6, int(rng.integers(1, 12))))
                    out.write(json.dumps({"text": f"<{name}{n}-{i}> {words}"}) + "\n")
    return root


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few documents, so that rows cross many of them."""
    monkeypatch.setattr(rooms, "_BLOCK_DOCUMENTS", 5)


def stream_of(root, name, seed=1):
    source = open_source(SourceSpec(str(root / name), on_invalid="skip"))
    selection = Selection(source, Filters(), frozenset(), -1)
    return Stream(name, selection, pieces(source, 1500), 1, load_tokenizer("bytes"), SHARE, seed)


WEIGHTS = MixtureRequest(((0, {"a": 2.0, "b": 1.0}),), {"a": None, "b": None})


def loader(root, rank=0, world=1, left_out=(), seed=1, lanes=LANES):
    streams = tuple(stream_of(root, name, seed) for name in ("a", "b"))
    return StreamLoader(streams, new_history(WEIGHTS), make_skips(left_out), lanes, CONTEXT, BATCH, rank, world, True)


def steps_of(root, world, start, stop, state=None, **how):
    """Global batches of steps start..stop-1 as `world` ranks read them, and the state after them."""
    ranks = [loader(root, r, world, **how) for r in range(world)]
    if state:
        for r in ranks:
            r.replay(state, start)
    read = [list(r.stream(start, stop)) for r in ranks]
    batches = [np.concatenate([b.tokens for b in parts])[:BATCH] for parts in zip(*read, strict=True)]

    states = [r.state(stop, lambda table: table) for r in ranks]
    merged = {
        "sources": states[0]["sources"],
        "lanes": np.sum([s["lanes"] for s in states], axis=0).tolist(),
        "earlier": {
            "step": states[0]["earlier"]["step"],
            "lanes": np.sum([s["earlier"]["lanes"] for s in states], axis=0).tolist(),
        },
    }
    return batches, json.loads(json.dumps(merged))


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 12])
def test_any_ranks_read_the_same_rows_and_stand_at_the_same_place(texts, world):
    one, state = steps_of(texts, 1, 0, 7)
    many, other = steps_of(texts, world, 0, 7)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))
    assert state == other


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 6)), min_size=2, max_size=5))
@settings(max_examples=12, deadline=None)
def test_stopped_anywhere_and_gone_on_by_other_ranks_no_row_is_lost_or_doubled(texts, legs):
    at, state, found = 0, None, []
    for world, steps in legs:
        batches, state = steps_of(texts, world, at, at + steps, state)
        found += batches
        at += steps
    whole, _ = steps_of(texts, 1, 0, at)
    assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))


def test_a_lane_reads_every_document_of_its_pieces_once_and_none_that_is_held_out(texts):
    stream = stream_of(texts, "a")
    assert len(stream.pieces) >= LANES
    tokenizer, seen = stream.tokenizer, []
    per_epoch = len(stream.pieces)
    lines = [json.loads(line)["text"] for file in sorted((texts / "a").iterdir()) for line in file.read_text().splitlines()]
    kept = [t for t in lines if not is_held_out(text_digest(t), SHARE)]
    assert len(kept) < len(lines)
    lane = Lane(stream, 0, 1)  # the only lane: an epoch is all of the source
    tokens = []
    while lane.piece < 2 * per_epoch:
        tokens += lane.row(CONTEXT).shard.tokens[:-1].tolist()
    for document in np.split(np.array(tokens), np.flatnonzero(np.array(tokens) == tokenizer.separator) + 1)[:-1]:
        seen += [tokenizer.decode(document[:-1].tolist())]
    first, second = seen[: len(kept)], seen[len(kept) : 2 * len(kept)]
    assert sorted(first) == sorted(second) == sorted(kept)
    assert first != second, "another order in the next epoch"
    assert first != kept, "shuffled"


def test_lanes_share_an_epoch_out(texts):
    stream = stream_of(texts, "b")
    ordinals = sorted(lane + turn * LANES for lane in range(LANES) for turn in range(10))
    taken = [stream.unit(n)[0].number for n in ordinals[: len(stream.pieces)]]
    assert sorted(taken) == list(range(len(stream.pieces)))


def test_the_mixture_is_exact_in_a_stream(texts):
    batches, _ = steps_of(texts, 1, 0, 8)
    made = loader(texts)
    source, _ = made.mixture.locate(np.arange(8 * BATCH))
    assert abs((source == 0).sum() - 8 * BATCH * 2 / 3) < 1
    assert len(np.unique(np.concatenate(batches), axis=0)) == 8 * BATCH, "no row comes twice"


def test_documents_and_labels_are_marked_as_in_prepared_rows(texts):
    made = loader(texts)
    separator = load_tokenizer("bytes").separator
    for batch in made.stream(0, 3):
        ends = batch.tokens == separator
        assert (batch.labels[ends] == IGNORED).all(), "what follows a document is not predicted from it"
        assert (batch.labels[~ends] != IGNORED).all()
        assert np.array_equal(np.diff(batch.docs, axis=1), ends[:, :-1].astype(int))
        assert (batch.positions[:, 1:][ends[:, :-1]] == 0).all()


def test_skipped_batches_are_gone_past(texts):
    whole, _ = steps_of(texts, 1, 0, 8)
    left, _ = steps_of(texts, 2, 0, 5, left_out=[(BATCH, 2 * BATCH), (4 * BATCH, 6 * BATCH)])
    assert all(np.array_equal(a, whole[b]) for a, b in zip(left, [0, 2, 3, 6, 7], strict=True))
    with pytest.raises(DataError, match="a stream skips whole batches"):
        loader(texts, left_out=[(3, 9)])


def test_changed_files_are_noticed_on_resume(texts, tmp_path):
    import shutil

    root = tmp_path / "raw"
    shutil.copytree(texts, root)
    _, state = steps_of(root, 1, 0, 6)
    steps_of(root, 2, 6, 7, state)
    for file in (root / "a").iterdir():
        file.write_text(file.read_text().replace("0", "1"))
    with pytest.raises(DataError, match="are not those that the run consumed"):
        steps_of(root, 1, 6, 7, state)


def cell(row, column, value):
    return lambda state: state["lanes"][row].__setitem__(column, value)


HOSTILE = {
    "earlier.step of long ago": lambda s: s["earlier"].update(step=-(10**18)),
    "earlier.step that is yet to come": lambda s: s["earlier"].update(step=7),
    "earlier.step as text": lambda s: s["earlier"].update(step="4"),
    "lanes too few": lambda s: s["lanes"].pop(),
    "lanes too narrow": lambda s: s["lanes"][0].pop(),
    "lanes as text": lambda s: s.update(lanes="x"),
    "lanes in halves": cell(0, 2, 0.5),
    "lanes below zero": cell(0, 2, -1),
    "lanes beyond all pieces": cell(0, 1, 1 << 60),
    "lanes with a digest too large": cell(0, 0, 1 << 63),
    "earlier.lanes": lambda s: s["earlier"].update(lanes=[[]]),
    "sources": lambda s: s.update(sources=[1, 2]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_numbers_of_a_record_that_cannot_be_are_refused_by_name(texts, what):
    _, state = steps_of(texts, 1, 0, 6)
    HOSTILE[what](state)
    with pytest.raises(DataError, match=f"^data: the record.*{what.split()[0]}"):
        loader(texts).replay(state, 6)


@pytest.mark.parametrize("column", [1, 2, 3])
def test_a_cursor_that_no_lane_has_ends_soon(texts, column):
    _, state = steps_of(texts, 1, 0, 6)
    state["earlier"]["lanes"][0][column] = 1 << 47
    with pytest.raises(DataError, match=r"data\.source: .*(the run stands at token|not those that the run consumed)"):
        loader(texts).replay(state, 6)


def test_what_was_left_behind_reading_does_not_meddle_with_lanes_that_go_on(texts, monkeypatch):
    monkeypatch.setattr(prefetch, "_PATIENCE", 0.05)
    right, _ = steps_of(texts, 1, 0, 6)
    made, gate, stuck, real = loader(texts), threading.Event(), threading.Event(), Lane.row

    def slow(lane, context):
        if made._batch == 1:
            stuck.set()
            gate.wait(60)
        return real(lane, context)

    beginning = made._tables[0]
    monkeypatch.setattr(Lane, "row", slow)
    left = made.stream(0, 9)
    next(left)
    assert stuck.wait(30)
    left.close()
    going = threading.Thread(target=made.restart, args=(0, beginning))
    going.start()
    going.join(0.1)
    assert going.is_alive()  # it waits for the read
    gate.set()
    going.join(30)
    assert not going.is_alive()
    assert [b.tokens.tolist() for b in made.stream(0, 6)] == [b.tolist() for b in right]


def test_a_stream_does_not_go_back(texts):
    made = loader(texts)
    list(made.stream(0, 3))
    with pytest.raises(DataError, match="goes on with step 3, not 9"):
        made.read(9)


def test_a_source_of_which_nothing_can_be_used_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text("\n".join(json.dumps({"text": ""}) for _ in range(9)))
    lane = Lane(stream_of(tmp_path, "a"), 0, 1)
    with pytest.raises(DataError, match="every piece is empty"):
        lane.row(CONTEXT)


def test_what_is_left_out_is_counted_once_whatever_the_ranks_and_stops(texts, tmp_path):
    import shutil

    root = tmp_path / "raw"
    shutil.copytree(texts, root)
    for n, file in enumerate(sorted((root / "a").iterdir())):
        lines = file.read_text().splitlines()
        for at in range(3, len(lines), 7 + n):
            lines[at] = ["not json", '{"text": ""}'][at % 2]
        file.write_text("\n".join(["{broken", *lines, "{broken too"]) + "\n")
    _, whole = steps_of(root, 1, 0, 15)
    at, state = 0, None
    for world, steps in [(2, 3), (3, 1), (1, 5), (8, 2), (4, 4)]:
        _, state = steps_of(root, world, at, at + steps, state)
        at += steps
    assert state == whole
    counts = np.array(whole["lanes"])[:, 1:].reshape(LANES, 2, -1)[:, :, 3:].sum(0)
    assert counts[0, 1] > 5, "source a has unreadable documents"
    assert counts[0, 2] > 2, "and empty ones"
    assert counts[1, 1:].tolist() == [0, 0, 0]
    lone = Lane(stream_of(root, "a"), 0, 1)
    while lone.piece < len(lone.stream.pieces):  # one epoch in one lane
        lone.row(CONTEXT)
    lines = [line for file in (root / "a").iterdir() for line in file.read_text().splitlines()]
    assert lone.left_out[1] >= sum("broken" in line or line == "not json" for line in lines) - 9
    assert lone.names
    assert all("not JSON" in name for name in lone.names)


def test_a_limit_of_unreadable_documents_holds_for_all_lanes_together(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        for n in range(8):
            rows = [json.dumps({"text": f"{name}{n}-{i} some words"}) for i in range(30)]
            (tmp_path / name / f"{n}.jsonl").write_text("\n".join([*rows[:15], "{", *rows[15:]]) + "\n")
    for most, fails in [(None, False), (1000, False), (3, True), (0.5, False), (0.01, True)]:
        made = loader(tmp_path)
        made.most_invalid = most
        list(made.stream(0, 9))
        if fails:
            with pytest.raises(DataError, match=r"data\.max_invalid = .*: \d+ of \d+ documents cannot be read: .*not JSON"):
                made.state(9, lambda table: table)
        else:
            assert made.state(9, lambda table: table)["left_out"]["unreadable"] > 3


def test_a_source_of_fewer_pieces_than_lanes_is_shared_out_by_documents(texts):
    source = open_source(SourceSpec(str(texts / "a")))
    lone = pieces(source, 1 << 30)
    assert len(lone) == 1
    stream = Stream("a", Selection(source, Filters(), frozenset(), -1), lone, 4, load_tokenizer("bytes"), SHARE, 1)
    seen = []
    for number in range(4):
        lane, tokens = Lane(stream, number, 4), []
        while lane.piece == 0:
            tokens += lane.row(CONTEXT).shard.tokens[:-1].tolist()
        seen += stream.tokenizer.decode(tokens).split("<|endoftext|>")[:-1]
    lines = [json.loads(line)["text"] for file in (texts / "a").iterdir() for line in file.read_text().splitlines()]
    kept = {t for t in lines if not is_held_out(text_digest(t), SHARE)}
    assert kept <= set(seen)
