"""Figures as SVG: every value at its place and with its words, in a page that is small and loads nothing."""

import html
import json
import math
import re
import xml.etree.ElementTree as ET

import plotly.graph_objects as go
import pytest

from layouts import BASE
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.report.chart import chart
from mikoshi.trainer.report.page import write_report
from runs import run_config


def drawn(lines, **layout):
    figure = go.Figure(lines)
    figure.update_layout(height=300, **layout)
    return ET.fromstring(chart(figure)).find("svg")


def paths(svg, line):
    group = next(g for g in svg.iter("g") if g.get("data-line") == str(line))
    return [
        [tuple(map(float, p.split(","))) for p in re.findall(r"[\d.]+,[\d.]+", path.get("d"))] for path in group.iter("path")
    ]


def texts(svg):
    return [text.text for text in svg.iter("text")]


def test_a_line_is_broken_where_there_is_no_value_and_says_what_it_is_at_each():
    y = [1.0, 2.0, math.nan, None, math.inf, 3.0]
    line = go.Scatter(x=[0, 10, 20, 30, 40, 50], y=y, name="a<b", hovertemplate="%{y:.2f}<extra>a&lt;b</extra>")
    svg = drawn([line], hovermode="x unified", xaxis={"title": "step", "range": [0, 50]}, yaxis={"range": [0, 4]})
    ((first, second, last),) = paths(svg, 0)
    assert first[0] == 60.0 and second[0] == pytest.approx(60 + (560 - 24 - 60) / 5)
    assert last[0] == 560 - 24
    assert first[1] - second[1] == pytest.approx((300 - 44 - 12) / 4, abs=0.2)
    rows = json.loads(svg.get("data-rows"))
    assert [(head, [text for _, text, _ in said]) for _, head, said in rows] == [
        ("step 0", ["a<b: 1.00"]), ("step 10", ["a<b: 2.00"]), ("step 50", ["a<b: 3.00"]),
    ]  # fmt: skip
    assert {"0", "10", "50", "step", "4"} <= set(texts(svg))


def test_bars_stand_side_by_side_or_on_each_other_and_areas_add_up():
    bars = [go.Bar(x=["a", "b"], y=[1, 2], name=name, hovertemplate="%{y}<extra></extra>") for name in ("one", "two")]
    beside = [rect for rect in drawn(bars).iter("rect") if rect.find("title") is not None]
    assert len({rect.get("x") for rect in beside}) == 4
    lying = [go.Bar(x=[30], y=[""], orientation="h"), go.Bar(x=[70], y=[""], orientation="h")]
    one, two = [r for r in drawn(lying, barmode="stack", xaxis={"range": [0, 100]}).iter("rect") if r.find("title") is not None]
    assert float(one.get("x")) + float(one.get("width")) == pytest.approx(float(two.get("x")), abs=0.2)
    assert float(two.get("width")) / float(one.get("width")) == pytest.approx(7 / 3, rel=0.01)
    areas = [
        go.Scatter(x=[0, 1, 2], y=y, stackgroup="one", mode="lines", line={"shape": "hv"}) for y in ([60, 20, 20], [40, 80, 80])
    ]
    svg = drawn(areas, yaxis={"range": [0, 100]}, showlegend=False)
    assert {y for _, y in paths(svg, 1)[1]} == {12.0}, "all of both is the top"
    assert len(paths(svg, 0)[1]) == 6, "each value is held up to the next"


def test_an_axis_of_logarithms_has_the_numbers_that_it_is_given():
    axis = {"type": "log", "range": [-4, 0], "tickvals": [1e-4, 1e-2], "ticktext": ["equal", "10<sup>-2</sup>"]}
    svg = drawn([go.Scatter(x=[1, 2], y=[1e-4, 1e-2])], yaxis=axis)
    assert {"equal", "10⁻²"} <= set(texts(svg))
    ((low, middle),) = paths(svg, 0)
    assert low[1] - middle[1] == pytest.approx((300 - 26 - 12) / 2, abs=0.2)


def test_what_a_run_is_called_is_text_and_no_markup():
    page = chart(go.Figure([go.Scatter(x=[1], y=[1], name="<script>x</script>")]).update_layout(height=200, showlegend=True))
    assert "<script" not in page
    assert "<script>x</script>" in html.unescape(page)


@pytest.mark.parametrize("steps", [300, 20_000])
def test_a_report_is_small_and_loads_nothing(tmp_path, dataset, steps):
    config = run_config(dataset, tmp_path, model=BASE)
    folder = RunFolder(tmp_path)
    folder.config.write_text(to_toml(config))
    figures = {"grad_norm": 1.1, "lr": 3e-4, "tokens": 9, "step_seconds": 0.1, "tokens_per_second": 90.5}
    figures["memory_bytes"] = 1 << 30
    rows = [figures | {"step": n, "loss": 5 + math.sin(n), "data_seconds": n % 7 / 100, "time": n} for n in range(1, steps + 1)]
    rows += [{"step": n, "eval_loss": 5.0, "time": n} for n in range(50, 301, 50)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"time": 0, "event": "start", "step": 0, "ranks": 1, "zero": 2, "device": "CPU", "torch": "2", "unigram_nats": 6.0}
    folder.events.write_text(json.dumps(start) + "\n")
    write_report(folder, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert len(page.encode()) < (300_000 if steps == 300 else 1_500_000)
    assert page.count('class="plot"') >= 6
    assert not re.search(r"\b(src|href)=|https?://(?!www\.w3\.org)|@import|fetch\(", page)
    assert steps > 300 or "training: 5.84147" in html.unescape(page)
