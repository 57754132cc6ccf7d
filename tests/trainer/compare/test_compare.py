"""`mikoshi compare`: contestants take turns, figures are what their records say, and what cannot be is a row that says why."""

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import psutil
import pytest
from rich.console import Console

from mikoshi.launch.controller.rounds import machine, run_rounds, versions
from mikoshi.trainer.compare.comparison import (
    CONTESTANT,
    WARM_UP,
    Comparison,
    ComparisonPlan,
    Contestant,
    ContestantResult,
    Round,
    difference,
    figures,
    make_comparison,
    read_comparison,
    write_comparison_plan,
)
from mikoshi.trainer.compare.page import _decades, _differences, write_page
from mikoshi.trainer.compare.text import markdown, print_comparison, summary_lines, table
from mikoshi.trainer.config.run import load_config, to_toml
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import run_config

STEPS = WARM_UP + 2


def a_round(number, rates, losses=None, norms=None, memory=(1 << 30,), applied=True, **more):
    """Of `rates` that count, after warm-up steps that are far slower."""
    rates = [1.0] * WARM_UP + list(rates)
    losses, norms = losses or [5.0] * len(rates), norms or [1.0] * len(rates)
    steps = [
        {"step": n, "loss": loss, "grad_norm": norm, "tokens_per_second": rate, "step_seconds": 100 / rate, "applied": applied,
         **more}
        for n, (rate, loss, norm) in enumerate(zip(rates, losses, norms, strict=True), 1)
    ]  # fmt: skip
    return Round(number, steps, list(memory), [])


def test_the_figures_are_medians_of_the_steps_that_count():
    first = [a_round(1, [100, 100, 100]), a_round(2, [50, 50, 50])]
    other = [a_round(1, [120, 125, 400], memory=(5, 9)), a_round(2, [55, 60, 65], memory=(7, 8))]
    found = figures(other, first)
    assert found.tokens_per_second == 92.5
    assert found.quartiles == (61.25, 123.75)
    assert found.rounds == [125, 60]
    assert found.ratio == pytest.approx(1.225)  # of 1.25 and 1.2: the machine was twice as fast in the first round
    assert found.ratios == (1.2, 1.25)
    assert found.step_ms == pytest.approx(1000 * (100 / 120 + 100 / 65) / 2)
    assert found.memory == [7, 9]
    assert found.mfu is None
    assert figures([a_round(1, [1, 2], mfu=0.25)], first).mfu == 0.25


def a_comparison(*rounds, layouts=None, refused="", failed=""):
    """Of contestants with these rounds; the last is refused or has failed, if so."""
    names = [Contestant("native", layout, f"{n}-native") for n, layout in enumerate(layouts or [""] * len(rounds), 1)]
    names[-1] = replace(names[-1], refused=refused)
    plan = ComparisonPlan("run.toml", "mikoshi compare run.toml", 1, STEPS, len(rounds[0]), names, machine(), {"python": "3"})
    rows = [
        ContestantResult(one, "", of, figures(of, rounds[0]) if of else None) for one, of in zip(names, rounds, strict=True)
    ]
    rows[-1] = replace(rows[-1], failed=failed)
    return Comparison(plan, rows, [], 0, True)


def test_one_round_has_no_range_and_says_that_it_tells_nothing_of_the_machine():
    one = a_comparison([a_round(1, [100, 100])], [a_round(1, [178, 178])])
    assert one.rows[1].figures.ratios is None
    assert "1.78x |" in markdown(one)
    assert "1.78x to" not in markdown(one)
    assert "one round: how much of a difference is the machine's is not known: --rounds 2 or more tells" in summary_lines(one)
    twice = a_comparison([a_round(1, [100, 100]), a_round(2, [100, 100])], [a_round(1, [178, 178]), a_round(2, [180, 180])])
    assert "1.78x to 1.80x" in markdown(twice)
    assert not any(line.startswith("one round") for line in summary_lines(twice))
    json.dumps(one.as_json(), allow_nan=False)


def printed(found, width):
    """What is printed where lines have so many columns, without the words below, which may be longer."""
    text = io.StringIO()
    print_comparison(found, Console(file=text, soft_wrap=True, width=500), width)
    return [line.rstrip() for line in text.getvalue().partition("1 rank(s) on")[0].splitlines() if line.strip()]


LAYOUTS = ["zero=3", "pp=2 zero=3", "tp=2 train.micro_batch=4"]


def three(**more):
    rounds = [[a_round(n, [100 * n, 110 * n + k, 120 * n]) for n in (1, 2)] for k in (0, 8)]
    return a_comparison(*rounds, [], refused="engine.kind: it has no such thing", layouts=LAYOUTS, **more)


def test_what_is_printed_is_no_wider_than_the_terminal():
    found = three()
    *shown, why = printed(found, 190)
    assert why == "native, tp=2 train.micro_batch=4: refused: engine.kind: it has no such thing"
    assert any(re.match(r"native +pp=2 zero=3 +\d+ +1.0\dx \(1.0\d to 1.0\d\) .* same$", line) for line in shown)
    assert any(re.match(r"native +tp=2 train.micro_batch=4 +refused$", line) for line in shown)
    widest = max(map(len, shown))
    assert 80 < widest <= 120
    assert printed(found, widest + 5) == [*shown, why]
    *narrow, why = printed(found, 80)
    assert max(map(len, narrow)) < 80
    assert why.endswith("refused: engine.kind: it has no such thing")
    block = narrow[narrow.index("native, pp=2 zero=3") + 1 :]
    assert re.match(r"  \d+ tokens/s \(\d+ to \d+\), step [\d.]+ ms$", block[0])
    assert re.match(r"  speed 1.0\dx \(1.0\dx to 1.0\dx\)$", block[2])
    assert block[4] == "  first loss: same bits"


def test_a_column_in_which_nobody_says_anything_is_left_out():
    alike = a_comparison([a_round(1, [100, 100])], [a_round(1, [178, 178])])
    assert not {"layout", "MFU", "in the rounds", ""} & set(table(alike)[0])
    found = a_comparison([a_round(1, [1, 1], mfu=0.5)], [a_round(1, [1, 1])], layouts=["", "zero=3"])
    assert [row["layout"] for row in table(found)] == ["as the config says", "zero=3"]
    assert [row["MFU"] for row in table(found)] == ["50.0%", ""]
    assert all(any("50.0%" in line for line in printed(found, width)) for width in (190, 10))
    lost = a_comparison([a_round(1, [1, 1])], [a_round(1, [1, 1], applied=False)], failed="exit code 1: gone")
    *shown, why = printed(lost, 190)
    assert shown[-1].endswith("  FAILED")
    assert why.startswith("native: FAILED: exit code 1: gone; 5 steps were not applied")


def test_the_page_has_ranges_below_their_values_and_reasons_in_the_whole_width(tmp_path):
    write_page(three(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    head, _, rows = page.partition("<table>")[2].partition("</tr>")
    assert re.findall(r"<th>([^<]*)", head) == ["engine", "layout", "tokens/s", "speed", "step", "peak memory a rank",
                                                "loss apart", "grad norm apart", "first loss", ""]  # fmt: skip
    assert re.search(r"<td>1.0\dx<small>1.0\dx to 1.0\dx</small></td>", rows)
    assert "<td class='why' colspan='8'>refused: engine.kind: it has no such thing</td>" in rows


def test_a_step_without_a_difference_is_drawn_as_equal():
    losses = [5.0, 4.0, 3.0, 2.0, 1.0]
    apart = [5.0, 4.0 + 2e-4, 3.0, 2.0 + 3e-3, math.nan]
    rounds = [[a_round(1, [1, 1], losses)], [a_round(1, [1, 1], apart)], [a_round(1, [1, 1], losses)]]
    found = a_comparison(*rounds)
    (line,), equal, floor = _differences(list(enumerate(found.rows)), found.rows[0], "loss")
    assert equal == ["native"]
    assert floor == -5
    assert line.y == pytest.approx((1e-5, 2e-4, 1e-5, 3e-3, math.inf))
    assert list(line.text) == ["equal", "2.00e-04", "equal", "3.00e-03", "inf"]
    axis = _decades(line.y, floor)
    assert axis["tickvals"] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert axis["ticktext"] == ["equal", "10<sup>-4</sup>", "10<sup>-3</sup>", "10<sup>-2</sup>"]
    assert axis["range"] == [-5.2, -1.8]


def test_differences_are_those_of_every_step_and_round():
    steps = WARM_UP + 1
    exact = [5.0] * steps
    first = [a_round(1, [1], exact), a_round(2, [1], exact)]
    apart = figures([a_round(1, [1], exact), a_round(2, [1], [5.0, 5.0, 4.5, 5.25])], first)
    assert (apart.loss.absolute, apart.loss.relative, apart.loss.step) == (0.5, 0.1, 3)
    assert apart.grad_norm.absolute == 0.0
    assert apart.own == 0.5
    assert apart.same_first_loss
    near = figures([a_round(1, [1], [math.nextafter(5.0, 6), *exact[1:]])], first)
    assert not near.same_first_loss
    broken = figures([a_round(1, [1], [5.0, math.nan, 5.0, 5.0], applied=False)], first)
    assert broken.loss.absolute == math.inf
    assert broken.loss.step == 2
    assert broken.left == steps


@pytest.mark.parametrize(
    ("a", "b", "absolute", "relative"),
    [
        (1.0, 1.0, 0, 0), (1.5, 1.0, 0.5, 0.5), (3.0, 4.0, 1, 0.25), (math.nan, math.nan, 0, 0), (math.inf, math.inf, 0, 0),
        (math.nan, 1.0, math.inf, math.inf), (1.0, math.inf, math.inf, math.inf), (1.0, 0.0, 1, math.inf),
    ],
)  # fmt: skip
def test_what_is_no_number_is_infinitely_far_from_one(a, b, absolute, relative):
    assert difference(a, b) == absolute
    assert difference(a, b, relative=True) == relative


def test_everyone_comes_once_before_anyone_comes_again():
    names = [Contestant("native", "", "a"), Contestant("native", "x", "b", "refused"), Contestant("native", "", "c")]
    plan = ComparisonPlan("", "", 1, 5, 3, names, {}, {})
    assert plan.schedule == [(1, 0), (1, 2), (2, 2), (2, 0), (3, 0), (3, 2)]


@pytest.fixture
def config(dataset, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(run_config(dataset, tmp_path / "runs", run={"name": "tiny"}, train={"steps": 2000})))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engines", "native,deepsped"], "--engines native,deepsped: 'deepsped' is none of native, deepspeed, megatron"),
        (["--layouts", "zero=9"], '--layouts "zero=9": command line: parallel.zero = 9: input should be 0, 1, 2 or 3'),
        (["--layouts", "zero=1", "--layouts", "foo=1"], '--layouts "foo=1": command line: parallel.foo: unknown key'),
        (["--layouts", "tp"], "--layouts \"tp\": 'tp' is no setting: write key=value"),
        (["--layouts", "run.seed=2"], '--layouts "run.seed=2": run.seed is not of a layout'),
        (["--layouts", "engine.kind=native"], '--layouts "engine.kind=native": engine.kind is not of a layout'),
        (
            ["--layouts", "tp=2 parallel.tp=1"],
            '--layouts "tp=2 parallel.tp=1": parallel.tp is there twice, as 2 and as 1: keep',
        ),
        (["--layouts", "tp=2,zero=1"], "--layouts \"tp=2,zero=1\": 'tp=2,zero=1': settings are separated by spaces"),
        (["--layouts", "tp=2;engine.recompute=full"], "settings are separated by spaces"),
        (["--layouts", "tp=2, zero=1"], "'tp=2,': settings are separated by spaces"),
        (["--engines", ""], "--engines '': names no engine: give some of native, deepspeed, megatron"),
        (["--steps", WARM_UP + 1], f"--steps {WARM_UP + 1}: too few"),
        (["--steps", 2001], "--steps 2001: the run has but 2000"),
        (["--out", "."], "--out .: exists already"),
        (["data.path=nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_mistake_ends_the_command_before_anything_runs(mikoshi, config, arguments, said):
    code, _, errors = mikoshi("compare", config, *arguments)
    assert code == 2
    assert len(errors) == 1
    assert said in errors[0]
    assert not (config.parent / "runs").exists()


def test_layouts_beside_each_other(mikoshi, config):
    layouts = [part for text in ("zero=0", "tp=3", "tp=2") for part in ("--layouts", text)]
    code, out, errors = mikoshi("compare", config, *layouts, "--ranks", 2, "--steps", STEPS, "--rounds", 2, "--json")
    assert (code, errors) == (0, [])
    told, folder = json.loads(out), config.parent / "runs" / "compare-tiny"
    assert json.loads((folder / "summary.json").read_text()) == told
    assert told["complete"]
    whole, refused, tensor = told["contestants"]
    assert "tp 3" in refused["refused"]
    assert refused["figures"] is None
    # In turn, by what each run itself has recorded: not by the plan.
    spans = []
    for number, one in enumerate(told["contestants"]):
        for turn in (1, 2):
            times = [record["time"] for record in read_jsonl(folder / one["folder"] / f"round-{turn}" / "metrics.jsonl")]
            assert len(times) == (0 if one["refused"] else STEPS)
            if times:
                spans.append((times[0], times[-1], (turn, number)))
    spans.sort()
    assert [turn for _, _, turn in spans] == [(1, 0), (1, 2), (2, 2), (2, 0)]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    # The layout is not the run.
    assert tensor["figures"]["loss"]["relative"] < 1e-5
    assert tensor["figures"]["grad_norm"]["relative"] < 1e-5
    assert len(tensor["figures"]["memory"]) == 2
    assert whole["figures"]["loss"]["absolute"] == 0.0
    # Nothing is evaluated and nothing saved, and the table can be made again.
    kinds = {e["event"] for one in told["contestants"] for e in read_jsonl(folder / one["folder"] / "round-1" / "events.jsonl")}
    assert kinds == {"start", "end"}
    assert not list(folder.rglob("manifest.json"))
    code, out, _ = mikoshi("compare", folder)
    assert code == 0
    assert out.count("native") >= 3
    page = (folder / "compare.html").read_text()
    assert "refused: 2 ranks cannot be laid out" in page
    assert f"{whole['figures']['tokens_per_second']:,.0f}" in page
    assert "http" not in page.split("<body>")[1]


def test_where_nobody_can_run_each_row_says_why(mikoshi, config):
    command = ("compare", config, "--layouts", "tp=3", "--layouts", "cp=5", "--ranks", 2, "--steps", STEPS)
    for _ in range(2):  # what was refused is in nobody's way
        code, out, errors = mikoshi(*command)
        assert code == 2
        assert out.count("cannot be laid out") == 2
        assert errors == ["error: no contestant can run, for the reasons above; no folder was made"]
        assert not (config.parent / "runs").exists()
    code, out, _ = mikoshi(*command, "--json")
    assert code == 2
    assert all("cannot be laid out" in one["refused"] for one in json.loads(out)["contestants"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--steps", 7], "--steps"), (["--out", "foo"], "--out"), (["--engines", "native"], "--engines"),
     (["--rounds", 3], "--rounds"), (["train.steps=9", "--ranks", 2], "overrides, --ranks")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_of_a_comparison_that_is_there_nothing_can_be_set(mikoshi, tmp_path, arguments, named):
    plan = ComparisonPlan("run.toml", "", 1, STEPS, 1, [Contestant("native", "", "1-native", "why")], machine(), versions())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "plan.json").write_text(json.dumps(asdict(plan)))
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = mikoshi("compare", "old", *arguments)
    assert code == 2
    assert errors == [
        f"error: {named}: old is a comparison that is there, of which nothing can be set: give the run's TOML file"
    ]
    assert sorted(tmp_path.rglob("*")) == before
    assert mikoshi("compare", "old", "--json")[0] == 0


def test_the_help_says_the_fewest_steps(mikoshi):
    _, out, _ = mikoshi("compare", "--help")
    assert f"{WARM_UP + 2} or more, as {WARM_UP} are to warm up" in " ".join(out.replace("│", " ").split())


@pytest.mark.slow
def test_one_that_fails_is_told_and_ends_no_other(config, tmp_path):
    out = tmp_path / "out"
    contestants, configs = make_comparison(config, [], "native", ["zero=0", "zero=1"], 1, STEPS, out)
    write_comparison_plan(ComparisonPlan("run.toml", "", 1, STEPS, 2, contestants, machine(), versions()), configs, out)
    lost = out / contestants[0].folder / CONTESTANT
    lost.write_text(lost.read_text().replace(load_config(lost).data.path, "gone"))  # after preflight
    seen = []
    run_rounds(out, seen.append)
    found = read_comparison(out)
    assert found.complete
    assert [bool(row.failed) for row in found.rows] == [True, False]
    assert [len(row.rounds) for row in found.rows] == [0, 2]
    assert found.first == 1  # what the others are compared with
    assert "gone" in found.rows[0].failed
    assert [run["code"] for run in found.runs if "ended" in run and run["contestant"] == 0] == [2]  # tried once
    assert seen[-1].done == seen[-1].runs == 3
    assert "FAILED: exit code 2" in markdown(found)
    assert len({tuple(row) for row in table(found)}) == 1

    from mikoshi.launch.cli.compare import _exit_code

    assert _exit_code(found, out) == 1


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_and_keeps_what_was_measured(config, tmp_path):
    command = [sys.executable, "-P", "-m", "mikoshi", "compare", str(config), "--ranks", "2", "--steps", "2000"]
    command += ["--out", str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        metrics = tmp_path / "out" / "1-native" / "round-1" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while len(read_jsonl(metrics)) < WARM_UP + 5:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(child.pid).children(recursive=True)
        os.kill(child.pid, signal.SIGINT)
        out, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert len(family) >= 4  # what runs them, its nursery, two ranks
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert "NOT COMPLETE" in out
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not found["complete"]
    assert found["contestants"][0]["figures"]["tokens_per_second"] > 0
