"""Preparing: the same bytes whatever the workers and the kills, no document lost, doubled or left out unsaid."""

import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest

import mikoshi.data.prepare.prepare as making
from mikoshi.data.dataset.shards import open_shard, read_index
from mikoshi.data.errors import DataError
from mikoshi.data.io.atomic import locked_folder, partial_path
from mikoshi.data.prepare.prepare import Filters, Recipe, prepare, prepare_all, train_shared_tokenizer
from mikoshi.data.sources.sources import SourceSpec
from mikoshi.data.tokenizer.tokenizer import load_tokenizer

SMALL = 1 << 14  # bytes of a piece here, so that a small source has many


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(making, "_SMALL_PIECE", SMALL)


def texts(count, seed=0):
    """Made of words, a tenth of them said before, some empty."""
    draw = random.Random(seed)
    words = ["the", "a", "sea", "mountain", "carried", "shoulders", "日本", "été", "x = 1", "\n", "1984", "---"]
    made = []
    for number in range(count):
        kind = draw.random()
        if kind < 0.1 and made:
            made.append(draw.choice(made))
        elif kind < 0.12:
            made.append("")
        else:
            made.append(f"{number} " + " ".join(draw.choices(words, k=draw.randint(1, 120))))
    return made


def corpus(folder, count=600, seed=0):
    """JSON lines in two files, with one line that cannot be read, and a text of its own. Returns the texts in order."""
    folder.mkdir(parents=True)
    said = texts(count, seed)
    cut = len(said) * 3 // 4
    rows = [json.dumps({"text": text}) for text in said]
    (folder / "a.jsonl").write_text("\n".join(rows[:cut]) + "\n")
    (folder / "b.jsonl").write_text("\n".join([*rows[cut:], "{broken"]))
    (folder / "c.txt").write_text("A text of its own.\n" * 20)
    return [*said, "A text of its own.\n" * 20]


def recipe(folder, **settings):
    plain = {"vocab": 400, "held_out": 0.1, "shard_tokens": 20_000, "deduplicate": True}
    return Recipe(SourceSpec(str(folder), on_invalid="skip"), **plain | settings)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents_in(folder, split):
    """Texts of a split in order, by an independent reading of its shards."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    found = []
    for info in read_index(folder).splits[split]:
        shard = open_shard(folder / info.file, info)
        starts = [0, *shard.ends[:-1].tolist()]
        for start, stop in zip(starts, shard.ends.tolist(), strict=True):
            assert shard.tokens[stop - 1] == tokenizer.separator
            found.append(tokenizer.decode(shard.tokens[start : stop - 1].tolist()))
    return found


# A process of its own, which can be killed: prepare(recipe) as `recipe` above makes it.
ALONE = """
import sys
from pathlib import Path
import mikoshi.data.prepare.prepare as making
making._SMALL_PIECE = int(sys.argv[3])
source, folder = sys.argv[1:3]
recipe = making.Recipe(making.SourceSpec(source, on_invalid="skip"), vocab=400, held_out=0.1, shard_tokens=20_000,
                       deduplicate=True)
try:
    making.prepare(recipe, Path(folder), workers=2)
except (making.Stopped, making.DataError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def begin(source, folder):
    command = [sys.executable, "-P", "-c", ALONE, str(source), str(folder), str(SMALL)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_until(true, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came to this"
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def records(folder):
    return len(list(partial_path(folder).glob("records/[0-9]*.json")))


def workers_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes):
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_the_bytes_are_the_same_whatever_the_workers(tmp_path):
    corpus(tmp_path / "text")
    made = []
    for workers in (1, 2, 3):
        info, new = prepare(recipe(tmp_path / "text"), tmp_path / f"by{workers}", workers=workers)
        assert new
        made.append(contents(tmp_path / f"by{workers}"))
        assert sorted(made[-1]) == sorted(
            ["dataset.json", "sources.json", "tokenizer.json", *(s.file for shards in info.splits.values() for s in shards)]
        )
    assert made[0] == made[1] == made[2]
    assert len(info.splits["train"]) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["by1", "by2", "by3", "text"]
    assert prepare(recipe(tmp_path / "text"), tmp_path / "by1") == (info, False)


def test_no_document_is_lost_or_doubled(tmp_path):
    said = corpus(tmp_path / "text")
    info, _ = prepare(recipe(tmp_path / "text", deduplicate=False), tmp_path / "all", workers=2)
    held = {split: documents_in(tmp_path / "all", split) for split in ("train", "held_out")}
    whole = [text for text in said if text]
    assert Counter(held["train"] + held["held_out"]) == Counter(whole)
    side = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < 0.1 * 2**64 for text in whole]
    for split, wanted in (("train", False), ("held_out", True)):
        assert held[split] == [text for text, mine in zip(whole, side, strict=True) if mine == wanted]
    report = info.report
    assert report["documents"] == len(whole)
    assert report["bytes"] == sum(len(text.encode()) for text in whole)
    assert report["empty"] == said.count("")
    assert report["read"] == len(said) + 1
    assert report["problems"] == {"not JSON": report["skipped"]} == {"not JSON": 1}
    assert report["skipped_names"][0].startswith("b.jsonl:")
    tokenizer = load_tokenizer(tmp_path / "all" / "tokenizer.json")
    lengths = Counter(2 ** math.floor(math.log2(len(tokenizer.encode(text)) + 1)) for text in whole)
    assert report["lengths"] == {str(power): count for power, count in sorted(lengths.items())}
    assert report["tokens"] == {split: info.tokens(split) for split in held}


def test_of_equal_documents_the_first_is_kept(tmp_path):
    said = corpus(tmp_path / "text")
    info, _ = prepare(recipe(tmp_path / "text"), tmp_path / "once", workers=2)
    first = list(dict.fromkeys(text for text in said if text))
    held = documents_in(tmp_path / "once", "held_out")
    assert documents_in(tmp_path / "once", "train") == [text for text in first if text not in set(held)]
    assert sorted(held + documents_in(tmp_path / "once", "train")) == sorted(first)
    assert info.report["dropped"] == {"duplicate": len(said) - said.count("") - len(first)}


def test_kill_9_at_any_moment_and_the_same_command_goes_on(tmp_path):
    corpus(tmp_path / "text", 1000)
    prepare(recipe(tmp_path / "text"), tmp_path / "whole", workers=1)
    draw = random.Random(4)
    killed = 0
    for stop_at in (0, 1, 4, 12):
        process = begin(tmp_path / "text", tmp_path / "data")
        try:
            wait_until(lambda: records(tmp_path / "data") >= stop_at, process)  # noqa: B023
            moment = time.monotonic() + draw.random() * 0.2
            wait_until(lambda: time.monotonic() > moment, process)  # noqa: B023
            left = workers_of(process) if process.poll() is None else []
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            assert all_gone(left), "workers outlived the process that started them"
        finally:
            process.kill()
            process.communicate()
    assert killed >= 2
    again = begin(tmp_path / "text", tmp_path / "data")
    assert again.communicate(timeout=120) == (None, "")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not partial_path(tmp_path / "data").exists()


def test_finished_pieces_are_not_done_again(tmp_path, monkeypatch):
    corpus(tmp_path / "text")
    prepare(recipe(tmp_path / "text"), tmp_path / "whole", workers=1)
    with monkeypatch.context() as broken:
        broken.setattr(making, "assemble", lambda *_: (_ for _ in ()).throw(RuntimeError("a fault")))
        with pytest.raises(RuntimeError, match="a fault"):
            prepare(recipe(tmp_path / "text"), tmp_path / "data", workers=1)
    work = partial_path(tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in work.glob("parts/*")}
    lost = sorted(work.glob("parts/train-*"))[2]
    lost.write_bytes(lost.read_bytes()[:-8])  # cut short behind our back: its piece has to be done again
    phases = []
    prepare(recipe(tmp_path / "text"), tmp_path / "data", lambda p: phases.append((p.phase, p.resumed_bytes)), workers=1)
    assert ("training the tokenizer", 0) not in phases
    resumed = dict(phases)["tokenizing"]
    total = sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert total - 2 * SMALL < resumed < total
    assert len(before) > 10
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_is_named_and_the_rest_is_kept(tmp_path):
    corpus(tmp_path / "text", 1500)
    process = begin(tmp_path / "text", tmp_path / "data")
    try:
        assert wait_until(lambda: records(tmp_path / "data"), process)
        workers = workers_of(process)
        workers[0].kill()
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 1
    assert told.startswith("DataError: data.source: the worker process at piece ")
    assert "a.jsonl" in told
    assert "SIGKILL" in told
    assert "the same command goes on" in told
    assert all_gone(workers)
    assert records(tmp_path / "data")
    again = begin(tmp_path / "text", tmp_path / "data")
    assert again.communicate(timeout=120) == (None, "")
    prepare(recipe(tmp_path / "text"), tmp_path / "whole", workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


@pytest.mark.parametrize("asking", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped_on_request(tmp_path, asking):
    corpus(tmp_path / "text", 3000)
    process = begin(tmp_path / "text", tmp_path / "data")
    try:
        assert wait_until(lambda: records(tmp_path / "data"), process)
        workers = workers_of(process)
        process.send_signal(asking)
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert told == f"Stopped: stopped by {asking.name}; what is finished is kept, the same command goes on\n"
    assert all_gone(workers)
    assert records(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_work_of_other_settings_is_refused_when_it_is_worth_something_and_cleared_otherwise(tmp_path, monkeypatch):
    corpus(tmp_path / "text", 50)
    work = partial_path(tmp_path / "data")
    with monkeypatch.context() as broken:
        broken.setattr(making, "assemble", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            prepare(recipe(tmp_path / "text"), tmp_path / "data", workers=1)
    with pytest.raises(DataError, match=r"\.data\.partial holds \d+ finished pieces .* \(held_out was 0\.1\): remove it, or"):
        prepare(recipe(tmp_path / "text", held_out=0.2), tmp_path / "data")
    for path in work.glob("[rh]*/*"):
        path.unlink()
    (work / "stray").mkdir()
    phases = []
    prepare(recipe(tmp_path / "text", held_out=0.2), tmp_path / "data", lambda p: phases.append(p.phase), workers=1)
    assert phases[0] == f"clearing {work}, left by other settings"
    assert not work.exists()


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    corpus(tmp_path / "text", 50)
    monkeypatch.setattr(making, "_PATIENCE", 0.1)
    with (
        locked_folder(tmp_path / "data", 0),
        pytest.raises(DataError, match="data is being prepared by another process"),
    ):
        prepare(recipe(tmp_path / "text"), tmp_path / "data", workers=1)
    assert prepare(recipe(tmp_path / "text"), tmp_path / "data", workers=1)[1]


BAD = {
    "broken JSON": (b'{"text": "a"}\n{"text": \n', "not JSON"),
    "wrong type": (b'{"text": "a"}\n{"text": 7}\n', "no text"),
    "no such column": (b'{"text": "a"}\n{"body": "b"}\n', "no column"),
    "not an object": (b'{"text": "a"}\n[1, 2]\n', "not an object"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "not UTF-8"),
    "half a surrogate pair": (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "not text"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", BAD)
def test_a_document_that_cannot_be_read_is_refused_or_counted_by_name(tmp_path, case, workers):
    content, kind = BAD[case]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_bytes(content)
    (tmp_path / "text" / "b.txt").write_text("some text\n" * SMALL)
    strict = Recipe(str(tmp_path / "text"), vocab=300, held_out=0.1)
    with pytest.raises(DataError, match=rf"^a\.jsonl:2: {kind}"):
        prepare(strict, tmp_path / "data", workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
    loose = Recipe(SourceSpec(str(tmp_path / "text"), on_invalid="skip"), vocab=300, held_out=0.1)
    info, _ = prepare(loose, tmp_path / "data", workers=workers)
    assert info.report["problems"] == {kind: 1}
    assert len(info.report["skipped_names"]) == info.report["skipped"] == 1
    assert info.report["skipped_names"][0].startswith(f"a.jsonl:2: {kind}")
    with pytest.raises(DataError, match='on_invalid = "error": 1 documents were left out'):
        prepare(strict, tmp_path / "data")


@pytest.mark.parametrize("workers", [1, 2])
def test_more_invalid_documents_than_may_be(tmp_path, workers):
    (tmp_path / "text").mkdir()
    rows = ["{" if number % 10 == 3 else json.dumps({"text": f"text {number} " * 30}) for number in range(400)]
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(rows))
    for most, told in ((39, "more than 39"), (0.09, "= 0.09: 40 of 400 documents"), (0, "= 0: 40 of 400 documents")):
        with pytest.raises(DataError, match=rf"data\.max_invalid.*{told}.*a\.jsonl:4: not JSON"):
            prepare(recipe(tmp_path / "text", max_invalid=most), tmp_path / "data", workers=workers)
    assert records(tmp_path / "data") > 5  # kept, and good for another limit
    info, made = prepare(recipe(tmp_path / "text", max_invalid=40), tmp_path / "data", workers=workers)
    assert made
    assert info.report["skipped"] == 40
    assert len(info.report["skipped_names"]) == 20
    with pytest.raises(DataError, match=r"max_invalid = 5: 40 of 400"):
        prepare(recipe(tmp_path / "text", max_invalid=5), tmp_path / "data")


def test_of_several_bad_pieces_the_first_is_told_whatever_the_workers(tmp_path):
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": f"text {number} " * 30}) for number in range(400)]
    for bad in (100, 150, 200, 399):
        rows[bad] = "{"
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(rows))
    for workers in (1, 2, 3):
        with pytest.raises(DataError, match=r"^a\.jsonl:101: not JSON"):
            prepare(Recipe(str(tmp_path / "text"), tokenizer="bytes"), tmp_path / "data", workers=workers)


def test_nothing_usable(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "short"}\n')
    only = Recipe(str(tmp_path / "a.jsonl"), vocab=300, filters=Filters(min_chars=10))
    with pytest.raises(DataError, match=r"no document of .* could be used \(0 skipped, 1 empty, 1 dropped by min_chars\)"):
        prepare(only, tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_only_the_answers_of_a_conversation_are_learned(tmp_path):
    rows = [{"prompt": f"What is {n} + {n}? " * 9, "response": f"It is {2 * n}."} for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = SourceSpec(str(tmp_path / "a.jsonl"), chat="chatml")
    infos = [
        prepare(Recipe(spec, vocab=400, held_out=0.1), tmp_path / f"by{workers}", workers=workers)[0] for workers in (1, 2)
    ]
    assert contents(tmp_path / "by1") == contents(tmp_path / "by2")
    tokenizer = load_tokenizer(tmp_path / "by1" / "tokenizer.json")
    assert {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens
    answers = []
    for info in infos[0].splits["train"] + infos[0].splits["held_out"]:
        shard = open_shard(tmp_path / "by1" / info.file)
        learned = np.unpackbits(shard.learned, count=len(shard.tokens), bitorder="little").astype(bool)
        for start, stop in zip([0, *shard.ends[:-1].tolist()], shard.ends.tolist(), strict=True):
            ids, mine = shard.tokens[start:stop], learned[start:stop]
            answers.append(tokenizer.decode(ids[mine].tolist()))
            assert "What is" in tokenizer.decode(ids[~mine].tolist())
    assert sorted(a.removesuffix("<|endoftext|>").rstrip("\n") for a in answers) == sorted(
        f"{row['response']}<|im_end|>" for row in rows
    )


def test_several_sources_share_one_tokenizer(tmp_path):
    corpus(tmp_path / "one", 200, seed=1)
    corpus(tmp_path / "two", 100, seed=2)
    recipes = {name: recipe(tmp_path / name) for name in ("one", "two")}
    made = prepare_all(recipes, tmp_path / "data", workers=1)
    trained = load_tokenizer(tmp_path / "data" / "tokenizer.json")
    assert trained.fingerprint == train_shared_tokenizer(recipes).fingerprint
    for name, (info, new) in made.items():
        assert new
        assert info.tokenizer == trained.fingerprint
        assert load_tokenizer(tmp_path / "data" / name / "tokenizer.json").fingerprint == trained.fingerprint
    phases = []
    again = prepare_all(recipes, tmp_path / "data", lambda p: phases.append(p.phase))
    assert again == {name: (info, False) for name, (info, _) in made.items()}
    assert set(phases) == {"verifying"}
    with pytest.raises(DataError, match="cannot be a folder's name"):
        prepare_all({"../one": recipes["one"]}, tmp_path / "data")
    with pytest.raises(DataError, match=r"one tokenizer is trained for all sources, and they ask for \[300, 400\]"):
        prepare_all({"one": recipes["one"], "two": recipe(tmp_path / "two", vocab=300)}, tmp_path / "other")


def test_progress_moves_within_pieces_and_ends_at_the_whole(tmp_path):
    corpus(tmp_path / "text", 1000)
    total = sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    for workers in (1, 2):
        seen = []
        prepare(
            recipe(tmp_path / "text", tokenizer="bytes"),
            tmp_path / f"by{workers}",
            lambda p: seen.append((p.phase, p.done_bytes, p.total_bytes, p.tokens)),  # noqa: B023
            workers=workers,
        )
        done = [at for phase, at, _, _ in seen if phase == "tokenizing"]
        assert done == sorted(done)
        assert len(set(done)) > 10
        assert [(at, whole) for phase, at, whole, _ in seen if phase == "tokenizing"][-1] == (total, total)
        info = read_index(tmp_path / f"by{workers}")
        assert max(tokens for phase, _, _, tokens in seen if phase == "tokenizing") == sum(map(info.tokens, info.splits))


def test_a_flipped_bit_is_found_when_preparing_again(tmp_path):
    corpus(tmp_path / "text", 50)
    info, _ = prepare(recipe(tmp_path / "text"), tmp_path / "data", workers=1)
    shard = tmp_path / "data" / info.splits["train"][0].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match="do not match its digest"):
        prepare(recipe(tmp_path / "text"), tmp_path / "data")


def long_text(tmp_path):
    text = " ".join(texts(200))
    (tmp_path / "one.txt").write_text(text)
    return text


def tokens_of(folder, split):
    return np.concatenate([open_shard(folder / info.file).tokens for info in read_index(folder).splits[split]])


def test_small_shards_hold_the_same_documents(tmp_path):
    corpus(tmp_path / "text")
    prepare(recipe(tmp_path / "text", shard_tokens=1 << 26), tmp_path / "whole", workers=1)
    info, _ = prepare(recipe(tmp_path / "text", shard_tokens=900), tmp_path / "small", workers=1)
    assert len(info.splits["train"]) > 20
    assert len(read_index(tmp_path / "whole").splits["train"]) == 1
    for split in ("train", "held_out"):
        assert np.array_equal(tokens_of(tmp_path / "whole", split), tokens_of(tmp_path / "small", split))
    sizes = [shard.tokens for shard in info.splits["train"]]
    assert max(sizes) < 900 + 2000


@pytest.mark.parametrize("shard_tokens", [1 << 26, 500])
def test_one_long_document_is_held_out_at_its_end(tmp_path, shard_tokens):
    text = long_text(tmp_path)
    only = Recipe(str(tmp_path / "one.txt"), vocab=384, held_out=0.1, shard_tokens=shard_tokens)
    info, _ = prepare(only, tmp_path / "data")
    parts = [tokens_of(tmp_path / "data", split) for split in ("train", "held_out")]
    assert len(parts[1]) == math.ceil(0.1 * (len(parts[0]) + len(parts[1])))
    assert load_tokenizer(tmp_path / "data" / "tokenizer.json").decode(np.concatenate(parts)[:-1].tolist()) == text
    counts = [np.bincount(part, minlength=384) for part in parts]
    frequencies = (counts[0] + 1) / (counts[0] + 1).sum()
    assert info.unigram_nats == pytest.approx(-(counts[1] * np.log(frequencies)).sum() / counts[1].sum())
    assert info.report["tokens"] == {"train": len(parts[0]), "held_out": len(parts[1])}


def test_the_unigram_loss_is_the_loss_of_token_frequencies():
    from mikoshi.data.dataset.shards import unigram_nats

    uniform = np.full(64, 1000)
    assert unigram_nats(uniform, uniform) == pytest.approx(np.log(64))
    certain = np.array([10**9, 0])
    assert unigram_nats(certain, np.array([5, 0])) == pytest.approx(0, abs=1e-6)


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    corpus(tmp_path / "text", 3000)
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        whole = recipe(tmp_path / "text", tokenizer="bytes", deduplicate=False)
        with pytest.raises(DataError, match=r"cannot write .*: No space left on device; what is finished is kept"):
            prepare(whole, disk / "data", workers=2)
        assert records(disk / "data")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        prepare(whole, disk / "data", workers=2)
        prepare(whole, tmp_path / "whole", workers=1)
        assert contents(disk / "data") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_document_of_100_megabytes(tmp_path):
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(5000)]
    text = " ".join(draw.choices(words, k=100_000_000 // 6))
    assert len(text) > 10**8
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    info, _ = prepare(Recipe(str(tmp_path / "a.jsonl"), tokenizer="gpt2"), tmp_path / "data")
    assert info.report["documents"] == 2
    ids = np.concatenate([tokens_of(tmp_path / "data", split) for split in ("train", "held_out")])
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer.json")
    documents = tokenizer.decode(ids.tolist()).split(tokenizer.decode([tokenizer.separator]))
    assert hashlib.sha256(documents[0].encode()).digest() == hashlib.sha256(text.encode()).digest()
    assert documents[1:] == ["short", ""]
    assert len(ids) == sum(map(info.tokens, info.splits)) > 2 * 10**7
