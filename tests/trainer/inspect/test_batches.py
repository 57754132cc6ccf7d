"""What `mikoshi data` shows and the report draws is what is on disk and what the run consumed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.dataset.megatron import write_megatron
from mikoshi.data.dataset.packing import plan_name
from mikoshi.data.dataset.rows import IGNORED
from mikoshi.data.dataset.shards import open_shard
from mikoshi.data.dataset.split import open_corpus
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.prepare.prepare import Recipe, prepare_all
from mikoshi.data.sources.text import SourceSpec
from mikoshi.data.tokenizer.tokenizer import load_tokenizer
from mikoshi.trainer.config.run import load_config, to_toml
from mikoshi.trainer.inspect.batches import CLOSE, OPEN, marked
from mikoshi.trainer.inspect.statistics import documents_cut, rows_joined
from runs import loader_of, make_dataset, run_config, text_folder

CONTEXT = 64


@pytest.fixture
def looked(mikoshi):
    """What a `mikoshi data` verb says as JSON."""

    def call(*arguments):
        code, out, errors = mikoshi("data", *arguments, "--json")
        assert (code, errors) == (0, [])
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """A run's TOML file over real text of one source."""
    folder = tmp_path_factory.mktemp("lone")
    config = run_config(make_dataset(folder), folder / "runs", train={"steps": 30, "global_batch": 4})
    (folder / "run.toml").write_text(to_toml(config))
    return folder / "run.toml"


def conversations(path):
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Add {n} to {n * n}. Naïve ❤?"},
                {"role": "assistant", "content": f"It is {n + n * n}."},
            ]
        }
        for n in range(300)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Text and conversations, prepared as a mixture; the latter's epochs end on the way."""
    folder = tmp_path_factory.mktemp("mixed")
    text_folder(folder / "text")
    conversations(folder / "chat.jsonl")
    recipes = {
        "text": Recipe(SourceSpec(str(folder / "text")), vocab=400, held_out=0.1),
        "chat": Recipe(SourceSpec(str(folder / "chat.jsonl"), chat="chatml"), vocab=400, held_out=0.1),
    }
    prepare_all(recipes, folder / "data")
    mixture = {
        "text": {"weight": 3.0, "path": str(folder / "data" / "text")},
        "chat": {"weight": 1.0, "path": str(folder / "data" / "chat"), "epochs": 0.25, "schedule": [[1024, 2.0]]},
    }
    config = run_config(
        folder / "data", folder / "runs", data={"mixture": mixture}, train={"steps": 60, "global_batch": 4},
        model={"vocab": 512, "layers": 1}, checkpoint={"every": 30}, eval={"batches": 1}, log={"tensorboard": False},
    )  # fmt: skip
    (folder / "run.toml").write_text(to_toml(config))
    return folder / "run.toml"


def shard_of(row):
    path = Path(row["shard"])
    return open_shard(path), load_tokenizer(path.parent / "tokenizer.json")


def plain(text):
    return text.replace(OPEN, "").replace(CLOSE, "")


def one_rank():
    from mikoshi.parallel.layout import Layout

    return Layout(), 0


def test_rows_are_those_of_the_batch_and_documents_begin_where_the_index_says(mixed, looked):
    step, larger = 1, "train.global_batch=32"
    batch = loader_of(load_config(mixed, [larger, "train.steps=2"]), *one_rank()).batch(step)
    rows = looked("inspect", mixed, larger, "--step", step, "--rows", 99)["rows"]
    assert [row["row"] for row in rows] == list(range(32))
    crossed = 0
    for n, row in enumerate(rows):
        for name in ("ids", "labels", "docs", "positions"):
            assert row[name] == getattr(batch, "tokens" if name == "ids" else name)[n].tolist()
        shard, _ = shard_of(row)
        first = row["shard_row"] * CONTEXT
        assert row["ids"] == shard.tokens[first : first + CONTEXT].tolist()
        ends = [int(e) for e in shard.ends if first < e < first + CONTEXT]
        assert [s["first"] for s in row["segments"]] == [0, *(e - first for e in ends)]
        crossed += len(ends)
        for segment in row["segments"]:
            begin = int(shard.ends[segment["document"] - 1]) if segment["document"] else 0
            assert begin + segment["offset"] == first + segment["first"]
    assert crossed > 5
    assert [row["position"] for row in rows] == list(range(32, 64))


def test_the_text_is_the_tokenizers_and_begins_at_rules(mixed, mikoshi, looked):
    which = ("inspect", mixed, "--step", 1, "--rows", 32, "train.global_batch=32")
    wanted = looked(*which)["rows"]
    code, out, _ = mikoshi("data", *which)
    assert code == 0
    parts = re.split(r"^(===|---) (.*) (?:===|---)$", out, flags=re.MULTILINE)
    texts = [text for kind, text in zip(parts[1::3], parts[3::3], strict=True) if kind == "---"]
    said = [line for kind, line in zip(parts[1::3], parts[2::3], strict=True) if kind == "==="]
    segments = [(row, s) for row in wanted for s in row["segments"]]
    assert len(texts) == len(segments)
    for text, (row, segment) in zip(texts, segments, strict=True):
        shard, tokenizer = shard_of(row)
        begin = row["shard_row"] * CONTEXT + segment["first"]
        after = row["labels"][segment["first"] + segment["places"] - 1] != IGNORED
        stop = begin + segment["places"] + after
        assert stop <= int(shard.ends[segment["document"]])
        whole = tokenizer.decode(shard.tokens[begin:stop].tolist())
        assert plain(text) in (f"\n{whole}\n", f"\n{whole}\n\n")
    for line, row in zip(said, wanted, strict=True):
        assert (
            f"row {row['row']}, position {row['position']}: {row['source']}, {row['shard']} row {row['shard_row']}, epoch 0"
            in line
        )


def test_a_far_step_and_fitted_rows_with_their_padding(lone, looked, mikoshi):
    rows = looked("inspect", lone, "--step", 10**9, "--row", 2, "--rows", 2, "data.packing=fit")["rows"]
    assert [(row["row"], row["position"]) for row in rows] == [(2, 4 * 10**9 + 2), (3, 4 * 10**9 + 3)]
    assert rows[0]["epoch"] > 10**6
    everything = looked("inspect", lone, "--step", 0, "--rows", 3000, "data.packing=fit", "train.global_batch=3000")["rows"]
    padded = [row for row in everything if row["segments"][-1]["document"] is None]
    assert padded
    for row in everything:
        shard, _ = shard_of(row)
        for segment in row["segments"]:
            stretch = slice(segment["first"], segment["first"] + segment["places"])
            if segment["document"] is None:
                assert set(row["labels"][stretch]) == {IGNORED}
                continue
            begin = (int(shard.ends[segment["document"] - 1]) if segment["document"] else 0) + segment["offset"]
            count = segment["places"] + 1
            assert segment["tokens"] == shard.tokens[begin : begin + count].tolist()
            assert segment["ends"] == (begin + count == int(shard.ends[segment["document"]]))
            assert segment["predicted"] == [False] + [True] * segment["places"]
    one = padded[0]["row"]
    _, out, _ = mikoshi("data", "inspect", lone, "--row", one, "data.packing=fit", "train.global_batch=3000")
    assert f"--- padding: {padded[0]['segments'][-1]['places']} places ---" in out


def test_of_a_conversation_the_answer_alone_is_unmarked(mixed, mikoshi):
    _, out, _ = mikoshi("data", "inspect", mixed, "--step", 0, "--rows", 16, "train.global_batch=16")
    rows = [part for part in out.split("\n=== ")[1:] if ": chat, " in part]
    whole = [p for row in rows for p in re.split(r"^--- .* ---$\n?", row, flags=re.MULTILINE)[1:]]
    answered = 0
    for text in whole:
        for n, answer in re.findall(
            rf"Add (\d+) to \d+\. Naïve ❤\?<\|im_end\|>\n<\|im_start\|>assistant\n{CLOSE}([^{OPEN}]*)", text
        ):
            assert f"It is {int(n) + int(n) ** 2}.<|im_end|>\n<|endoftext|>".startswith(answer.rstrip("\n"))  # a row may end
            answered += answer.rstrip("\n").endswith("<|endoftext|>")
    assert answered >= 2
    assert f"between {OPEN} and {CLOSE}: read but not predicted" in out


def test_stretches_put_together_are_the_text_also_where_they_cut_a_character(lone):
    tokenizer = load_tokenizer(lone.parent / "dataset" / "tokenizer.json")
    ids = tokenizer.encode("naïve ❤ 漢字 and 🎌 end")
    rng = np.random.default_rng(1)
    for _ in range(50):
        flags = (rng.random(len(ids)) < 0.5).tolist()
        assert "".join(text for text, _ in marked(tokenizer, ids, flags)) == tokenizer.decode(ids)


def test_warm_up_is_told_from_a_documents_beginning(lone, looked, mikoshi):
    (row,) = looked("inspect", lone, "--row", 0, "data.warmup=[[0, 16]]")["rows"]
    assert [s["first"] for s in row["segments"] if s["first"] % 16 == 0] == [0, 16, 32, 48]
    _, out, _ = mikoshi("data", "inspect", lone, "--row", 0, "data.warmup=[[0, 16]]")
    assert out.count("goes on, attention begins anew") == len(row["segments"]) - len({s["document"] for s in row["segments"]})


def test_a_run_is_shown_as_it_was_whatever_its_mixture_became(mixed, tmp_path, mikoshi, looked):
    folder, file = tmp_path / "runs", tmp_path / "run.toml"
    begun = load_config(mixed, [f"run.folder={folder}", "train.steps=4", "checkpoint.every=4", "eval.every=0"])
    file.write_text(to_toml(begun))
    assert mikoshi("train", file)[0] == 0
    changed = ["data.mixture.text.weight=1", "data.mixture.chat.weight=5", "data.on_change=accept", "train.steps=8"]
    assert mikoshi("train", file, *changed)[0] == 0
    run = folder / "test"
    before, after = (looked("inspect", run, "--step", step) for step in (3, 5))
    asked = looked("inspect", file, "--step", 3)
    anew = looked("inspect", file, "--step", 3, *changed)
    assert before["rows"] == asked["rows"] != anew["rows"]
    assert after["rows"] != looked("inspect", file, "--step", 5)["rows"]
    assert (before["consumed"], after["consumed"], looked("inspect", run, "--step", 8)["consumed"]) == (True, True, False)
    assert "to come: the newest checkpoint is of step 8" in mikoshi("data", "inspect", run, "--step", 8)[1]
    weights = looked("stats", run)["weights"]
    assert [w["position"] for w in weights] == [0, 16]
    assert weights[1]["asked"] == {"text": 1 / 3, "chat": 2 / 3}  # its schedule has begun
    page = report_of(mikoshi, run)
    assert "Mixture over training" in page and "Documents by tokens" in page


def report_of(mikoshi, run):
    assert mikoshi("report", run)[0] == 0
    page = re.sub(r"<script[^>]*>.*?</script>", "", (run / "report.html").read_text(), flags=re.DOTALL)
    return page.split("<h2>Data</h2>")[1].split("<h2>Layout</h2>")[0]


def test_the_report_says_so_where_the_data_is_gone(lone, tmp_path, mikoshi):
    shutil.copytree(lone.parent / "dataset", tmp_path / "data")
    overrides = [f"run.folder={tmp_path}/runs", f"data.path={tmp_path}/data", "train.steps=2", "log.tensorboard=false"]
    assert mikoshi("train", lone, *overrides)[0] == 0
    run = tmp_path / "runs" / "test"
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    page = report_of(mikoshi, run)
    assert f"<td>{sum(s['tokens'] for s in info['splits']['train']):,}</td>" in page
    assert "cut from the text as it comes" in page
    shutil.rmtree(tmp_path / "data")
    page = report_of(mikoshi, run)
    assert "cannot be looked at from here: data.path: no prepared dataset at" in page and "<table" not in page


def test_stats_count_what_is_there(mixed, looked, mikoshi):
    found = looked("stats", mixed)
    config = load_config(mixed)
    loader = loader_of(config, *one_rank())
    sources = np.concatenate([loader.samples(step).source for step in range(60)])
    for number, one in enumerate(found["sources"]):
        info = json.loads((Path(one["place"]) / "dataset.json").read_text())
        shards = [open_shard(Path(one["place"]) / s["file"]) for s in info["splits"]["train"]]
        assert one["tokens"]["train"] == sum(len(s.tokens) for s in shards)
        assert one["documents"]["train"] == sum(len(s.ends) for s in shards)
        assert one["packed"]["rows"] == sum((len(s.tokens) - 1) // CONTEXT for s in shards)
        assert one["drawn"] == (sources == number).sum()
        assert one["share"] == pytest.approx((sources == number).mean())
        assert one["epochs"] == pytest.approx(one["drawn"] / one["packed"]["rows"])
        assert sum(one["lengths"].values()) == one["report"]["documents"]
    text, chat = found["sources"]
    assert text["spent"] is None
    assert chat["cap"] == int(0.25 * chat["packed"]["rows"])
    assert abs(chat["cap"] - chat["drawn"]) <= 1
    assert chat["spent"] == np.flatnonzero(sources == 1)[-1] // 4
    assert [(w["step"], w["position"]) for w in found["weights"]] == [(0, 0), (4, 16)]
    assert found["weights"][1]["effective"] == {"text": 0.6, "chat": 0.4}
    _, out, _ = mikoshi("data", "stats", mixed)
    assert f"at most {chat['cap']} rows: its last is read in step {chat['spent']}" in out
    assert re.search(r"32-63 █+ +\d+ +[\d.]+%", out)
    fitted = looked("stats", mixed, "data.packing=fit")["sources"]
    for one in fitted:
        plan = open_corpus(open_dataset(one["place"], CacheLimits(Path("c"))), "train", CONTEXT, "fit").plan
        assert one["packed"]["used"] == pytest.approx(plan.used)


def test_stats_follow_the_skips(mixed, looked):
    skip = "data.skip=[[8, 24], [100, 101]]"
    loader = loader_of(load_config(mixed, [skip]), *one_rank())
    sources = np.concatenate([loader.samples(step).source for step in range(60)])
    found = looked("stats", mixed, skip)
    assert [one["drawn"] for one in found["sources"]] == np.bincount(sources).tolist()


def test_epochs_that_end_before_the_steps_are_told(mixed, looked, mikoshi):
    capped = ["data.mixture.text.epochs=0.01", "data.mixture.chat.epochs=0.1"]
    found = looked("stats", mixed, *capped)
    assert 0 < found["steps"] < 60
    assert mikoshi("data", "inspect", mixed, "--step", found["steps"] - 1, *capped)[0] == 0
    assert mikoshi("data", "inspect", mixed, "--step", found["steps"], *capped)[0] == 2
    assert sum(one["drawn"] for one in found["sources"]) == 4 * found["steps"]
    assert "are enough for" in mikoshi("data", "stats", mixed, *capped)[1]


def test_cut_and_joined_documents_are_counted_as_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 30, size=int(rng.integers(1, 40)))
        ends, context = np.cumsum(sizes), int(rng.integers(2, 12))
        rows = max(0, (int(ends[-1]) - 1) // context)
        cut = sum(
            len({place // context for place in range(end - size, max(end - size + 1, end - 1))}) > 1
            and end - size < rows * context
            for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)
        )
        owner = np.repeat(np.arange(len(sizes)), sizes)
        joined = sum(len(set(owner[r * context : (r + 1) * context].tolist())) > 1 for r in range(rows))
        assert (documents_cut(ends, sizes, rows, context), rows_joined(ends, rows, context)) == (cut, joined)


def test_sampled_documents_are_of_the_split_and_stand_where_it_says(mixed, looked, mikoshi):
    arguments = ("sample", mixed, "-n", 3, "--seed", 5, "--tokens", 100000)
    found = looked(*arguments)
    assert [one["source"] for one in found] == ["text"] * 3 + ["chat"] * 3
    texts = [path.read_text() for path in sorted((mixed.parent / "text").iterdir())]
    for one in found:
        shard, tokenizer = shard_of(one)
        stop = int(shard.ends[one["document"]])
        assert shard.tokens[one["first_token"] : stop].tolist() == one["beginning"]["tokens"]
        assert one["text"] == tokenizer.decode(one["beginning"]["tokens"])
        if one["source"] == "text":
            assert one["text"].removesuffix("<|endoftext|>") in texts
        else:
            stretches = marked(tokenizer, one["beginning"]["tokens"], one["beginning"]["predicted"])
            assert next(text for text, flag in stretches if flag).startswith("It is")
    assert len({(one["shard"], one["document"]) for one in found}) == 6
    assert looked(*arguments) == found != looked("sample", mixed, "-n", 3, "--seed", 6, "--tokens", 100000)
    held = looked("sample", mixed, "--source", "chat", "--held-out", "-n", 999)
    info = json.loads((mixed.parent / "data" / "chat" / "dataset.json").read_text())
    assert len(held) == sum(s["documents"] for s in info["splits"]["held_out"])
    assert all(Path(one["shard"]).name.startswith("held_out") for one in held)
    _, out, _ = mikoshi("data", "sample", mixed, "--source", "text", "--tokens", 9)
    assert "the first 9 shown (--tokens)" in out


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_verify_names_all_that_is_damaged_and_nothing_else(lone, tmp_path, mikoshi):
    data = tmp_path / "data"
    recipe = Recipe(SourceSpec(str(lone.parent / "text")), vocab=384, held_out=0.1, shard_tokens=40_000)
    prepare_all({"one": recipe}, data)
    file, data = tmp_path / "run.toml", data / "one"
    file.write_text(to_toml(load_config(lone, [f"data.path={data}"])))
    assert mikoshi("data", "stats", file, "data.packing=fit")[0] == 0  # which makes the plans of rows
    code, out, errors = mikoshi("data", "verify", file)
    assert (code, errors) == (0, [])
    assert ": whole" in out
    assert f"{len(list(data.glob('[!.]*'))) - 2} files read" in out  # all but dataset.json, which lists them, and sources.json
    shards = sorted(data.glob("train-*.shard"))
    assert len(shards) > 3
    plan = data / f"{plan_name('train', CONTEXT)}.pieces"
    flip(shards[0], shards[0].stat().st_size - 1)
    flip(shards[2], 100)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    shards[3].unlink()
    flip(plan, 1000)
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"merges"', '"merged"'))
    code, out, errors = mikoshi("data", "verify", file)
    assert code == 2
    assert "6 damaged" in out
    named = [*map(str, shards[:4]), str(tokenizer), str(plan)]
    assert len(errors) == len(named)
    for name in named:
        assert sum(name in line for line in errors) == 1, name
    (data / "dataset.json").write_text("{")
    code, _, errors = mikoshi("data", "verify", file)
    assert code == 2
    assert len(errors) == 1 and "dataset.json: the index is damaged" in errors[0]


def test_verify_a_megatron_corpus_and_a_distant_dataset(lone, tmp_path, mikoshi):
    dataset = lone.parent / "dataset"
    tokenizer = dataset / "tokenizer.json"
    shard = open_shard(dataset / "train-00000.shard")
    write_megatron(tmp_path / "corpus", [shard], 2)
    megatron = (lone, f"data.path={tmp_path / 'corpus'}", f"data.tokenizer={tokenizer}")
    assert mikoshi("data", "verify", *megatron)[0] == 0
    code, out, _ = mikoshi("data", "inspect", *megatron, "--step", 2, "--rows", 1)
    assert code == 0 and f"{tmp_path / 'corpus'}, train part row " in out
    assert mikoshi("data", "stats", *megatron)[1].count("made elsewhere: megatron") == 1
    assert mikoshi("data", "in-order", tmp_path / "corpus", tmp_path / "new" / "again")[0] == 0
    assert (tmp_path / "new" / "again.bin").read_bytes() == (tmp_path / "corpus.bin").read_bytes()
    assert mikoshi("data", "to-megatron", lone, tmp_path / "written")[0] == 0
    assert (tmp_path / "written.bin").read_bytes() == shard.tokens.astype("<u2").tobytes()
    content = bytearray((tmp_path / "corpus.bin").read_bytes())
    content[2 * 1001 + 1] = 0x7F  # an id beyond the vocabulary
    (tmp_path / "corpus.bin").write_bytes(content)
    code, _, errors = mikoshi("data", "verify", *megatron)
    assert code == 2 and len(errors) == 1 and "corpus.bin" in errors[0]
    shutil.copytree(dataset, tmp_path / "far")
    far = (lone, f"data.path=file://{tmp_path / 'far'}", f"data.cache.folder={tmp_path / 'cache'}")
    code, out, errors = mikoshi("data", "verify", *far)
    assert (code, errors) == (0, []) and ": whole" in out
    flip(tmp_path / "far" / "train-00000.shard", 5000)
    code, _, errors = mikoshi("data", "verify", *far[:2], f"data.cache.folder={tmp_path / 'other'}")
    assert code == 2 and len(errors) == 1 and "train-00000.shard" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "RUN", "--step", -1], ["--step -1", "give 0"]),
        (["inspect", "RUN", "--step", 10**30], ["--step 1000", "no such step"]),
        (["inspect", "RUN", "--row", 4], ["--row 4", "rows 0 to 3"]),
        (["inspect", "RUN", "--row", -7], ["--row -7"]),
        (["sample", "RUN", "--source", "web"], ["--source web", "leave --source out"]),
        (["sample", "MIXED", "--source", "web"], ["--source web", "text, chat"]),
        (["inspect", "RUN", "data.path=nowhere"], ["data.path", "nowhere", "mikoshi prepare"]),
        (["verify", "RUN", "data.path=nowhere"], ["data.path", "nowhere", "mikoshi prepare"]),
        (["stats", "RUN", "data.stream=true"], ["data.stream = true", "prepare the data"]),
        (["inspect", "MIXED", "--step", 10**6, "data.mixture.text.epochs=1"], ["data.mixture", "epochs"]),
        (["inspect", "nowhere.toml"], ["nowhere.toml", "cannot read"]),
    ],
)
def test_mistakes_are_one_line(lone, mixed, mikoshi, arguments, words):
    names = {"RUN": lone, "MIXED": mixed}
    code, _, errors = mikoshi("data", *(names.get(a, a) for a in arguments))
    assert code == 2
    assert len(errors) == 1, errors
    for word in words:
        assert word in errors[0]


def test_help_has_examples(mikoshi):
    for verb in ("inspect", "stats", "sample", "verify"):
        code, out, _ = mikoshi("data", verb, "--help")
        assert code == 0 and "Example" in out
