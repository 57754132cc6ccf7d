"""A layout as it is shown: every piece with somebody, every word inside the picture, every refusal one line."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from mikoshi.launch.cli import main as cli
from mikoshi.parallel.layout import Layout
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.inspect.layout import bubble_of, degrees, format_count, layout_view, span, spans
from mikoshi.trainer.inspect.layout_svg import draw_layout
from mikoshi.trainer.inspect.layout_text import text_timeline
from mikoshi.trainer.model.gpt import GPT
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.report.page import write_report
from runs import TINY_MODEL, run_config

DEEP = {**TINY_MODEL, "layers": 8, "width": 64, "heads": 8, "kv_heads": 2}
SPARSE = {**DEEP, "moe": {"experts": 8, "top_k": 2, "width": 32, "first": 2}}
LAYOUTS = {
    "alone": (1, TINY_MODEL, {}),
    "data": (8, TINY_MODEL, {"zero": 3}),
    "three": (8, DEEP, {"tp": 2, "pp": 2}),
    "few-kv": (8, DEEP, {"tp": 4, "zero": 1, "replicas": 2}),
    "context": (4, DEEP, {"cp": 2, "tp": 2}),
    "ulysses": (8, DEEP, {"cp": 4, "tp": 2, "context_kind": "ulysses"}),
    "interleaved": (8, DEEP, {"pp": 4, "schedule": "interleaved-zb"}),
    "v-shaped": (4, DEEP, {"pp": 4, "schedule": "zbv"}),
    "experts": (16, SPARSE, {"pp": 2, "tp": 2, "ep": 4, "expert_tp": 1}),
    "experts-cut": (64, SPARSE, {"pp": 4, "tp": 2, "ep": 8, "schedule": "1f1b"}),
    "many": (512, {**SPARSE, "layers": 32}, {"pp": 16, "tp": 2, "ep": 8, "schedule": "interleaved", "virtual_stages": 2}),
}


def config_of(model, parallel, tmp_path="runs"):
    train = {"global_batch": 256, "micro_batch": 1}
    return run_config("nowhere", tmp_path, model=model, parallel=parallel, train=train)


@pytest.fixture(params=LAYOUTS, scope="module")
def shown(request):
    world, model, parallel = LAYOUTS[request.param]
    config = config_of(model, parallel)
    return config, layout_view(config, world)


def parts(ranges, whole):
    """Whether ranges, in order, are all of range(whole), each number once."""
    return [n for numbers in sorted(ranges, key=lambda r: r.start) for n in numbers] == list(range(whole))


def test_every_piece_is_with_somebody(shown):
    config, view = shown
    model, layout = config.model, view.layout
    assert len(view.ranks) == layout.world
    for data in range(layout.data_ranks):
        for cp in range(layout.cp):
            for tp in range(layout.tp):
                column = [r for r in view.ranks if (r.at.data, r.at.cp, r.at.tp) == (data, cp, tp)]
                assert parts([view.stages[s].layers for r in column for s in r.stages], model.layers), "one whole model"
    first = [r for r in view.ranks if r.at.pp == 0]
    assert parts({r.rows for r in first}, config.train.global_batch)
    assert len({r.rows for r in first}) == layout.data_ranks
    assert parts({r.heads for r in first}, model.heads)
    assert {h * model.n_kv // model.heads for r in first for h in r.heads} == {k for r in first for k in r.kv_heads}
    for tp in range(layout.tp):
        row = [r for r in first if (r.at.data, r.at.tp) == (0, tp)]
        assert parts([piece for r in row for piece in r.tokens], config.train.context)
    for pp in range(layout.pp):
        inside = [r for r in view.ranks if r.at.pp == pp]
        moe = any(model.is_moe(layer) for r in inside for s in r.stages for layer in view.stages[s].layers)
        assert all((r.experts is not None) == moe for r in inside)
        if moe:
            assert parts({r.experts for r in inside}, model.moe.experts)
            assert len({r.experts for r in inside}) == layout.ep


def test_shares_add_up(shown):
    config, view = shown
    assert sum(s.flops for s in view.stages) == pytest.approx(1)
    with torch.device("meta"):
        whole = sum(p.numel() for p in GPT(config.model).parameters())
    assert sum(s.parameters for s in view.stages) == whole
    assert [(s.embedding, s.head) for s in view.stages][0 :: max(1, len(view.stages) - 1)] in (
        [(True, True)], [(True, False), (False, True)],
    )  # fmt: skip
    kept = sum(r.kept.optimizer for r in view.ranks)
    assert kept >= whole * view.layout.state_grid[0] * 0.99, "every replica keeps the whole"
    assert all(r.kept.optimizer <= r.kept.gradients <= r.kept.parameters for r in view.ranks)


def test_a_layout_by_hand():
    view = layout_view(config_of(DEEP, {"tp": 2, "pp": 2, "cp": 2}), 8, node_ranks=4)
    assert degrees(view).startswith(
        "8 ranks = pp 2 x replicas 1 x shards 1 x cp 2 (all-gather) x tp 2; ZeRO 2; schedule 1f1b, "
    )
    assert degrees(view).endswith("256 micro-batches of 1 row, bubble 0.4%")
    rank = view.ranks[7]
    assert (rank.node, rank.stages, rank.heads, rank.kv_heads) == (1, (1,), range(4, 8), range(1, 2))
    assert (rank.tokens, rank.rows) == ((range(16, 48),), range(256))
    assert view.ranks[0].tokens == (range(16), range(48, 64))
    assert rank.kept.gradients == rank.kept.parameters, "a pipeline adds up its micro-batches' gradients whole"


def test_what_zero_leaves_on_a_rank():
    sizes = {}
    for zero in (0, 1, 2, 3):
        kept = layout_view(config_of(TINY_MODEL, {"zero": zero}), 4).ranks[0].kept
        sizes[zero] = (kept.parameters, kept.gradients, kept.optimizer)
    whole, part = sizes[0][0], sizes[3][0]
    assert whole / 4 <= part < whole / 4 * 1.01
    assert sizes == {0: (whole,) * 3, 1: (whole, whole, part), 2: (whole, part, part), 3: (part,) * 3}


def test_an_experts_share_of_a_rank():
    """Of 8 experts over ep 4 x expert_tp 2 on 8 ranks, a rank keeps 1/8 and nothing is left to share out."""
    view = layout_view(config_of({**SPARSE, "moe": {**SPARSE["moe"], "first": 0}}, {"tp": 2, "ep": 4, "zero": 3}), 8)
    assert [r.experts.start for r in view.ranks] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert view.layout.expert_grid == (1, 1)


def test_the_clock_in_characters():
    lines = text_timeline(Layout(pp=2, micro_batches=2))
    assert lines[:2] == ["pipeline rank 0  FF..BB.BB", "pipeline rank 1  .FBBFBB.."]
    assert sum(line.count(".") for line in lines[:2]) / 18 == pytest.approx(bubble_of(Layout(pp=2, micro_batches=2)))
    long = text_timeline(Layout(pp=16, micro_batches=64))
    assert len(long) == 9
    assert "the first 8 of 16 pipeline ranks, the first 100 of 237 units" in long[-1]


def test_words():
    assert [format_count(n) for n in (950, 7_090_000, 67e6, 999_900, 1.8e12)] == ["950", "7.09M", "67.0M", "1,000k", "1.80T"]
    assert (span(range(3, 4)), spans([range(2), range(2, 4), range(6, 7)])) == ("3", ["0-3", "6"])


def box_of(text):
    """Left, top, right and bottom of a text, by what letters take at most in the mean."""
    x, y, size = (float(text.get(name)) for name in ("x", "y", "font-size"))
    width = len(text.text) * size * 0.54
    left = x - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
    return left, y - size * 0.75, left + width, y + size * 0.2


@pytest.mark.parametrize("node_ranks", [1, 4, 8, 72])
def test_every_word_is_inside_the_picture_and_on_no_other(shown, node_ranks):
    config, view = shown
    root = ElementTree.fromstring(draw_layout(layout_view(config, view.layout.world, node_ranks)))
    _, _, width, height = map(float, root.get("viewBox").split())
    texts = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if e.text]
    boxes = sorted((box_of(text), text.text) for text in texts)
    for (left, top, right, bottom), words in boxes:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, words
    for i, (a, words) in enumerate(boxes):
        for b, others in boxes[i + 1 :]:
            if b[0] >= a[2]:
                break
            assert b[1] >= a[3] or b[3] <= a[1], (words, others)
    assert not re.search(r"(src|href|url)\b", draw_layout(view)), "nothing is fetched"
    said = [text.text for text in texts]
    assert view.layout.world > 64 or not any("…" in words for words in said), "nothing is cut short"
    ranks = [words for words in said if re.fullmatch(r"rank \d+", words)]
    assert len(ranks) == len(set(ranks)) >= min(view.layout.world, 8)
    assert len(ranks) == view.layout.world if view.layout.world <= 64 else len(ranks) <= 64
    assert any("bubble" in words for words in said) == (view.layout.pp > 1)


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(to_toml(config_of(DEEP, {})))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mikoshi", "layout", "run.toml", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return call


def test_the_command_prints_and_draws(command, tmp_path):
    code, out, _ = command("--world", 8, "parallel.tp=2", "parallel.pp=2", "--svg", "out.svg", "--node", 4)
    assert code == 0
    assert "8 ranks = pp 2 x replicas 1 x shards 2 x cp 1 x tp 2; ZeRO 2" in out
    rows = [line.split() for line in out.splitlines() if re.match(r" +[0-7] +[01] +[01] ", line)]
    assert [row[0] for row in rows] == [str(rank) for rank in range(8)], "no line is cut or wrapped"
    assert rows[7][1:3] == ["1", "1"]
    assert "pipeline rank 1  .FBBFBB" in out
    assert "\x1b" not in out
    assert ElementTree.parse(tmp_path / "out.svg").getroot().tag.endswith("svg")


def test_many_ranks_are_told_by_their_kinds(command):
    code, out, _ = command("--world", 256, "parallel.tp=2", "parallel.pp=2")
    assert code == 0
    assert len(out.splitlines()) < 60
    assert re.search(r"\b16 +55 more\b", out), "of the 64 ranks of its kind, 8 are among the first 16"
    assert re.search(r"\b128 +63 more\b", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world", 6, "parallel.tp=4"], "6 ranks cannot be laid out: tp 4 x pp 1 x cp 1 = 4 does not divide them; nearest"),
        (["--world", 8, "parallel.pp=8", "parallel.schedule=zbv"], "are more stages than model.layers 8; nearest that work"),
        (["--world", 2, "parallel.ep=2"], "parallel.ep 2: the model has no experts"),
        (["--world", 1, "--svg", "no/such/out.svg"], "no/such/out.svg: the drawing cannot be written there"),
        (["--world", 1, "--svg", "."], ".: the drawing cannot be written there"),
    ],
)
def test_refusals_are_one_line(command, arguments, words):
    code, _, err = command(*arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert words in err


def test_the_report_has_the_drawing(tmp_path):
    folder = RunFolder(tmp_path)
    step = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 9, "step_seconds": 1.0, "tokens_per_second": 9.0}
    folder.metrics.write_text(json.dumps(step | {"memory_bytes": 1, "data_seconds": 0.0, "time": 0}) + "\n")
    start = {"time": 0, "event": "start", "step": 0, "ranks": 4, "zero": 2, "device": "CPU", "torch": "2"}
    folder.events.write_text(json.dumps(start) + "\n")
    for parallel, drawn in (({"pp": 2, "tp": 2}, True), ({"pp": 3}, False)):
        folder.config.write_text(to_toml(config_of(DEEP, parallel)))
        write_report(folder, tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert ("<svg xmlns" in page.split("<h2>Layout</h2>")[1]) == drawn
        assert "4 rank(s) on CPU" in page
