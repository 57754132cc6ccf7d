"""A source is known by what its files hold: an edit of equal size counts, a touch does not, and a re-check reads little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mikoshi.data.prepare.prepare as making
import mikoshi.data.sources.contents
from mikoshi.data.dataset.shards import INDEX
from mikoshi.data.errors import DataError
from mikoshi.data.io.files import list_files
from mikoshi.data.prepare.prepare import Recipe, prepare, prepare_all
from mikoshi.data.sources.contents import SOURCES, Contents, contents_of, read_contents
from mikoshi.data.sources.sources import SourceSpec, documents, open_source, pieces
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

LONG_AGO = 1_000_000_000


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "raw" / name).write_text("".join(json.dumps({"text": f"{i} rivers of {name}"}) + "\n" for i in range(60)))
    return tmp_path / "raw"


def recipe(raw, **settings):
    return Recipe(SourceSpec(str(raw), **settings), tokenizer="bytes", held_out=0.2)


def edit(path, old="rivers", new="horses"):
    """In place, the same size, and as old as it was."""
    before = path.stat()
    with path.open("r+b") as file:
        content = file.read().replace(old.encode(), new.encode())
        file.seek(0)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_of_equal_size_is_another_source(raw, tmp_path):
    assert prepare(recipe(raw), tmp_path / "data")[1]
    assert not prepare(recipe(raw), tmp_path / "data")[1]
    edit(raw / "b.jsonl")
    with pytest.raises(DataError, match=r"holds data made from another source: b\.jsonl has changed since: remove it"):
        prepare(recipe(raw), tmp_path / "data")
    edit(raw / "b.jsonl", "horses", "rivers")
    assert not prepare(recipe(raw), tmp_path / "data")[1]


def test_so_is_an_edit_of_a_template_or_tokenizer(raw, tmp_path):
    template, tokenizer = tmp_path / "chat.jinja", tmp_path / "tokenizer.json"
    for path in raw.iterdir():
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        path.write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(20)))
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
    words = tmp_path / "words.txt"
    words.write_text(Path(json.__file__).read_text())
    making.train_shared_tokenizer({"": Recipe(SourceSpec(str(words)), vocab=300)}).save(tokenizer)

    def made():
        return prepare(Recipe(SourceSpec(str(raw), chat=str(template)), tokenizer, held_out=0.2), tmp_path / "data")[1]

    assert made() and not made()
    edit(template, "</s>", "</x>")
    with pytest.raises(DataError, match="made from another source or settings"):
        made()
    edit(template, "</x>", "</s>")
    assert not made()
    first = json.loads(tokenizer.read_text())["model"]["merges"][0]
    text = tokenizer.read_text()
    assert first
    swapped = json.loads(text)
    merges = swapped["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    tokenizer.write_text(json.dumps(swapped))
    with pytest.raises(DataError, match="made from another source or settings"):
        made()


def test_what_looks_the_same_is_not_read_and_what_was_touched_is_read_once(raw, tmp_path, monkeypatch):
    read = []
    plain = mikoshi.data.sources.contents.blocks
    monkeypatch.setattr("mikoshi.data.sources.contents.blocks", lambda file: (read.append(file.name), plain(file))[1])
    monkeypatch.setattr("mikoshi.data.sources.contents._FRESH", 0)  # as if they had been there for long
    files = list_files(str(raw))
    found = contents_of(files, None)
    assert read == ["a.jsonl", "b.jsonl"] and contents_of(files, found) == found and len(read) == 2
    os.utime(raw / "a.jsonl")
    touched = contents_of(list_files(str(raw)), found)
    assert read[2:] == ["a.jsonl"] and touched.digests == found.digests and not touched.first_difference(found)
    (tmp_path / SOURCES).write_bytes(touched.to_json())
    assert contents_of(list_files(str(raw)), read_contents(tmp_path / SOURCES)) == touched and len(read) == 3


def test_a_file_changed_a_moment_ago_is_read_again(raw):
    found = contents_of(list_files(str(raw)), None)
    assert found.signatures == {"a.jsonl": (), "b.jsonl": ()}


def test_data_prepared_before_goes_on_and_says_so(raw, tmp_path):
    prepare(recipe(raw), tmp_path / "data")
    (tmp_path / "data" / SOURCES).unlink()
    info, new = prepare(recipe(raw), tmp_path / "data")
    assert not new and info.report["contents"] == "unknown"


CHAT_BEFORE = {"chatml": ["chatml#f363ce0b4d3b6b7e", 339], "plain.jinja": ["{}#26aa8995e9f277a4", 68]}
"""What version 0.1.0 noted of a template."""


@pytest.mark.parametrize("chat", CHAT_BEFORE)
def test_conversations_prepared_by_earlier_rules_go_on_and_say_so(tmp_path, chat):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = "".join(json.dumps({"messages": [*turns, {"role": "user", "content": f"{n}"}]}) + "\n" for n in range(40))
    (tmp_path / "raw.jsonl").write_text(rows)
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
    place = chat if chat == "chatml" else str(tmp_path / chat)
    made, _ = prepare(recipe(tmp_path / "raw.jsonl", chat=place), tmp_path / "data", workers=1)
    source = open_source(SourceSpec(str(tmp_path / "raw.jsonl"), chat=place))
    name, size = CHAT_BEFORE[chat]
    assert source.describe(legacy=True)[-1] == (name.format(place), size)
    index = tmp_path / "data" / INDEX
    plain = making._identity(recipe(tmp_path / "raw.jsonl", chat=place), source, load_tokenizer("bytes"))
    before = making._digest(plain | {"files": [list(file) for file in source.describe(legacy=True)]})
    index.write_text(index.read_text().replace(made.recipe, before))
    info, new = prepare(recipe(tmp_path / "raw.jsonl", chat=place), tmp_path / "data")
    assert (new, info.splits, info.report["earlier"]) == (False, made.splits, ("chat",))
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}")
    with pytest.raises(DataError, match="another source or settings"):
        prepare(recipe(tmp_path / "raw.jsonl", chat=str(tmp_path / "plain.jinja")), tmp_path / "data")


@pytest.mark.parametrize("change", ["edited", "replaced", "added"])
def test_a_change_while_it_is_read_is_noticed(raw, tmp_path, monkeypatch, change):
    plain = making.assemble

    def late(*arguments):
        if change == "edited":
            edit(raw / "a.jsonl")
        elif change == "replaced":
            content = (raw / "a.jsonl").read_bytes().replace(b"rivers", b"horses")
            (raw / "new").write_bytes(content)
            (raw / "new").rename(raw / "a.jsonl")
        else:
            (raw / "c.jsonl").write_text('{"text": "more"}\n')
        return plain(*arguments)

    monkeypatch.setattr("mikoshi.data.prepare.prepare.assemble", late)
    with pytest.raises(DataError, match=r"changed while it was read: begin anew"):
        prepare(recipe(raw), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"], "nothing of it is gone on with"


def test_a_file_that_is_another_when_it_is_opened_is_told(raw):
    source = open_source(SourceSpec(str(raw)))
    (raw / "new").write_bytes((raw / "a.jsonl").read_bytes())
    (raw / "new").rename(raw / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read: it is not the file that was listed"):
        [d for piece in pieces(source, 1 << 20) for d in documents(source, piece)]


def test_what_was_finished_of_other_contents_is_not_gone_on_with(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("mikoshi.data.prepare.prepare._SMALL_PIECE", 1000)
    with monkeypatch.context() as stop:
        stop.setattr("mikoshi.data.prepare.prepare.assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(recipe(raw), tmp_path / "data", workers=1)
    edit(raw / "a.jsonl")
    with pytest.raises(DataError, match=r"finished pieces of a preparation with other settings \(the files were others\)"):
        prepare(recipe(raw), tmp_path / "data", workers=1)


def test_work_of_a_version_that_knew_no_contents_is_begun_anew(raw, tmp_path, monkeypatch):
    with monkeypatch.context() as stop:
        stop.setattr("mikoshi.data.prepare.prepare.assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(recipe(raw), tmp_path / "data", workers=1)
    noted = tmp_path / ".data.partial" / "recipe.json"
    plain = json.loads(noted.read_text())
    del plain["contents"]
    noted.write_text(json.dumps(plain))
    edit(raw / "a.jsonl")
    made, _ = prepare(recipe(raw), tmp_path / "data", workers=1)
    assert made.fingerprint == prepare(recipe(raw), tmp_path / "other", workers=1)[0].fingerprint


def test_a_common_tokenizer_is_trained_anew_on_other_contents(raw, tmp_path):
    recipes = {"web": Recipe(SourceSpec(str(raw)), vocab=300, held_out=0.2)}
    prepare_all(recipes, tmp_path / "data")
    before = (tmp_path / "data" / "tokenizer.json").read_bytes()
    edit(raw / "a.jsonl")
    with pytest.raises(DataError, match="made from another"):
        prepare_all(recipes, tmp_path / "data")
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() != before


def test_a_sample_of_a_large_file_sees_its_ends_and_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mikoshi.data.sources.contents._WHOLE", 1000)
    monkeypatch.setattr("mikoshi.data.sources.contents._BLOCK", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 5000)

    def digest():
        return contents_of(list_files(str(path)), None, sampled=True).digest

    found = {digest()}
    for at in (0, 4999, 4990, (4990 * 30) // 63):
        path.write_bytes(b"x" * at + b"y" + b"x" * (4999 - at))
        found.add(digest())
    assert len(found) == 5
    assert Contents(sampled=True) != Contents()


PREPARE = """
import sys
from pathlib import Path
import mikoshi.data.prepare.prepare as making
from mikoshi.data.prepare.prepare import Recipe, prepare_all
from mikoshi.data.sources.sources import SourceSpec
making._PATIENCE = 300  # a busy machine
recipes = {name: Recipe(SourceSpec(sys.argv[1]), vocab=300, held_out=0.2) for name in ("a", "b")}
prepare_all(recipes, Path(sys.argv[2]), workers=1)
"""


def test_two_that_prepare_one_mixture_at_once_both_end_well(raw, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(raw), str(tmp_path / "data")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["a", "b", "tokenizer.from", "tokenizer.json"]
