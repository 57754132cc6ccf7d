"""What a file is follows from its name, what it loses is counted, and nothing is left out or read as another thing unsaid."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mikoshi.data.errors import DataError
from mikoshi.data.prepare.prepare import Recipe, prepare
from mikoshi.data.sources.sources import SourceSpec, documents, open_source, pieces

ROWS = [{"text": f"row {number} of rivers"} for number in range(60)]
TEXTS = [row["text"] for row in ROWS]
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def read(place, target=1 << 20, **settings):
    source = open_source(SourceSpec(str(place), **settings))
    return [d for piece in pieces(source, target) for d in documents(source, piece)]


def texts(place, target=1 << 20, **settings):
    return [d.text for d in read(place, target, **settings)]


def tar(rows=ROWS):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number, row in enumerate(rows):
            entry = tarfile.TarInfo(f"d/{number:04}.text")
            entry.size = len(row["text"])
            archive.addfile(entry, io.BytesIO(row["text"].encode()))
    return data.getvalue()


def long_window(content, log):
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True, strategy=1, hash_log=10, chain_log=10)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # it does not know the size beforehand
    return frame.compress(content) + frame.flush()


def halves(pack, content=JSONL):
    return pack(content[:700]) + pack(content[700:])


PACKED = {
    "a.jsonl.GZ": halves(gzip.compress),
    "a.NDJSON.gzip": gzip.compress(JSONL),
    "a.jsonl.xz": halves(lzma.compress) + b"\0" * 8,
    "a.ndjson.bz2": halves(bz2.compress),
    "a.JSONL.Zstd": halves(zstandard.compress),
    "long.jsonl.zst": long_window(JSONL, 28) + long_window(b"", 31),
    "a.jsonlines": JSONL,
    "a.jl.gz": gzip.compress(JSONL),
    "a.ldjson": JSONL,
    "skippable.jsonl.zst": b"\x50\x2a\x4d\x18\4\0\0\0skip" + zstandard.compress(JSONL) + b"\x50\x2a\x4d\x18\0\0\0\0",
    "a.json.gz": gzip.compress(JSONL),
    "a.json": JSONL,
    "one.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.json": b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
    "pretty.json.zst": zstandard.compress(json.dumps(ROWS, indent=2).encode()),
    "a.tgz": gzip.compress(tar()),
    "a.TAR.XZ": lzma.compress(tar()),
    "a.tar.zst": zstandard.compress(tar()),
    "a.tbz2": bz2.compress(tar()),
    "a.tz2": bz2.compress(tar()),
    "a.taz": gzip.compress(tar()),
    "a.txz": lzma.compress(tar()),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_file_is_read_by_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name])
    assert texts(tmp_path) == TEXTS
    assert texts(tmp_path, 300) == TEXTS, "in small pieces as well"


@pytest.mark.parametrize(("suffix", "pack"), [("xz", lzma.compress), ("BZ2", bz2.compress), ("gz", gzip.compress)])
def test_a_packed_text_is_one_document(tmp_path, suffix, pack):
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack("été".encode()))
    assert texts(tmp_path) == ["été"]


def test_one_object_of_several_lines_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "more": {"a": [1, 2]}}, indent=2))
    assert [(d.name, d.text) for d in read(tmp_path)] == [("a.json:1", "one")]
    (tmp_path / "a.json").write_text(json.dumps({"rows": ROWS}, indent=2))
    with pytest.raises(DataError, match=r"a\.json:1: no column: 'text' is not there; it has rows"):
        read(tmp_path)


def test_a_broken_first_line_is_a_row_among_others(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": \n' + JSONL)
    found = read(tmp_path, on_invalid="skip")
    assert [d.text for d in found] == [None, *TEXTS] and found[0].name == "a.json:1"


@pytest.mark.parametrize("size", [10, 100, 70_000, 300_000])
def test_an_array_is_read_element_by_element_whatever_their_size(tmp_path, size):
    rows = [{"text": f"{number}" + "ä]},{[\\\"'" * (size // 9)} for number in range(7)]
    (tmp_path / "a.json").write_text(json.dumps([*rows, 5, {"text": None}], ensure_ascii=False))
    found = read(tmp_path, on_invalid="skip")
    assert [d.text for d in found] == [row["text"] for row in rows] + [None, None]
    assert [(d.name, d.problem) for d in found[-2:]] == [
        ("a.json:8", "not an object: the element holds a int"), ("a.json:9", "no text: column 'text' holds nothing (null)"),
    ]  # fmt: skip


ARCHIVES = {
    "a.jsonl.zip": "auto",
    "a.ZIP": "jsonl",
    "a.tlz": "auto",
    "a.7z": "auto",
    "a.csv": "auto",
    "a.tsv.gz": "auto",
    "a.parquet.gz": "auto",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_would_be_read_as_another_thing_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"text\nrow\n")
    with pytest.raises(DataError, match=rf"data\.source: {name}"):
        read(tmp_path, format=ARCHIVES[name])
    if ".csv" in name:
        assert texts(tmp_path, format="text") == ["text\nrow\n"]


BESIDE = ("README.md", "LICENSE", "dataset_infos.json", "SHA256SUMS", ".gitattributes", ".cache/a.jsonl", "plot.png", "run.py")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.tgz"])
@pytest.mark.parametrize("pattern", ["", "/**"])
def test_what_stands_beside_rows_is_left_out_and_said(tmp_path, name, pattern):
    (tmp_path / ".cache").mkdir()
    for other in BESIDE:
        (tmp_path / other).write_bytes(b'{"default": {}}')
    (tmp_path / name).write_bytes(gzip.compress(JSONL) if name == "a.json.gz" else PACKED.get(name, JSONL))
    (tmp_path / "z.txt").write_text("plain")
    source = open_source(SourceSpec(f"{tmp_path}{pattern}"))
    assert [file.name for file in source.files] == [name, "z.txt"] and texts(f"{tmp_path}{pattern}") == [*TEXTS, "plain"]
    kind = {"a.jsonl": "jsonl", "a.json.gz": "json", "a.tgz": "webdataset"}[name]
    assert source.report["read"] == {kind: 1, "text": 1}
    hidden = {} if pattern else {"hidden": 2}
    assert source.report["left_out"] == {"about the data": 4, "of no known kind": 2, **hidden}
    assert source.report["left_out_names"]["of no known kind"] == ["plot.png", "run.py"]


def test_a_card_beside_files_of_a_named_format_is_no_row(tmp_path):
    (tmp_path / "part-0").write_bytes(JSONL)
    (tmp_path / "README.md").write_text("about")
    assert texts(tmp_path, format="jsonl") == TEXTS


def test_a_folder_of_texts_is_taken_whole_and_json_among_code_is_asked_for(tmp_path):
    for name in ("README.md", "LICENSE", "a.py"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["LICENSE", "README.md", "a.py"]
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(DataError, match=r'package\.json and a\.py: .*set data\.format = "json" or "text"'):
        read(tmp_path)
    assert texts(tmp_path, format="text") == ["LICENSE", "README.md", "a.py", "{}"]
    assert texts(tmp_path / "README.md") == ["README.md"]


def test_what_tools_write_beside_texts_is_left_out_as_well(tmp_path):
    for name in ("README.md", "part-00000", "_SUCCESS", ".part-00000.crc", "dataset_info.json", "a.txt.sha256"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["README.md", "part-00000"]


def test_rows_are_data_whatever_their_file_is_called(tmp_path):
    names = ("authors.jsonl", "license.ndjson.gz", "notice.tgz", "readme.json.gz")
    for name in (*names, "README.json", "CITATION.txt", "Readme"):
        (tmp_path / name).write_bytes(tar() if name == "notice.tgz" else JSONL)
    source = open_source(SourceSpec(str(tmp_path)))
    assert tuple(file.name for file in source.files) == names
    assert source.report["left_out"] == {"about the data": 3}


def parquet(path, groups=10, **options):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=60 // groups, compression=None, **options)


def arrow(rows=ROWS, ended=True):
    data, table = io.BytesIO(), pa.Table.from_pylist(rows)
    writer = pa.ipc.new_stream(data, table.schema)
    writer.write_table(table, max_chunksize=10)
    whole = data.getvalue()
    writer.close()
    return data.getvalue() if ended else whole


def cut(content, share=0.6):
    return content[: int(len(content) * share)]


BROKEN = {
    "cut.jsonl": JSONL[:-5],
    "word.json": JSONL + b'{"text": "a", "kept": tr',
    "letter.ndjson.zst": zstandard.compress(JSONL + '{"text": "é'.encode()[:-1]),
    "a.jsonl.gz": cut(gzip.compress(JSONL, 0)),
    "a.jsonl.xz": cut(lzma.compress(JSONL)),
    "a.jsonl.bz2": cut(halves(bz2.compress), 0.9),
    "a.jsonl.zst": halves(zstandard.compress)[:-4],
    "empty.jsonl.gz": b"",
    "zeros.jsonl.zst": b"\0" * 4096,
    "a.json": json.dumps(ROWS).encode()[:-100],
    "a.tar": tar()[: 512 * 70],
    "a.tgz": gzip.compress(tar()[: 512 * 71]),
    "two.tar": tar(ROWS[:30]) + tar(ROWS[30:]),
    "a.arrow": arrow(ended=False),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_breaks_off_is_an_error_of_its_own(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=rf'{name}: unreadable file: (not|it ends) .*data\.on_broken = "skip"') as caught:
        read(tmp_path, on_invalid="skip")
    found = read(tmp_path, on_broken="skip")
    good = [d for d in found if d.text is not None]
    assert [d.text for d in good] == TEXTS[: len(good)] and found[len(good) :] == found[-1:] and found[-1].broken
    assert (f"read up to {good[-1].name}, how much is lost" if good else "none of it could be read") in str(caught.value)


def test_a_broken_row_group_counts_its_rows_and_spoils_no_other(tmp_path):
    parquet(tmp_path / "a.parquet", use_dictionary=False, write_page_checksum=True)
    whole = (tmp_path / "a.parquet").read_bytes()
    at = whole.index(b"row 20 of")
    (tmp_path / "a.parquet").write_bytes(whole[:at] + b"ROW" + whole[at + 3 :])
    with pytest.raises(DataError, match=r"a\.parquet: unreadable file: .*; rows 19 to 24 of 60 are lost .*on_broken"):
        read(tmp_path, on_invalid="skip")
    for target in (1 << 20, 100):
        found = read(tmp_path, target, on_broken="skip")
        assert [d.text for d in found] == [*TEXTS[:18], None, *TEXTS[24:]] and found[18].count == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_lost_counts_against_the_limit_and_stands_in_the_report(tmp_path, workers):
    (tmp_path / "raw").mkdir()
    parquet(tmp_path / "raw" / "a.parquet", 2, use_dictionary=False, write_page_checksum=True)
    whole = (tmp_path / "raw" / "a.parquet").read_bytes()
    (tmp_path / "raw" / "a.parquet").write_bytes(whole.replace(b"row 20 of", b"ROW 20 of"))
    (tmp_path / "raw" / "b.jsonl.gz").write_bytes(cut(gzip.compress(JSONL, 0)))
    settings = {"tokenizer": "bytes", "held_out": 0.2}

    def made(max_invalid, on_broken="skip"):
        spec = SourceSpec(str(tmp_path / "raw"), on_broken=on_broken)
        return prepare(Recipe(spec, max_invalid=max_invalid, **settings), tmp_path / "data", workers=workers)[0].report

    for most in (0.1, 30):
        with pytest.raises(DataError, match=r"max_invalid.*31"):
            made(most)
    report = made(0.4)
    assert (report["skipped"], report["problems"]) == (31, {"unreadable file": 31})
    assert [name.partition(":")[0] for name in report["broken"]] == ["a.parquet", "b.jsonl.gz"]
    assert report["read"] == report["documents"] + 31 and report["files"]["read"] == {"jsonl": 1, "parquet": 1}
    with pytest.raises(DataError, match=r'data\.on_broken = "error": files broke off .*a\.parquet'):
        made(0.4, "error")


def test_rows_of_a_file_without_the_column_are_all_counted(tmp_path):
    (tmp_path / "a.arrow").write_bytes(arrow([{"body": "x"}] * 25))
    pq.write_table(pa.table({"body": ["x"] * 25}), tmp_path / "b.parquet", row_group_size=5)
    assert [d.count for d in read(tmp_path, 50, on_invalid="skip")] == [25, 25]


def test_a_bad_last_line_that_is_whole_is_a_row_among_others(tmp_path):
    for bad in (b"bad", b"{bad}", b'{"text": "a"} more', JSONL[:-5] + b"\n"):
        (tmp_path / "a.jsonl").write_bytes(JSONL + bad)
        assert [d.broken for d in read(tmp_path, on_invalid="skip") if d.text is None] == [False]


def test_a_member_and_a_key_of_one_name_are_told_where_they_differ(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number, inner in enumerate(("outer", "inner")):
            for suffix, content in (("json", json.dumps({"text": inner})), ("text", "outer")):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content.encode()))
    (tmp_path / "a.tar").write_bytes(data.getvalue())
    found = read(tmp_path, on_invalid="skip")
    assert [d.text for d in found] == ["outer", None] and found[1].problem.startswith("twice there: 'text'")


TWICE = {
    "of the text": (["text", "text"], {}, "2 columns called 'text'"),
    "looked at by the filter": (["text", "lang", "lang"], {"where": 'lang == "x"'}, "2 columns called 'lang'"),
    "not looked at": (["text", "lang", "lang"], {}, ""),
}


@pytest.mark.parametrize("case", TWICE)
def test_columns_of_one_name_are_told_by_file_and_name(tmp_path, case):
    names, settings, said = TWICE[case]
    table = pa.Table.from_arrays([pa.array([f"{n} {name}" for n in range(9)]) for name in names], names=names)
    pq.write_table(table, tmp_path / "a.parquet")
    for name, begin in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with begin(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        if not said:
            assert texts(tmp_path / name, **settings) == [f"{n} text" for n in range(9)]
            continue
        with pytest.raises(DataError, match=rf"{name}: twice there: the file has {said}"):
            read(tmp_path / name, **settings)
        assert [d.count for d in read(tmp_path / name, on_invalid="skip", **settings)] == [9]


def test_fields_of_one_name_within_a_column_are_told(tmp_path):
    turn = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["a"]), pa.array(["b"])], ["role", "content", "content"])
    table = pa.table({"messages": pa.ListArray.from_arrays([0, 1], turn)})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow: twice there: the file has two fields called 'messages\.content'"):
        read(tmp_path, chat="chatml")


@pytest.mark.parametrize("row", ['{"text": "a", "text": "b"}', '{"text": "a", "meta": [{"k": 1, "k": 1}]}'])
def test_a_key_that_stands_twice_is_told_by_line_or_counted(tmp_path, row):
    key = "text" if '"b"' in row else "k"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first"}}\n{row}\n{{"text": "last"}}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:2: twice there: the key '{key}' stands twice in one object"):
        read(tmp_path)
    assert texts(tmp_path, on_invalid="skip") == ["first", None, "last"]
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(f'[{{"text": "first"}}, {row}, {{"text": "last"}}]')
    assert texts(tmp_path, on_invalid="skip") == ["first", None, "last"]
