"""What cannot be trained on, or gone on with, is refused in one line that says what and why: sources, mixtures, streams."""

import json
import shutil

import pytest

from datarun import events, inside, mixture, paragraphs, records, write_jsonl, write_run, write_sources
from mikoshi.data.dataset.shards import read_index


def refused(config_file, verb, *overrides):
    """The one error line of a command that must fail."""
    out = inside(config_file, verb, *overrides, code=2)
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of three sources, stopped after 12 steps of 8 rows."""
    folder = tmp_path_factory.mktemp("mixed")
    config_file = write_run(folder, folder / "data", steps=12, data={"mixture": mixture(write_sources(folder / "raw"))})
    inside(config_file, "prepare")
    inside(config_file, "train")
    return config_file


@pytest.fixture
def begun(mixed, tmp_path):
    """The same as one's own: the data where it was, the run's folder a copy."""
    shutil.copytree(mixed.parent / "runs", tmp_path / "runs")
    return lambda *overrides: (mixed, "train", f"run.folder={tmp_path}/runs", "train.steps=14", *overrides)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run.seed=2", "run.seed = 2: the run at"),
        ("data.packing=fit", "data.packing = fit: the run was begun with cut"),
        ("data.shuffle_window=1", "data.shuffle_window = 1: the run was begun with 0"),
        ("data.warmup=[[0, 16]]", "data.warmup = [[0, 16]]: the run was begun with []"),
        ("data.document_mask=false", "data.document_mask = False: the run was begun with True"),
        ("data.skip=[[8, 16]]", "data.skip = [[8, 16]]: positions before 96 are consumed already"),
        ("data.skip=[[90, 200]]", "only what begins at 96 or later can be skipped"),
        ("data.mixture.web.weight=1", 'change it from sample 96 on with data.on_change="accept"'),
        ("data.mixture.web.epochs=2", "(web at most "),
    ],
)
def test_what_would_change_the_past_is_not_gone_on_with(begun, setting, said):
    assert said in refused(*begun(setting))


def test_other_data_is_not_gone_on_with(begun, mixed):
    folder = mixed.parent
    other = (mixed, "prepare", f"data.path={folder}/other", "data.held_out=0.3", f"data.tokenizer={folder}/data/tokenizer.json")
    inside(*other)
    assert "data.mixture.web: the data is not what the run was begun with" in refused(*begun(f"data.path={folder}/other"))
    inside(mixed, "prepare", f"data.path={folder}/bytes", "data.tokenizer=bytes")
    assert "data.tokenizer: the data's tokenizer is not the one" in refused(*begun(f"data.path={folder}/bytes"))


def test_a_changed_mixture_is_accepted_once_and_recorded(begun, tmp_path):
    def resumed():
        return events(tmp_path / "run.toml", "test", "resume")[-1]["data"]

    change = ("data.mixture.web.weight=1.0", "data.mixture.code.weight=7.0")
    inside(*begun(*change, "data.on_change=accept"))
    (told,) = resumed()
    assert told.startswith("from position 96 the mixture is from 0: web 1, books 3, code 7; ")
    assert "was from 0: web 5, books 3, code 1; " in told
    inside(*begun(*change, "train.steps=15"))
    assert resumed() == [], "the same config as before: there is nothing to accept"
    assert "data.mixture: the mixture is" in refused(*begun("train.steps=16")), "nor is what it was before"
    inside(*begun(*change, "train.steps=16", "data.skip=[[128, 136]]"))
    assert resumed() == ["data.skip: [[128, 136]], was []"]
    assert "positions before 136 are consumed already, with [(128, 136)] left out" in refused(*begun(*change, "train.steps=17"))
    assert [r["step"] for r in records(tmp_path / "run.toml", "test")] == list(range(1, 17))


def in_another_order(config_file, folder, leave=()):
    """The same config with its sources named the other way round, without those in `leave`."""
    head, *tables = config_file.read_text().split("[data.mixture.")
    whole = {table.split("]")[0]: table for table in tables}
    last = list(whole)[-1]
    body, mark, rest = whole[last].partition("\n[")
    whole[last] = body
    kept = [whole[name] for name in reversed(whole) if name not in leave]
    text = head + "".join("[data.mixture." + table.rstrip("\n") + "\n\n" for table in kept) + mark.lstrip("\n") + rest
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def test_sources_named_in_another_order_are_the_same_mixture(begun, mixed, tmp_path):
    reordered = in_another_order(mixed, tmp_path)
    _, verb, *overrides = begun()
    inside(reordered, verb, *overrides)
    (resumed,) = events(reordered, "test", "resume")
    assert resumed["data"] == []
    assert [r["step"] for r in records(reordered, "test")] == list(range(1, 15))


def test_a_source_that_is_gone_or_new_is_accepted_by_name(begun, mixed, tmp_path):
    fewer = in_another_order(mixed, tmp_path, leave=("books",))
    _, verb, *overrides = begun()
    assert "data.mixture.books: a source that is gone: set it back" in refused(fewer, verb, *overrides)
    inside(fewer, verb, *overrides, "data.on_change=accept")
    inside(fewer, verb, *overrides, "train.steps=15")
    assert "data.mixture.books: a source that is new" in refused(*begun("train.steps=16"))
    inside(*begun("train.steps=16", "data.on_change=accept"))
    inside(*begun("train.steps=17"))
    assert [r["step"] for r in records(fewer, "test")] == list(range(1, 18))


def test_a_stream_whose_sources_are_reordered_gone_and_new_goes_on(mixed, tmp_path):
    def flow(config_file, steps, *overrides):
        where = (f"run.folder={tmp_path}/runs", f"data.path={tmp_path}/flow", "data.stream=true")
        return (config_file, "train", *where, f"train.steps={steps}", *overrides)

    inside(*flow(mixed, 6))
    inside(*flow(mixed, 8, "run.name=quiet"))
    reordered, whole = in_another_order(mixed, tmp_path), records(tmp_path / "run.toml", "quiet")
    inside(*flow(reordered, 8))
    told = records(reordered, "test")
    assert [r["tokens"] for r in told] == [r["tokens"] for r in whole]
    assert [r["loss"] for r in told] == pytest.approx([r["loss"] for r in whole], rel=1e-2)
    fewer = in_another_order(mixed, tmp_path, leave=("books",))
    assert "data.mixture.books: a source that is gone" in refused(*flow(fewer, 9))
    inside(*flow(fewer, 10, "data.on_change=accept"))
    inside(*flow(fewer, 12))
    inside(*flow(mixed, 13, "data.on_change=accept"))
    inside(*flow(mixed, 14))
    assert [r["step"] for r in records(tmp_path / "run.toml", "test")] == list(range(1, 15))


def epochs(share):
    return [f"data.mixture.{name}.epochs={share}" for name in ("web", "books", "code")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([*epochs(0.5), "train.steps=1000"], "are enough for 271 steps: lower it, or raise data.mixture.NAME.epochs"),
        (["data.lanes=4"], "lanes are of a stream: leave them out, or set stream = true"),
        (
            ["data.stream=true", "data.mixture.web.epochs=1"],
            "mixture.web.epochs needs prepared data: leave it out, or set stream",
        ),
        (["data.packing=fit", "data.document_mask=false"], "it needs document_mask = true"),
        (["data.packing=fit", "data.stream=true"], 'prepare the data, or set packing = "cut"'),
        (
            ["data.warmup=[[0, 48]]"],
            "from step 0 rows of train.context 64 tokens cannot be read in pieces of 48: give a divisor",
        ),
        (["data.warmup=[[5, 32], [0, 16]]"], "warmup: its steps [5, 0] do not go up"),
        (["data.warmup=[[5, 32]]", "data.document_mask=false"], "it needs document_mask = true"),
        (["data.skip=[[5, 5]]"], "data.skip: [5, 5] holds no position: give [first, one past the last]"),
        ([f"data.mixture.{n}.weight=0" for n in ("web", "books", "code")], "every weight is 0 (web, books, code): give one"),
        (["data.mixture.web.weight=-1"], "data.mixture.web.weight = -1: input should be greater than or equal to 0"),
        (["data.mixture.web.weigth=1"], "data.mixture.web.weigth: unknown key; did you mean data.mixture.web.weight?"),
        (["data.source=raw"], "source = 'raw' and a mixture: name the source in [data.mixture.NAME]"),
        (["data.stream=true"], "is prepared data: set data.stream = false to train on it"),
        (["data.stream=true", "data.path=raw-1", "data.skip=[[3, 9]]"], "give multiples of train.global_batch 8"),
        (
            ["data.stream=true", "data.path=raw-2", "data.filters.deduplicate=true"],
            "data.filters.deduplicate needs all documents",
        ),
        (["data.stream=true", "data.path=s3://b/x"], "a stream keeps its tokenizer and held-out text in a folder"),
        (["data.path=nowhere"], "no prepared dataset at nowhere/web; make it with `mikoshi prepare CONFIG`"),
        (["data.path=s4://bucket/x"], "s4://bucket/x/web: not an address of a store: give one with s3://"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_beforehand(mixed, settings, said):
    assert said in refused(mixed, "train", "run.name=new", *settings)
    assert not (mixed.parent / "runs" / "new").exists()


def test_what_was_set_apart_for_a_stream_is_no_prepared_data(mixed):
    inside(mixed, "train", "run.name=stream", "data.stream=true", "data.path=apart")
    assert "was set apart for a stream and has no training text" in refused(mixed, "train", "run.name=new", "data.path=apart")
    file = mixed.parent / "raw" / "web" / "9.jsonl"
    write_jsonl(file, paragraphs()[:50], "body")
    try:
        more = refused(mixed, "train", "run.name=stream", "data.stream=true", "data.path=apart", "train.steps=13")
        assert "apart/web was set apart for a stream of other files or settings" in more
    finally:
        file.unlink()


@pytest.fixture
def one(tmp_path):
    (tmp_path / "raw").mkdir()
    return write_run(tmp_path, tmp_path / "data", steps=3, data={"source": str(tmp_path / "raw")})


GOOD = paragraphs()[:99]
BAD = {
    b'{"text": "cut sh': "not JSON",
    b"[1, 2]": "not an object",
    b'{"text": 5}': "no text",
    b'{"text": null}': "no text",
    b'{"txt": "y"}': "no column",
    b'{"text": "\\ud800"}': "not text",
    b'{"text": "caf\xe9"}': "not UTF-8",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_cannot_be_read_is_told_by_file_line_and_kind(one, tmp_path, line):
    file = tmp_path / "raw" / "a.jsonl"
    write_jsonl(file, GOOD)
    file.write_bytes(file.read_bytes() + line + b"\n")
    said = refused(one, "prepare")
    assert f"a.jsonl:100: {BAD[line]}: " in said
    assert 'on_invalid = "skip"' in said
    assert not (tmp_path / "data").exists()


def test_what_cannot_be_read_is_counted_and_bounded_by_number_and_share(one, tmp_path):
    file = tmp_path / "raw" / "a.jsonl"
    write_jsonl(file, GOOD)
    empty = b'{"text": ""}\n\n'
    file.write_bytes(file.read_bytes() + b"\n".join(BAD) + b"\n" + empty)
    skip = (one, "prepare", "data.on_invalid=skip")
    for most in (0, 6, 0.05):
        said = refused(*skip, f"data.max_invalid={most}")
        assert said.startswith("error: data.max_invalid")
        assert "a.jsonl:100: not JSON" in said
        assert not (tmp_path / "data").exists()
    out = inside(*skip, "data.max_invalid=0.5")
    assert f"{len(GOOD)} documents" in out
    assert "7 skipped, 1 empty" in out
    report = read_index(tmp_path / "data").report
    assert report["problems"] == {
        "not JSON": 1, "not an object": 1, "no text": 2, "no column": 1, "not text": 1, "not UTF-8": 1,
    }  # fmt: skip
    inside(*skip, "data.max_invalid=7")
    assert "data.max_invalid = 3" in refused(*skip, "data.max_invalid=3"), "of what is prepared already as well"
    assert 'data.on_invalid = "error": 7 documents were left out' in refused(one, "prepare")


def test_a_table_without_the_column_or_with_another_type(one, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "raw" / "a.parquet"
    pq.write_table(pa.table({"body": GOOD, "n": list(range(99))}), file)
    assert "a.parquet: no column: 'text' is not there; it has body, n" in refused(one, "prepare")
    assert "a.parquet:1: no text: column 'n' holds a int" in refused(one, "prepare", "data.text_column=n")
    whole = file.read_bytes()
    for damaged in (whole[:-60], whole[:80] + bytes(80) + whole[160:]):
        file.write_bytes(damaged)
        assert "a.parquet: unreadable file: not a whole Parquet file" in refused(one, "prepare", "data.text_column=body")
    file.write_bytes(b"")
    refused(one, "prepare", "data.text_column=body")


def test_sources_without_a_word(one, tmp_path):
    file = tmp_path / "raw" / "a.jsonl"
    for content, said in ((b"", "(0 skipped, 0 empty)"), (b'{"text": ""}\n' * 5, "(0 skipped, 5 empty)")):
        file.write_bytes(content)
        assert said in refused(one, "prepare")
        assert "no document of" in refused(one, "train", "data.stream=true")
    file.write_bytes(json.dumps({"text": "a"}).encode() + b"\n" + json.dumps({"text": "b"}).encode())
    inside(one, "prepare")
    assert "less than one row of 64 + 1" in refused(one, "train")


def test_ids_beyond_the_vocabulary_name_their_shard(one, tmp_path):
    write_jsonl(tmp_path / "raw" / "a.jsonl", paragraphs())
    inside(one, "prepare")
    shard = tmp_path / "data" / "train-00000.shard"
    content = bytearray(shard.read_bytes())
    for at in range(64, 64 + 200_000, 64):  # a token of every row
        content[at : at + 2] = b"\xff\xff"
    shard.write_bytes(content)
    said = refused(one, "train")
    assert "train-00000.shard: token id 65535 is beyond the vocabulary of 384" in said
    assert "prepare it again" in said


def test_a_shard_altered_in_its_place_is_noticed_on_resume(one, tmp_path):
    write_jsonl(tmp_path / "raw" / "a.jsonl", paragraphs())
    inside(one, "prepare")
    inside(one, "train")
    shard = tmp_path / "data" / "train-00000.shard"
    content = bytearray(shard.read_bytes())
    for at in range(64, 64 + 200_000, 64):
        content[at] ^= 1
    shard.write_bytes(content)
    said = refused(one, "train", "train.steps=5")
    assert "data.path: the tokens of step 3 are not those that the run consumed: a shard was altered" in said
    assert "train-00000.shard: the shard's bytes do not match its digest" in refused(one, "data verify")
