"""Real runs of the real command on every kind of data: stopped, killed and resumed on other ranks, they consume the very
same tokens and have the same losses."""

import json

import numpy as np
import pytest

from datarun import (
    assert_same_run,
    command,
    events,
    inside,
    kill_at,
    mixture,
    paragraphs,
    records,
    run,
    stop_at,
    write_jsonl,
    write_run,
    write_sources,
)
from faulty import Fault, faulty_s3
from mikoshi.data.dataset import megatron
from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.dataset.shards import TRAIN, read_index
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.prepare.prepare import Recipe, prepare
from mikoshi.data.sources.text import SourceSpec
from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.feed.feed import open_feed
from runs import VOCAB

# What becomes of a run: the ranks and layout of each start, and how it ends before the last: at a step, by TERM or KILL.
JOURNEYS = {
    "stopped on three, ended on two": [(3, [], ("stop", 13)), (2, [], None)],
    "killed on two, stopped on four, ended on three": [(2, [], ("kill", 17)), (4, [], ("stop", 24)), (3, [], None)],
    "one, then two by tensors, then two by context": [
        (1, [], ("stop", 7)), (2, ["parallel.tp=2"], ("kill", 25)), (2, ["parallel.cp=2"], None),
    ],
    "killed on three, ended on one": [(3, [], ("kill", 23)), (1, [], None)],
    "two of two kinds at once": [(4, ["parallel.tp=2"], ("stop", 12)), (4, ["parallel.cp=2", "parallel.zero=3"], None)],
}  # fmt: skip
QUICK = "killed on three, ended on one"
LONG = ("stopped on three, ended on two", "two of two kinds at once")  # what these do, the others do too


def journeys():
    marks = {QUICK: (), **dict.fromkeys(LONG, pytest.mark.soak)}
    return [pytest.param(name, marks=marks.get(name, pytest.mark.slow)) for name in JOURNEYS]


def travel(config_file, name, journey):
    for ranks, layout, end in JOURNEYS[journey]:
        if end is None and ranks == 1:
            inside(config_file, "train", f"run.name={name}")
        elif end is None:
            run(config_file, "train", f"run.name={name}", *layout, ranks=ranks)
        else:
            process = command(config_file, "train", f"run.name={name}", *layout, ranks=ranks)
            {"stop": stop_at, "kill": kill_at}[end[0]](process, config_file, name, end[1])


def mixed_run(folder, packing):
    sources = write_sources(folder / "raw")
    # What `code` gives is used up on the way, and the others go on without it.
    config_file = write_run(folder, folder / "data", data={
        "mixture": mixture(sources, code={"epochs": 0.04}), "packing": packing, "shuffle_window": 1,
        "warmup": [[0, 16], [5, 32], [15, 64]],
    })  # fmt: skip
    inside(config_file, "prepare")
    feed = open_feed(load_config(config_file))
    drawn = feed.continued(None).history.counts(40 * 8)
    assert 0 <= feed.mixture.caps["code"] - drawn["code"] <= 1, "the cap is reached, to less than a sample"
    inside(config_file, "train", "run.name=quiet")
    return config_file


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return mixed_run(tmp_path_factory.mktemp("fit"), "fit")


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return mixed_run(tmp_path_factory.mktemp("cut"), "cut")


@pytest.mark.parametrize("journey", journeys())
def test_a_mixture_goes_on_by_any_ranks_as_if_nothing_had_been(fitted, journey):
    name = f"journey-{list(JOURNEYS).index(journey)}"
    travel(fitted, name, journey)
    assert_same_run(fitted, name, "quiet")


@pytest.mark.soak
@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_mixture_of_cut_rows_goes_on_by_any_ranks(cut, journey):
    name = f"journey-{list(JOURNEYS).index(journey)}"
    travel(cut, name, journey)
    assert_same_run(cut, name, "quiet")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Raw sources, two of them with a line that is no JSON; nothing is prepared."""
    folder = tmp_path_factory.mktemp("stream")
    sources = write_sources(folder / "raw")
    for n in (0, 2):
        file = sources / "web" / f"{n}.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[:9], '{"body": "cut sh', *lines[9:]]) + "\n")
    config_file = write_run(folder, folder / "data", data={
        "mixture": mixture(sources, web={"on_invalid": "skip"}), "stream": True, "warmup": [[0, 16], [5, 64]],
    })  # fmt: skip
    out = inside(config_file, "train", "run.name=quiet")
    assert "8 lanes" in out
    return config_file


@pytest.mark.slow
@pytest.mark.parametrize("journey", journeys())
def test_a_stream_goes_on_by_any_ranks_as_if_nothing_had_been(streamed, journey):
    name = f"journey-{list(JOURNEYS).index(journey)}"
    travel(streamed, name, journey)
    assert_same_run(streamed, name, "quiet")


def test_a_broken_line_of_a_stream_ends_the_run_where_it_is_an_error(streamed):
    out = inside(streamed, "train", "run.name=strict", "data.path=strict", "data.mixture.web.on_invalid=error", code=2)
    assert "error: 0.jsonl:10: not JSON" in out


def test_a_batch_of_a_stream_is_skipped_after_a_stop(streamed):
    """A run stopped after step 10 goes on with what the next batch but one would have been."""
    inside(streamed, "train", "run.name=spike", "train.steps=10")
    inside(streamed, "train", "run.name=spike", "train.steps=12", "data.skip=[[80, 96]]")
    (resumed,) = events(streamed, "spike", "resume")
    assert "data.skip: [[80, 96]], was []" in resumed["data"]
    quiet = {r["step"]: r["tokens"] for r in records(streamed, "quiet")}
    assert [r["tokens"] for r in records(streamed, "spike")][10:] == [quiet[13], quiet[14]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset of many small shards, a config that reads it where it was made, and that run."""
    folder = tmp_path_factory.mktemp("far")
    write_jsonl(folder / "raw.jsonl", paragraphs() * 2)
    prepare(Recipe(SourceSpec(str(folder / "raw.jsonl")), vocab=VOCAB, held_out=0.1, shard_tokens=1500), folder / "data")
    assert len(read_index(folder / "data").splits[TRAIN]) > 50
    config_file = write_run(folder, folder / "data", steps=30, data={"shuffle_window": 2})
    inside(config_file, "train", "run.name=near")
    return config_file


@pytest.fixture(scope="module")
def s3(prepared):
    with faulty_s3({path.name: path.read_bytes() for path in (prepared.parent / "data").iterdir()}) as server:
        yield server


def far(s3, config_file, *overrides, cache=24_000, **how):
    """Train on the uploaded dataset, as a process that finds the store by its environment."""
    env = {
        "AWS_ENDPOINT": s3.options["endpoint"], "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }  # fmt: skip
    where = (f"data.path={s3.url}", f"data.cache.folder={config_file.parent}/cache", f"data.cache.bytes={cache}")
    return run(config_file, "train", *where, *overrides, env=env, **how)


@pytest.mark.slow
def test_a_distant_dataset_through_faults_gives_the_same_run(s3, prepared):
    faults = [Fault(status=500), Fault(send=300, cut=True), None, Fault(delay=0.2), Fault(status=503), None]
    flipped = [None, Fault(flip=700), None, Fault(send=1500, cut=True), None]  # what has no digest is told, not healed
    s3.forget()
    s3.always(lambda n: flipped[n % 5] if s3.requests[n].startswith("train") else faults[n % 6])
    far(s3, prepared, "run.name=far", ranks=2)
    assert_same_run(prepared, "far", "near")
    assert sum(file.stat().st_size for file in (prepared.parent / "cache").glob("*.data")) <= 24_000
    fetched = [name for name in s3.requests if name.startswith("train")]
    assert len(fetched) > len(set(fetched)) > 5, "more than the cache holds, some of it after a fault"


@pytest.mark.slow
def test_a_cache_that_does_not_hold_the_window_is_refused(s3, prepared):
    s3.forget()
    out = far(s3, prepared, "run.name=small", cache=13_000, code=2)
    assert "error: data.shuffle_window = 2: 2 shards of s3://bucket/sets/web" in out
    assert "data.cache.bytes is 13000" in out
    out = far(s3, prepared, "run.name=small", "data.shuffle_window=0", code=2)
    assert "error: data.shuffle_window = 0: " in out


@pytest.mark.slow
def test_an_object_that_changes_under_a_run_is_refused_by_name(s3, prepared):
    s3.forget()
    feed = open_feed(load_config(prepared, ["data.shuffle_window=1"]))
    first = feed.loader(Layout(), Layout().coordinates(0), feed.continued(None)).sampler.samples(0, 1)
    victim = prepared.parent / "data" / feed.train[""].shards[int(first.shard[0])].file
    content = victim.read_bytes()
    try:
        s3.put(victim.name, content[:-1] + bytes([content[-1] ^ 1]))
        for file in (prepared.parent / "cache").glob("*.data"):
            file.unlink()
        out = far(s3, prepared, "run.name=changed", "data.shuffle_window=1", ranks=2, code=2)
        assert f"error: s3://bucket/sets/web/{victim.name}: changed under us" in out
    finally:
        s3.put(victim.name, content)


@pytest.mark.slow
def test_a_distant_dataset_is_read_to_its_very_last_sample(s3, prepared):
    """Reading ahead asks for nothing beyond what the sources' epochs give."""
    s3.forget()
    samples = sum((shard.tokens - 1) // 64 for shard in read_index(prepared.parent / "data").splits[TRAIN])
    mixed = (f"data.mixture={{web={{path={s3.url!r}, epochs=1.0}}}}", "train.global_batch=100")
    steps = samples // 100
    out = far(s3, prepared, "run.name=whole", *mixed, f"train.steps={steps}", cache=4_000_000)
    assert f"finished {steps} steps" in out
    out = far(s3, prepared, "run.name=beyond", *mixed, f"train.steps={steps + 1}", cache=4_000_000, code=2)
    assert f"error: train.steps = {steps + 1}: the sources' epochs (web 1) are enough for {steps} steps" in out


def test_a_megatron_corpus_is_trained_on_as_it_is(prepared):
    folder = prepared.parent
    dataset = open_dataset(str(folder / "data"), CacheLimits(folder / "cache"))
    shards = [dataset.shard(info) for split in ("train", "held_out") for info in dataset.shards(split)]
    megatron.write_megatron(folder / "corpus", shards, 2)
    out = inside(prepared, "train", "run.name=bare", f"data.path={folder}/corpus", code=2)
    assert "error: data.tokenizer: missing: " in out
    assert "is a Megatron corpus: name the tokenizer that made it" in out
    named = (f"data.path={folder}/corpus", f"data.tokenizer={folder}/data/tokenizer.json")
    inside(prepared, "train", "run.name=megatron", *named, "train.steps=10")
    feed = open_feed(load_config(prepared, named))
    corpus = feed.train[""]
    tokens = np.concatenate([shard.tokens for shard in shards])
    assert np.array_equal(corpus.locate(0, 0).shard.tokens, tokens[: corpus.shards[0].tokens]), "the same ids, in their order"
    assert corpus.samples == (corpus.shards[0].tokens - 1) // 64
    losses = [r["loss"] for r in records(prepared, "megatron")]
    assert len(losses) == 10 and losses[-1] < losses[0]


def conversations(count):
    texts = paragraphs()
    out = []
    for n in range(count):
        turns = []
        for turn in range(1 + n % 3):
            turns.append({"role": "user", "content": texts[(7 * n + turn) % len(texts)][: 20 + n % 90]})
            # Letters first: white space would be one token with the line end that the template writes before it.
            turns.append({"role": "assistant", "content": "A" + texts[(11 * n + turn) % len(texts)][: 10 + n % 70]})
        out.append({"messages": turns})
    return out


def test_of_conversations_only_the_answers_are_predicted(tmp_path):
    """Every conversation is read once, and what is predicted is counted from the answers alone."""
    told = conversations(250)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "talk.jsonl").write_text("".join(json.dumps(c) + "\n" for c in told))
    config_file = write_run(tmp_path, tmp_path / "data", steps=1, data={
        "source": str(tmp_path / "raw"), "chat": "chatml", "packing": "fit",
    }, train={"context": 512}, optim={"schedule": {"warmup": 0}})  # fmt: skip
    inside(config_file, "prepare")
    feed = open_feed(load_config(config_file))
    rows = feed.train[""].samples
    # One step of all rows, each conversation shorter than a row: nothing is cut.
    inside(config_file, "train", f"train.global_batch={rows}")
    (record,) = records(config_file, "test")
    held_out = feed.datasets[""].info.splits["held_out"][0].documents
    tokenizer = feed.tokenizer
    texts = [tokenizer.decode(list(ids)) for ids in documents_of(feed.datasets[""])]
    assert len(texts) == len(told) - held_out
    answers = 0
    for conversation in told:
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation["messages"])
        if any(text == have.removesuffix("<|endoftext|>") for have in texts):
            answers += sum(
                len(tokenizer.encode(m["content"])) + 1 for m in conversation["messages"] if m["role"] == "assistant"
            )
            answers += 2  # the end of the last line, and of the document
    assert record["tokens"] == answers


def documents_of(dataset):
    for info in dataset.shards(TRAIN):
        shard = dataset.shard(info)
        yield from np.split(shard.tokens.astype(int), shard.ends.astype(int)[:-1])
