"""The data of a run in its report: how long documents are, the mixture over training, counts and packing."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mikoshi.data.dataset.shards import HELD_OUT, TRAIN
from mikoshi.trainer.errors import USER_ERRORS
from mikoshi.trainer.inspect.batches import DataView, open_view
from mikoshi.trainer.inspect.statistics import (
    SourceStats,
    Stats,
    bucket,
    describe_empty_rows,
    describe_packing,
    report_lines,
    samples_by_source,
    stats,
)
from mikoshi.trainer.record.run_folder import RunFolder
from mikoshi.trainer.report.chart import chart

_POINTS = 200
_ROWS_A_POINT = 100
"""Fewer, and a chart of shares would show the rounding to whole rows."""
_COLOURS = ("#2457a6", "#d9762b", "#3b8f5a", "#8c5fb0", "#b8434e", "#4aa3b8", "#a68a2d", "#6b7280")


def data_section(folder: RunFolder) -> str:
    """The inside of the section; one line that says why, where the run's data cannot be looked at from here."""
    try:
        view = open_view(folder.path)
        found = stats(view)
    except USER_ERRORS as error:
        return f"<p>The run's data cannot be looked at from here: {html.escape(str(error).splitlines()[0])}</p>"
    mixed, known = len(found.sources) > 1 and found.steps > 0, any(s.lengths for s in found.sources)
    charts = [_lengths(found, wide=not mixed)] if known else []
    if mixed:
        charts.append(_mixture(view, found, wide=not known))
    return f"{_table(found)}<div class='pair'>{''.join(charts)}</div>{''.join(_words(s, found) for s in found.sources)}"


def _lengths(found: Stats, wide: bool) -> str:
    """Of several sources the share of each source's own documents: they differ much in number."""
    lone = len(found.sources) == 1
    sizes = sorted({size for s in found.sources for size in s.lengths})
    every = [1 << power for power in range(sizes[0].bit_length() - 1, sizes[-1].bit_length())]
    lines = []
    for number, s in enumerate(found.sources):
        total = sum(s.lengths.values())
        counts = [s.lengths.get(size, 0) for size in every]
        lines.append(go.Bar(
            x=[_short(size) for size in every], y=counts if lone else [100 * c / max(1, total) for c in counts],
            name=s.name or "documents", marker={"color": _COLOURS[number % len(_COLOURS)]},
            customdata=[[bucket(size), count] for size, count in zip(every, counts, strict=True)],
            hovertemplate="%{customdata[0]} tokens: %{customdata[1]:,} documents<extra>" + html.escape(s.name) + "</extra>",
        ))  # fmt: skip
    title = "Documents by tokens, from so many on" + ("" if lone else ", % of each source")
    x = {"title": "tokens", "type": "category", "tickangle": 0, "tickfont": {"size": 10}}
    return _chart(title, lines, x, {"rangemode": "tozero"}, wide)


def _short(size: int) -> str:
    for unit, name in ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if size >= unit:
            return f"{size // unit}{name}"
    return str(size)


def _mixture(view: DataView, found: Stats, wide: bool) -> str:
    """What was, and will be, read of each source: rows drawn between neighbouring points."""
    history, skipped, batch = view.continued.history, view.feed.skipped, view.loader.global_batch
    points = max(1, min(_POINTS, found.steps, found.rows // _ROWS_A_POINT))
    steps = np.linspace(0, found.steps, points + 1).round().astype(np.int64)
    counts = [samples_by_source(history, skipped, int(step) * batch) for step in steps]
    lines = []
    for number, name in enumerate(history.names):
        totals = np.array([count[name] for count in counts])
        shares = 100 * np.diff(totals) / (np.diff(steps) * batch)
        colour = _COLOURS[number % len(_COLOURS)]
        lines.append(go.Scatter(
            x=steps.tolist(), y=[*shares.tolist(), float(shares[-1])], name=name, stackgroup="one", mode="lines",
            line={"width": 0.5, "color": colour, "shape": "hv"},
            hovertemplate="%{y:.2f} %<extra>" + html.escape(name) + "</extra>",
        ))  # fmt: skip
    done = view.done if view.done is not None and view.done < found.steps else None
    return _chart("Mixture over training, % of rows", lines, {"title": "step"}, {"range": [0, 100]}, wide, done)


def _chart(title: str, lines: list[Any], x: dict[str, Any], y: dict[str, Any], wide: bool, done: int | None = None) -> str:
    figure = go.Figure(lines)
    figure.update_layout(
        template="plotly_white", height=280, margin={"l": 56, "r": 16, "t": 12, "b": 36}, showlegend=len(lines) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hovermode="x unified", bargap=0.15,
        font={"family": "system-ui, sans-serif", "size": 12},
    )  # fmt: skip
    figure.update_xaxes(title_standoff=4, **x)
    figure.update_yaxes(**y)
    if done is not None:
        figure.add_vline(x=done, line={"color": "#1d2129", "width": 1, "dash": "dot"}, annotation_text="newest checkpoint")
    body = chart(figure, wide)
    return f'<section class="chart"><h2>{html.escape(title)}</h2>{body}</section>'


def _table(found: Stats) -> str:
    heads = (
        "source", "documents", "tokens", "held-out tokens", f"rows of {found.context:,}", "read by the run", "epochs", "share",
    )  # fmt: skip
    rows = [
        (s.name or "all", f"{s.documents[TRAIN]:,}", f"{s.tokens[TRAIN]:,}", f"{s.tokens[HELD_OUT]:,}", f"{s.packed.rows:,}",
         f"{s.drawn:,}", f"{s.epochs:.3f}", f"{s.share:.2%}")
        for s in found.sources
    ]  # fmt: skip
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _words(source: SourceStats, found: Stats) -> str:
    lines = [describe_packing(source.packed, found.packing, found.context)]
    if source.cap is not None:
        spent = "not reached" if source.spent is None else f"its last is read in step {source.spent:,}"
        lines.append(f"at most {source.cap:,} rows: {spent}")
    lines += describe_empty_rows(source.nothing) + report_lines(source.report)
    name = f"<b>{html.escape(source.name or 'The source')}</b>, {html.escape(source.place)}"
    return f"<p class='below'>{name}<br>{'<br>'.join(map(html.escape, lines))}</p>"
