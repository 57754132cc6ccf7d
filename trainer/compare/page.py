"""A comparison as one self-contained HTML page: the table, tokens/s and memory as bars, losses and how far they are apart."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go

from mikoshi.data.io.atomic import write_file
from mikoshi.trainer.compare.comparison import WARM_UP, Comparison, ContestantResult, difference
from mikoshi.trainer.compare.text import summary_lines, table
from mikoshi.trainer.errors import RunError
from mikoshi.trainer.report.chart import SCRIPT, STYLE, chart

_COLOURS = ("#2457a6", "#d9762b", "#3b8f5a", "#8c5fb0", "#b8434e", "#4aa3b8", "#a68a2d", "#6b7280")
_DASHES = ("solid", "dash", "dot", "dashdot")
_GIB = 2**30


def write_page(found: Comparison, target: Path) -> None:
    """Make the page of a comparison in which something was measured. Raises RunError where it cannot be written."""
    page = _PAGE.substitute(
        title=html.escape(f"{found.plan.config}: {len(found.rows)} contestants"),
        words="".join(f"<li>{html.escape(line)}</li>" for line in summary_lines(found)),
        command=html.escape(found.plan.command),
        table=_table(found),
        charts="\n".join(_charts(found)),
        style=STYLE,
        script=SCRIPT,
        made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )
    try:
        write_file(target, page.encode())
    except OSError as error:
        raise RunError(f"{target}: the page cannot be written there: {error.strerror}") from None


def _charts(found: Comparison) -> list[str]:
    rows = [(number, row) for number, row in enumerate(found.rows) if row.figures is not None]
    assert found.first is not None
    first = found.rows[found.first]
    beside = f"from {first.contestant.name}'s"
    charts = [
        _chart("Tokens/s: median; a dot is the median of a round", _speeds(rows), _bars_axis(rows), bars=len(rows)),
        _chart("Peak memory, GiB: the most of all ranks; a dot is a rank", _memory(rows), _bars_axis(rows), bars=len(rows)),
        *([_chart("MFU: median", _mfu(rows), _bars_axis(rows), bars=len(rows))] if _mfu(rows) else []),
        _chart("Loss of the first round, nats a token", _losses(rows), tall=True),
    ]
    for key, name in (("loss", "Loss"), ("grad_norm", "Gradient norm")):
        lines, equal, floor = _differences(rows, first, key)
        note = f"The same bits in every step: {', '.join(equal)}." if equal else ""
        if lines or equal:
            charts.append(_chart(f"{name}: largest difference {beside}, of any round", lines, floor=floor, note=note))
    return charts


def _name(number: int, row: ContestantResult) -> str:
    """Two contestants may be called the same."""
    return f"{number + 1}. {html.escape(row.contestant.name)}"


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _bars_axis(rows: Sequence[tuple[int, ContestantResult]]) -> dict[str, Any]:
    """The first contestant on top."""
    return {"categoryorder": "array", "categoryarray": [_name(*row) for row in reversed(rows)], "automargin": True}


def _speeds(rows: Sequence[tuple[int, ContestantResult]]) -> list[Any]:
    values = [(number, row, row.figures.tokens_per_second, row.figures.rounds) for number, row in rows if row.figures]
    return [_bars([(n, row, value) for n, row, value, _ in values], "tokens/s", ",.0f")] + [
        _dots(n, row, dots, [f"round {r.number}" for r in row.rounds], ",.0f") for n, row, _, dots in values
    ]


def _memory(rows: Sequence[tuple[int, ContestantResult]]) -> list[Any]:
    values = [(number, row, [peak / _GIB for peak in row.figures.memory]) for number, row in rows if row.figures]
    return [_bars([(n, row, max(peaks)) for n, row, peaks in values], "GiB", ".2f")] + [
        _dots(n, row, peaks, [f"rank {rank}" for rank in range(len(peaks))], ".2f") for n, row, peaks in values
    ]


def _mfu(rows: Sequence[tuple[int, ContestantResult]]) -> list[Any]:
    """Nothing where the peak of the processor is not known."""
    known = [(n, row, row.figures.mfu) for n, row in rows if row.figures and row.figures.mfu is not None]
    return [_bars(known, "of the peak", ".1%")] if known else []


def _bars(values: Sequence[tuple[int, ContestantResult, float]], unit: str, shape: str) -> go.Bar:
    return go.Bar(
        x=[value for _, _, value in values], y=[_name(n, row) for n, row, _ in values], orientation="h", opacity=0.75,
        marker={"color": [_colour(n) for n, _, _ in values]}, text=[format(value, shape) for _, _, value in values],
        textposition="inside", insidetextanchor="start", insidetextfont={"color": "#fff"},
        hovertemplate=f"%{{x:{shape}}} {unit}<extra></extra>",
    )  # fmt: skip


def _dots(number: int, row: ContestantResult, values: Sequence[float], names: Sequence[str], shape: str) -> go.Scatter:
    return go.Scatter(
        x=list(values), y=[_name(number, row)] * len(values), mode="markers", text=list(names),
        marker={"color": "#1d2129", "size": 8, "line": {"color": "#fff", "width": 1.5}},
        hovertemplate=f"%{{text}}: %{{x:{shape}}}<extra></extra>",
    )  # fmt: skip


def _losses(rows: Sequence[tuple[int, ContestantResult]]) -> list[Any]:
    return [_line(n, row, [(r["step"], r["loss"]) for r in row.rounds[0].steps], ".6f") for n, row in rows]


def _differences(
    rows: Sequence[tuple[int, ContestantResult]], first: ContestantResult, key: str
) -> tuple[list[Any], list[str], int]:
    """Lines, the names of those that have none, and the power of ten at which the lines have their steps without a
    difference: an axis of logarithms has no zero."""
    found = [(number, row, _by_step(row, first, key)) for number, row in rows if row is not first]
    equal = [row.contestant.name for _, row, most in found if not any(most.values())]
    finite = [value for _, _, most in found for value in most.values() if value and math.isfinite(value)]
    floor = math.floor(math.log10(min(finite))) - 1 if finite else -1
    lines = []
    for number, row, most in found:
        if any(most.values()):
            line = _line(number, row, [(step, value or 10.0**floor) for step, value in most.items()], "")
            line.text = [f"{value:.2e}" if value else "equal" for value in most.values()]
            line.hovertemplate = line.hovertemplate.replace("%{y:}", "%{text}")
            lines.append(line)
    return lines, equal, floor


def _by_step(row: ContestantResult, first: ContestantResult, key: str) -> dict[int, float]:
    """The largest difference of all rounds in every step."""
    theirs = {each.number: each for each in first.rounds}
    most: dict[int, float] = {}
    for each in row.rounds:
        for a, b in zip(each.steps, theirs.get(each.number, first.rounds[0]).steps, strict=False):
            most[a["step"]] = max(most.get(a["step"], 0.0), difference(a[key], b[key]))
    return most


def _line(number: int, row: ContestantResult, points: Sequence[tuple[int, float | None]], shape: str) -> go.Scatter:
    """Dashed for those that come later: what lies below shows through."""
    return go.Scatter(
        x=[step for step, _ in points], y=[value for _, value in points], name=_name(number, row), mode="lines+markers",
        line={"color": _colour(number), "width": 2, "dash": _DASHES[number % len(_DASHES)]}, marker={"size": 5},
        hovertemplate=f"%{{y:{shape}}}<extra>{_name(number, row)}</extra>",
    )  # fmt: skip


def _chart(
    title: str, lines: list[Any], y: dict[str, Any] | None = None, bars: int = 0, tall: bool = False,
    floor: int | None = None, note: str = "",
) -> str:  # fmt: skip
    below = f"<p>{html.escape(note)}</p>" if note else ""
    wide = " tall" if tall or bars else ""
    if not lines:
        return f'<section class="chart{wide}"><h2>{html.escape(title)}</h2>{below}</section>'
    figure = go.Figure(lines)
    figure.update_layout(
        template="plotly_white", height=70 + 44 * bars if bars else 360 if tall else 300,
        margin={"l": 64, "r": 16, "t": 12, "b": 28 if bars else 40}, showlegend=not bars,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hovermode="closest" if bars else "x unified",
        font={"family": "system-ui, sans-serif", "size": 12}, bargap=0.3,
    )  # fmt: skip
    figure.update_yaxes(**(y or {}))
    if bars:
        figure.update_xaxes(rangemode="tozero")
    else:
        figure.update_xaxes(title="step", title_standoff=4)
        figure.update_yaxes(title_standoff=4, exponentformat="none")
        if floor is not None:
            figure.update_yaxes(type="log", **_decades([y for line in lines for y in line.y], floor))
            figure.add_hline(y=10.0**floor, line={"color": "#8a8f98", "width": 1, "dash": "dot"})
        else:
            figure.add_vrect(x0=0.5, x1=WARM_UP + 0.5, fillcolor="#8a8f98", opacity=0.12, line_width=0,
                             annotation_text="not timed", annotation_position="bottom left")  # fmt: skip
    body = chart(figure, wide=bool(wide))
    return f'<section class="chart{wide}"><h2>{html.escape(title)}</h2>{body}{below}</section>'


def _decades(values: Sequence[float], floor: int) -> dict[str, Any]:
    """An axis of logarithms with its numbers at whole powers of ten, eight at most, from `floor`, which is called equal, to
    above the values."""
    top = max([floor + 2, *(math.ceil(math.log10(value)) for value in values if math.isfinite(value))])
    powers = range(floor + 1, top + 1, -(-(top - floor) // 8))
    return {
        "range": [floor - 0.2, top + 0.2],
        "tickvals": [10.0**floor, *(10.0**power for power in powers)],
        "ticktext": ["equal", *(f"10<sup>{power}</sup>" for power in powers)],
    }


def _table(found: Comparison) -> str:
    """All of it, no wider than a page: the range of a figure stands below it. What has no figures says why in all the width."""
    rows = table(found)
    named = [name for name in rows[0] if name in ("engine", "layout")]
    shown = [name for name in rows[0] if name not in (*named, *_BELOW.values())]
    head = "".join(f"<th>{_two(*_apart(name))}</th>" for name in (*named, *shown))
    body = []
    for number, (row, cells) in enumerate(zip(found.rows, rows, strict=True)):
        kind = "failed" if row.failed else "refused" if row.contestant.refused else "first" if number == found.first else ""
        line = "".join(f"<td class='{name}'>{html.escape(cells[name])}</td>" for name in named)
        if row.figures is None:
            line += f"<td class='why' colspan='{len(shown)}'>{html.escape(cells.get('', ''))}</td>"
        else:
            line += "".join(f"<td{_WHY if not name else ''}>{_cell(cells, name)}</td>" for name in shown)
        body.append(f"<tr class='{kind}'>{line}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


_BELOW = {"tokens/s": "middle half of steps", "speed": "in the rounds"}
_WHY = " class='why'"


def _cell(cells: dict[str, str], name: str) -> str:
    """A figure, and its range or its relative below."""
    if not name:
        return html.escape(cells[name])
    value, below = _apart(cells[name])
    return _two(value, below or cells.get(_BELOW.get(name, ""), ""))


def _apart(text: str) -> tuple[str, str]:
    """What stands before a bracket or a comma, and what comes then: of `9.5e-07 (1.1e-07)`, or `61 GiB, 70 reserved`."""
    for mark in (" (", ", "):
        before, found, after = text.partition(mark)
        if found:
            return before, f"{mark}{after}".strip(", ")
    return text, ""


def _two(value: str, below: str) -> str:
    return f"{html.escape(value)}<small>{html.escape(below)}</small>" if below else html.escape(value)


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title - Mikoshi compare</title>
<style>
 :root { color-scheme: light; --ink: #1d2129; --soft: #667085; --line: #e3e6eb; --paper: #f6f7f9; }
 body { margin: 0; font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
 main { max-width: 1400px; margin: 0 auto; padding: 24px 20px 48px; }
 h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
 .made { color: var(--soft); margin: 0 0 6px; } ul { margin: 0 0 14px; padding-left: 18px; }
 code { font-size: 12.5px; overflow-wrap: anywhere; }
 section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
 section p { margin: 4px 0 0; color: var(--soft); } .scroll { overflow-x: auto; margin-bottom: 14px; }
 .grid { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; } .tall { grid-column: 1 / -1; }
 table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
 td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
 th { color: var(--soft); font-weight: 500; vertical-align: bottom; } tr.first td { font-weight: 600; }
 td { white-space: nowrap; } td.layout, td.why { white-space: normal; overflow-wrap: anywhere; } td.layout { min-width: 130px; }
 small { display: block; font-size: 12px; font-weight: 400; color: var(--soft); }
 tr.refused td { color: var(--soft); } tr.failed td.why { color: #c0392b; }
$style
 @media (max-width: 760px) { .grid { grid-template-columns: 1fr; } }
</style>
</head>
<body><main>
<h1>$title</h1><p class="made">Mikoshi compare, page made $made</p>
<p><code>$command</code></p><ul>$words</ul>
<section class="scroll">$table</section>
<div class="grid">$charts</div>
</main><script>$script</script></body></html>
""")
