"""Each document is read once, as others read it, however a source is cut, and what is broken has a name."""

import gzip
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.data.errors import DataError
from mikoshi.data.io.unpack import stream_of
from mikoshi.data.sources import json_rows as jsonrows
from mikoshi.data.sources.hub import resolve_files
from mikoshi.data.sources.json_rows import lines
from mikoshi.data.sources.sources import Document, SourceSpec, documents, open_source, pieces

TEXTS = ["first", "zweiter: äöü €", 'with\nlines\r\nand "quotes"', "a NUL \x00 in it", "2024-01-01", "", "日本語 🙂", " "]
ROWS = [{"text": text, "stars": number, "lang": "en" if number % 2 else "de"} for number, text in enumerate(TEXTS)]


def read(place, target=1 << 20, specials=(), **settings):
    source = pickle.loads(pickle.dumps(open_source(SourceSpec(str(place), **settings))))
    return [d for piece in pieces(source, target) for d in documents(source, piece, specials)]


def texts(place, **settings):
    return [d.text for d in read(place, **settings)]


def jsonl(rows=ROWS):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def tar(members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def arrow(rows=ROWS, opened=pa.ipc.new_stream, batch=3):
    data, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with opened(data, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return data.getvalue()


def parquet(rows=ROWS, group=3, **options):
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data, row_group_size=group, **options)
    return data.getvalue()


def webdataset(rows=ROWS):
    members = []
    for number, row in enumerate(rows):
        members += [(f"d/{number:04}.txt", row["text"].encode()), (f"d/{number:04}.cls", str(row["stars"]).encode())]
        members.append((f"d/{number:04}.json", json.dumps({"lang": row["lang"]}).encode()))
    return tar(members)


FILES = {
    "a.jsonl": jsonl(),
    "a.jsonl.gz": gzip.compress(jsonl()[:60]) + gzip.compress(jsonl()[60:]) + b"\0" * 99,
    "a.jsonl.zst": zstandard.compress(jsonl()[:60]) + zstandard.compress(jsonl()[60:]),
    "a.parquet": parquet(),
    "stream.arrow": arrow(),
    "file.arrow": arrow(opened=pa.ipc.new_file),
    "a.tar": webdataset(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_documents_as_hugging_face_datasets(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    column = "txt" if name == "a.tar" else "text"
    ours = read(path, column=column)
    assert [d.text for d in ours] == TEXTS
    assert [d.name for d in ours[:2]] == (
        [f"{name}:d/0000", f"{name}:d/0001"] if column == "txt" else [f"{name}:1", f"{name}:2"]
    )
    module = {"jsonl": "json", "tar": "webdataset"}.get(name.split(".")[1], name.split(".")[1])
    theirs = datasets.load_dataset(module, data_files=str(path), split="train", streaming=True)
    assert [d.text for d in ours] == [row[column] for row in theirs]


@pytest.mark.parametrize("name", FILES)
def test_a_filter_and_a_template_read_other_columns_in_every_format(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    text = "txt" if name == "a.tar" else "text"
    found = read(tmp_path / name, template=f"{{lang}}: {{{text}}}", where=f'lang == "en" and len({text}) > 0')
    kept = [f"en: {row['text']}" for row in ROWS if row["lang"] == "en" and row["text"]]
    assert [d.text for d in found if not d.dropped] == kept
    assert {(d.text, d.problem) for d in found if d.dropped} == {(None, "where")}
    assert len(found) == len(ROWS)


def test_folders_of_text_and_code_are_a_document_a_file_in_order(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "b" / ".git" / "config").write_text("hidden")
    (tmp_path / "b" / "z.py").write_text("code")
    (tmp_path / "b" / "z.md.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "b" / "x.txt.zst").write_bytes(zstandard.compress(b"packed too"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    found = [(d.name, d.text) for d in read(tmp_path)]
    assert found == [
        ("a.txt", "marked\r\n"), ("b/x.txt.zst", "packed too"), ("b/z.md.gz", "packed"), ("b/z.py", "code"),
        ("c.txt", "marked\r\n"),
    ]  # fmt: skip
    assert [(d.name, d.text) for d in read(f"file://{tmp_path}")] == found
    assert [d.name for d in read(tmp_path / "**" / "*.py")] == ["b/z.py"]
    assert [d.name for d in read(tmp_path / "[ac].txt")] == ["a.txt", "c.txt"]
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.parquet")
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"again leads to .* read already"):
        read(tmp_path)


def test_the_standard_library_is_a_source():
    source = open_source(SourceSpec("python-stdlib", on_invalid="skip"))
    cut = pieces(source, 1 << 20)
    assert sum(p.bytes for p in cut) == source.bytes and len(cut) > 10
    found = {d.name: d.text for d in documents(source, cut[0])}
    assert found["__future__.py"].startswith('"""Record of phased-in incompatible language changes.')


line = st.binary(max_size=12).map(lambda b: b.replace(b"\n", b""))


@given(st.lists(line, max_size=12), st.sampled_from([b"", b"\n"]), st.integers(1, 9))
def test_lines_come_out_whole_whatever_blocks_they_come_in(rows, end, size):
    data = b"\n".join(rows) + end
    expected = [part.removesuffix(b"\n") for part in io.BytesIO(data).readlines()]
    cut = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(lines(iter(cut))) == expected
    assert stream_of(iter(cut)).read() == data


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_anywhere_every_line_is_read_once_and_in_order(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    expected = []
    for number in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.lists(st.text(max_size=9) | st.none(), max_size=8))
        newline = data.draw(st.sampled_from(["\n", "\r\n"]))
        body = newline.join("" if row is None else json.dumps({"text": row}, ensure_ascii=False) for row in rows)
        body = data.draw(st.sampled_from(["", "\ufeff"])) + body + data.draw(st.sampled_from(["", newline]))
        (folder / f"{number}.jsonl").write_bytes(body.encode())
        expected += [row for row in rows if row is not None]
    target = data.draw(st.integers(1, 80))
    source = open_source(SourceSpec(str(folder)))
    cut = pieces(source, target)
    assert sum(p.bytes for p in cut) == source.bytes
    assert [p.number for p in cut] == list(range(len(cut)))
    assert all(p.bytes <= target for p in cut)
    assert [d.text for p in cut for d in documents(source, p)] == expected


def test_a_parquet_is_cut_between_row_groups_and_small_files_share_a_piece(tmp_path):
    (tmp_path / "a.parquet").write_bytes(FILES["a.parquet"])
    for number in range(20):
        (tmp_path / f"b{number:02}.txt").write_text("x" * 100)
    source = open_source(SourceSpec(str(tmp_path)))
    cut = pieces(source, 600)
    text_files = [[s.file for s in p.spans if s.file] for p in cut if p.spans[0].file]
    assert [f for files in text_files for f in files] == list(range(len(source.files)))[-sum(map(len, text_files)) :]
    assert max(map(len, text_files)) == 6 and all(p.bytes <= 600 or len(p.spans) == 1 for p in cut)
    assert [(s.start, s.stop) for p in cut for s in p.spans if s.file == 0] == [(0, 1), (1, 2), (2, 3)]
    found = [d for p in cut for d in documents(source, p)]
    assert [d.text for d in found[: len(TEXTS)]] == TEXTS
    assert [d.name for d in found[2:5]] == ["a.parquet:3", "a.parquet:4", "a.parquet:5"]
    assert sum(p.bytes for p in cut) == source.bytes


BROKEN = {
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2", "not JSON: Expecting value at character"),
    "not an object": ("a.jsonl", b'["text"]', "a.jsonl:1", "not an object: the line holds a list"),
    "no column": ("a.jsonl", b'{"body": "a", "id": 1}', "a.jsonl:1", "no column: 'text' is not there; it has body, id"),
    "a number": ("a.jsonl", b'{"text": 5}', "a.jsonl:1", "no text: column 'text' holds a int"),
    "null": ("a.jsonl", b'{"text": null}', "a.jsonl:1", "no text: column 'text' holds nothing (null)"),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1", "not UTF-8: byte 10 of the line"),
    "a surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}', "a.jsonl:1", "not text: half of a surrogate pair at character 2"),
    "deep": ("a.jsonl", b"[" * 100_000, "a.jsonl:1", "not JSON: "),
    "many digits": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl:1", "not JSON: "),
    "latin-1 file": ("a.txt", b"caf\xe9", "a.txt", "not UTF-8: byte 3"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b"")[:-3], "a.jsonl.gz", "unreadable file: not a whole gzip file"),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(b"")[:-3], "a.jsonl.zst", "unreadable file: not a whole zstd file"),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz", "unreadable file: not a whole gzip file"),
    "no zstd": ("a.txt.zst", b"plain text", "a.txt.zst", "unreadable file: not a whole zstd file"),
    "no Parquet": ("a.parquet", b"plain text, and enough of it", "a.parquet", "unreadable file: not a whole Parquet file"),
    "cut Parquet": ("a.parquet", FILES["a.parquet"][:-9], "a.parquet", "unreadable file: not a whole Parquet file"),
    "Parquet column": ("a.parquet", parquet([{"body": "a"}] * 9), "a.parquet", "no column: 'text' is not there; it has body"),
    "Parquet null": ("a.parquet", parquet([{"text": "a"}, {"text": None}]), "a.parquet:2", "no text: column 'text' holds no"),
    "Parquet type": ("a.parquet", parquet([{"text": 1.5}]), "a.parquet:1", "no text: column 'text' holds a float"),
    "cut Arrow": ("a.arrow", FILES["stream.arrow"][:-300], "a.arrow", "unreadable file: not a whole Arrow file"),
    "no Arrow": ("a.arrow", b"plain text", "a.arrow", "unreadable file: not a whole Arrow file"),
    "cut tar": ("a.tar", tar([("a.text", b"x" * 5000)])[:2000], "a.tar", "unreadable file: not a whole tar file"),
    "no tar": ("a.tar", b"plain text", "a.tar", "unreadable file: not a whole tar file"),
    "tar column": ("a.tar", tar([("a.md", b"x"), ("b.text", b"y")]), "a.tar:a", "no column: 'text' is not there; it has md"),
    "tar not UTF-8": ("a.tar", tar([("a.text", b"\xff")]), "a.tar:a", "not UTF-8: byte 0 of the member 'text'"),
    "tar twice": ("a.tar", tar([("a.text", b"x"), ("a.text", b"y")]), "a.tar:a", "twice there: the member 'text' of 'a'"),
    "tar JSON": ("a.tar", tar([("a.text", b"x"), ("a.json", b"{")]), "a.tar:a", "not JSON: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_or_left_out_by_name(tmp_path, case):
    name, content, place, problem = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    key = "on_broken" if problem.startswith("unreadable") else "on_invalid"
    assert str(caught.value).startswith(f"{place}: {problem}") and f'{key} = "skip"' in str(caught.value)
    assert "\n" not in str(caught.value)
    for target in (1 << 20, 10):
        bad = [d for d in read(tmp_path, target, **{key: "skip"}) if d.text is None]
        assert len(bad) == 1 and bad[0].problem.startswith(problem) and not bad[0].dropped


def test_the_readers_of_others_fail_where_ours_name_a_line(tmp_path):
    """Why JSON lines are read here: neither pyarrow nor `datasets` keeps dates as text, or goes past a broken line."""
    import pyarrow.json

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "2024-01-01"}\n')
    for row in (
        *pyarrow.json.read_json(path).to_pylist(),
        *datasets.load_dataset("json", data_files=str(path), split="train", streaming=True),
    ):
        assert not isinstance(row["text"], str)
    assert texts(path) == ["2024-01-01"]
    path.write_bytes(b'{"text": "a"}\n{"text":\n{"text": "b"}\n')
    with pytest.raises(ValueError):
        list(datasets.load_dataset("json", data_files=str(path), split="train", streaming=True))
    assert texts(path, on_invalid="skip") == ["a", None, "b"]


def test_one_bad_row_spoils_no_other(tmp_path):
    spoiled = pa.array([b"good", b"bad \xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": spoiled}), tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "b.arrow", pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": spoiled}))
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n{"text": "bad \xff"}\n{"text": "fine"}')
    (tmp_path / "d.tar").write_bytes(
        tar([("1.text", b"good"), ("2.text", b"bad \xff"), ("3.text", b"fine"), ("README", b"no row")])
    )
    assert texts(tmp_path, on_invalid="skip") == ["good", None, "fine"] * 4
    assert [d.text for d in read(tmp_path, where="len(text) > 0", on_invalid="skip")] == ["good", None, "fine"] * 4


def test_what_comes_before_a_break_in_a_file_is_read(tmp_path):
    rows = [{"text": f"{i} " + "".join(random.Random(i).choices("abcdefgh", k=300))} for i in range(5000)]
    for name, packed in (("a.gz", gzip.compress(jsonl(rows))), ("b.zst", zstandard.compress(jsonl(rows)))):
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        found = read(tmp_path / name, format="jsonl", on_broken="skip")
        assert 1000 < len(found) < 4000 and [d.text for d in found[:1000]] == [row["text"] for row in rows[:1000]]
        assert found[-1].text is None and found[-1].problem.startswith("unreadable file")


def test_a_broken_line_far_into_a_cut_file_has_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abcdefgh"}\n' * 500 + b"{\n" + b'{"text": "x"}\n' * 100)
    with pytest.raises(DataError, match=r"a\.jsonl:501: not JSON"):
        read(tmp_path, 1000)
    (bad,) = [d for d in read(tmp_path, 1000, on_invalid="skip") if d.text is None]
    at = int(bad.name.removeprefix("a.jsonl:byte "))
    assert (tmp_path / "a.jsonl").read_bytes()[at : at + 2] == b"{\n"


def test_flipped_bytes_in_arrow_and_parquet_never_crash(tmp_path):
    chance = random.Random(0)
    for number in range(150):
        name = chance.choice(["stream.arrow", "file.arrow", "a.parquet"])
        spoiled = bytearray(FILES[name])
        for _ in range(chance.choice([1, 4])):
            spoiled[chance.randrange(len(spoiled))] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        path = tmp_path / f"{number}.{name.rpartition('.')[2]}"
        path.write_bytes(bytes(spoiled))
        for document in read(path, chance.choice([100, 1 << 20]), on_invalid="skip", on_broken="skip"):
            assert isinstance(document, Document)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "csv"}, "format = 'csv' is not one of auto, jsonl"),
        ({"on_invalid": "ignore"}, "on_invalid = 'ignore'"),
        ({"template": "{text}", "chat": "chatml"}, "template and chat"),
        ({"source": "nowhere"}, "'nowhere' is neither a file, folder or glob"),
        ({"source": "ftp://a/b"}, "ftp:// is not known; there are s3://"),
        ({"source": "hub:a b"}, "is not a Hub name: write hub:org/name@revision"),
        ({"source": "hub:a/b@c:d/e/f"}, "is not a Hub name"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, words):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError) as caught:
        open_source(SourceSpec(**{"source": str(tmp_path), **settings}))
    assert words in str(caught.value)


def test_folders_that_cannot_be_read_whole_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no files"):
        open_source(SourceSpec(str(tmp_path)))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(FILES["a.parquet"]))
    with pytest.raises(DataError, match=r"a\.parquet\.gz cannot be read while it is compressed"):
        open_source(SourceSpec(str(tmp_path)))
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match="gone cannot be read"):
        open_source(SourceSpec(str(tmp_path)))


def test_a_file_that_shrinks_or_goes_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl() * 2)
    source = open_source(SourceSpec(str(tmp_path)))
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        list(documents(source, pieces(source, 1 << 20)[0]))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        list(documents(source, pieces(source, 1 << 20)[0]))


def test_what_a_source_is_made_of_is_told_with_the_template(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    assert open_source(SourceSpec(str(tmp_path / "*.jsonl"))).describe() == [("a.jsonl", len(jsonl()))]
    one = open_source(SourceSpec(str(tmp_path / "*.jsonl"), chat=str(tmp_path / "t.jinja"))).describe()
    (tmp_path / "t.jinja").write_text("{{ messages[1].content }}")
    two = open_source(SourceSpec(str(tmp_path / "*.jsonl"), chat=str(tmp_path / "t.jinja"))).describe()
    assert one[0] == two[0] and one[1] != two[1]


def test_a_long_line_is_not_read_again_by_every_piece_that_it_crosses(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 20_000_000 + b'"}\n' + jsonl())
    read_bytes = []
    plain = jsonrows.blocks

    def counted(*arguments):
        for block in plain(*arguments):
            read_bytes.append(len(block))
            yield block

    monkeypatch.setattr(jsonrows, "blocks", counted)
    assert [d.text for d in read(tmp_path, 1 << 20)][1:] == TEXTS
    assert sum(read_bytes) < 2 * 20_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_a_document_of_100_mb_takes_a_few_times_its_size(tmp_path, name):
    text = "0123456789abcdef\n" * (100_000_000 // 17)
    rows = [{"text": "before"}, {"text": text}, {"text": "after"}]
    content = {"a.txt": text.encode(), "a.parquet": parquet(rows)}.get(name) or jsonl(rows)
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    source = open_source(SourceSpec(str(tmp_path)))
    del rows, content
    tracemalloc.start()
    sizes = [len(d.text) for piece in pieces(source, 1 << 20) for d in documents(source, piece)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == ([len(text)] if name == "a.txt" else [6, len(text), 5])
    assert peak < 6 * len(text)


@pytest.fixture(scope="module")
def store():
    """An S3 server with a bucket, in this process."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        client = boto3.client("s3", endpoint_url=address)
        client.create_bucket(Bucket="corpus")
        yield client
    server.stop()


def test_a_bucket_is_read_as_the_same_files_here_are(store, tmp_path):
    for name, content in {**FILES, "deep/er/a.txt": b"some text", "deep/.hidden/b.txt": b"no"}.items():
        store.put_object(Bucket="corpus", Key=f"all/{name}", Body=content)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.tar").unlink()
    store.delete_object(Bucket="corpus", Key="all/a.tar")
    here, there = open_source(SourceSpec(str(tmp_path))), open_source(SourceSpec("s3://corpus/all"))
    assert [name.partition("#")[0] for name, _ in there.describe()] == [name for name, _ in here.describe()]
    assert [size for _, size in there.describe()] == [size for _, size in here.describe()]
    assert all(len(name.partition("#")[2]) == 32 for name, _ in there.describe())
    for target in (1 << 20, 100):
        assert read("s3://corpus/all", target) == read(tmp_path, target)
    assert [d.name for d in read("s3://corpus/all/*.jsonl*")][:: len(TEXTS)] == ["a.jsonl:1", "a.jsonl.gz:1", "a.jsonl.zst:1"]
    assert texts("s3://corpus/all/**/*.txt") == ["some text"]
    assert texts("s3://corpus/all/a.parquet") == TEXTS


def test_a_bucket_that_is_not_there_or_changes_is_told(store):
    for where in ("s3://nowhere/a", "s3://corpus/nothing-here", "s3://corpus/none/*.txt"):
        with pytest.raises(DataError, match=where.replace("*", r"\*")) as caught:
            open_source(SourceSpec(where))
        assert "\n" not in str(caught.value)
    store.put_object(Bucket="corpus", Key="goes/a.txt", Body=b"text")
    source = open_source(SourceSpec("s3://corpus/goes"))
    store.delete_object(Bucket="corpus", Key="goes/a.txt")
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        list(documents(source, pieces(source, 100)[0]))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_cannot_be_reached_is_told_at_once_with_the_way_out(offline):
    code = "from mikoshi.data.sources.sources import *; open_source(SourceSpec('hub:org/name@main:train'))"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert "'hub:org/name@main:train': the Hub cannot be reached" in last
    assert "give their folder as source" in last


def test_files_of_a_dataset_are_found_as_datasets_finds_them(tmp_path):
    """A Hub dataset resolves by the same code as a folder of the same files; the Hub itself is out of reach here."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: data/tr-*\n"
        "  - split: test\n    path: data/te-*\n- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    (tmp_path / "data").mkdir()
    for name in ("tr-0", "tr-1", "te-0"):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(FILES["a.parquet"])
    (tmp_path / "two.jsonl").write_bytes(jsonl())
    found, kind = resolve_files(str(tmp_path), None, "one", "train", "hub:x")
    assert ([f.name for f in found], kind) == (["tr-0.parquet", "tr-1.parquet"], "auto")
    found, kind = resolve_files(str(tmp_path), None, "two", "train", "hub:x")
    assert ([f.name for f in found], kind) == (["two.jsonl"], "jsonl")
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        resolve_files(str(tmp_path), None, "one", "dev", "hub:x")
    with pytest.raises(DataError, match="hub:x"):
        resolve_files(str(tmp_path), None, "three", "train", "hub:x")
    (tmp_path / "README.md").unlink()
    (tmp_path / "two.jsonl").rename(tmp_path / "data" / "train.json")
    found, kind = resolve_files(str(tmp_path / "data"), None, None, "train", "hub:x")
    assert ([f.name for f in found], kind) == (["train.json"], "auto")


def test_a_dataset_that_needs_its_own_code_is_refused(tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="needs code of its own, which is not run"):
        resolve_files(str(tmp_path), None, None, "train", "hub:x")
