"""A run's time in its report: one bar that is all of it, and every cause with its share."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from mikoshi.trainer.record.goodput import CAUSES, Goodput
from mikoshi.trainer.report.chart import chart

_COLOURS = {
    "training": "#2457a6", "start-up": "#8c5fb0", "restarts": "#b8434e", "stopped": "#6b7280", "repeated": "#d9762b",
    "skipped": "#e0a030", "retried": "#a68a2d", "saves": "#3b8f5a", "evaluation": "#4aa3b8", "data": "#7d9bd1",
    "other": "#c3c8d0",
}  # fmt: skip


def goodput_section(found: Goodput) -> str:
    """The inside of the section; empty for a run that never started."""
    if not found.wall:
        return ""
    parts = {"training": found.training} | found.lost
    bars = [
        go.Bar(
            x=[100 * seconds / found.wall], y=[""], name=name, orientation="h", marker={"color": _COLOURS[name]},
            hovertemplate=f"{name}: {seconds:,.1f} s, %{{x:.2f}} %<extra></extra>",
        )
        for name, seconds in parts.items() if seconds >= found.wall / 2000
    ]  # fmt: skip
    figure = go.Figure(bars)
    figure.update_layout(
        template="plotly_white", height=116, margin={"l": 8, "r": 8, "t": 8, "b": 30}, barmode="stack", hovermode="closest",
        legend={"orientation": "h", "y": 1.05, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        font={"family": "system-ui, sans-serif", "size": 12}, bargap=0.1,
    )  # fmt: skip
    figure.update_xaxes(range=[0, 100], ticksuffix=" %")
    figure.update_yaxes(visible=False)
    body = chart(figure, wide=True)
    return f"<div class='time'>{body}</div>{_table(found)}"


def _table(found: Goodput) -> str:
    counts = {
        "training": f"{found.steps:,} steps", "start-up": f"{found.starts:,} start{'s' * (found.starts != 1)}",
        "repeated": f"{found.repeated:,} steps", "skipped": f"{found.skipped:,} steps", "retried": f"{found.retried:,} steps",
    }  # fmt: skip
    meanings = {"training": "steps that count"} | CAUSES
    rows = []
    for name, seconds in ({"training": found.training} | found.lost).items():
        cells = (name, f"{seconds:,.2f} s", f"{seconds / found.wall:.2%}", counts.get(name, ""), meanings[name])
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    total = (
        f"<tr><th>all</th><th>{found.wall:,.2f} s</th><th></th><th></th><th>from the first start to the last record</th></tr>"
    )
    return f"<table class='figures'>{''.join(rows)}{total}</table>"
