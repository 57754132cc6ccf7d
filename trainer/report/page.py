"""One self-contained HTML page of a run, readable without a network: curves, data, events, layout and config."""

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
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.run import RunConfig, parse_config
from mikoshi.trainer.errors import RunError
from mikoshi.trainer.inspect.layout import layout_view
from mikoshi.trainer.inspect.layout_svg import draw_layout
from mikoshi.trainer.record.console import format_loss
from mikoshi.trainer.record.goodput import Goodput, account
from mikoshi.trainer.record.run_folder import RunFolder, predicting_steps, read_jsonl, read_metrics
from mikoshi.trainer.report.chart import SCRIPT, STYLE, chart
from mikoshi.trainer.report.data import data_section
from mikoshi.trainer.report.goodput import goodput_section

_BLUE, _ORANGE, _GREY = "#2457a6", "#d9762b", "#8a8f98"
_MOST_POINTS = 2000


def write_report(folder: RunFolder, target: Path) -> None:
    """Make the page of the run at `target`. Raises RunError if no step has been recorded yet."""
    records = read_metrics(folder.metrics)
    every = [r for r in records if "loss" in r]
    if not every:
        raise RunError(f"{folder.metrics}: no step has been recorded yet; wait for the first")
    steps = predicting_steps(every)
    evaluations = [r for r in records if not math.isnan(r.get("eval_loss", math.nan))]
    events = read_jsonl(folder.events)
    if missing := {"grad_norm", "lr", "tokens", "step_seconds", "tokens_per_second"} - every[-1].keys():
        raise RunError(f"{folder.metrics}: records without {', '.join(sorted(missing))}: not a log of mikoshi train")
    config_text = folder.config.read_text(encoding="utf-8")
    config = parse_config(config_text, str(folder.config))
    time_spent = account(events, records)
    page = _PAGE.substitute(
        title=html.escape(config.run.name),
        tiles=_tiles(every, steps, evaluations, events, time_spent),
        charts="\n".join(_charts(steps, evaluations, events)) if steps else "<p>No step has predicted a token.</p>",
        time=goodput_section(time_spent),
        data=data_section(folder),
        layout=_layout(config, events),
        events=_event_rows(events),
        config=html.escape(config_text),
        style=STYLE,
        script=SCRIPT,
        made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )
    try:
        write_file(target, page.encode())
    except OSError as error:
        raise RunError(f"{target}: the report cannot be written there: {error.strerror}") from None


def _charts(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[str]:
    x = [r["step"] for r in steps]
    loss = [_line(x, [r["loss"] for r in steps], "training", _BLUE)]
    if evaluations:
        held_out = ([r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations])
        loss.append(_line(*held_out, "held-out", _ORANGE, markers=True))
    unigram = next((e.get("unigram_nats") for e in events if e["event"] == "start"), None)
    if unigram is not None:
        loss.append(_line([x[0], x[-1]], [unigram] * 2, "token frequencies alone, held-out", _GREY))
    speed = [_line(x, [r["tokens_per_second"] for r in steps], "computed", _BLUE)]
    if any(r["tokens"] != r.get("computed_tokens", r["tokens"]) for r in steps):
        speed.append(_line(x, [r["tokens"] / r["step_seconds"] for r in steps], "predicted", _GREY))
    charts = [
        _chart("Loss, nats a token", loss, events, tall=True),
        _chart("Throughput, tokens/s", speed, events, zero=True),
        _chart("Gradient norm, before clipping", [_line(x, [r["grad_norm"] for r in steps], "norm", _BLUE)], events),
        _chart("Learning rate", [_line(x, [r["lr"] for r in steps], "lr", _BLUE)], events, zero=True),
        _chart(
            "Peak memory of rank 0, GiB",
            [_line(x, [r["memory_bytes"] / 2**30 for r in steps], "GiB", _BLUE)],
            events,
            zero=True,
        ),
    ]
    if any("mfu" in r for r in steps):
        mfu = [_line(x, [100 * r.get("mfu", math.nan) for r in steps], "MFU", _BLUE)]
        charts.append(_chart("Model FLOPs utilisation, % of peak", mfu, events, zero=True))
    waited = [_line(x, [100 * r["data_seconds"] / r["step_seconds"] for r in steps], "waiting", _BLUE)]
    alone = len(charts) % 2 == 1  # in the last row
    charts.append(_chart("Step time spent waiting for data, %", waited, events, zero=True, wide=alone))
    return charts


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most _MOST_POINTS points that keep every extreme: of each run of neighbours the lowest and the highest."""
    if len(x) <= _MOST_POINTS:
        return list(x), list(y)
    span = math.ceil(len(x) / (_MOST_POINTS // 2))
    kept: set[int] = {len(x) - 1}
    for start in range(0, len(x), span):
        run = range(start, min(start + span, len(x)))
        kept |= {min(run, key=lambda i: y[i]), max(run, key=lambda i: y[i])}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def _line(x: Sequence[float], y: Sequence[float], name: str, colour: str, markers: bool = False) -> go.Scatter:
    x, y = _thin(x, y)
    return go.Scatter(
        x=x, y=y, name=name, mode="lines+markers" if markers else "lines", line={"color": colour, "width": 1.8},
        hovertemplate="%{y:.6g}<extra>" + name + "</extra>",
    )  # fmt: skip


def _chart(
    title: str, lines: list[go.Scatter], events: list[dict[str, Any]], tall: bool = False, zero: bool = False,
    wide: bool = False,
) -> str:  # fmt: skip
    figure = go.Figure(lines)
    figure.update_layout(
        template="plotly_white", height=380 if tall else 250, margin={"l": 56, "r": 16, "t": 12, "b": 36},
        showlegend=len(lines) > 1, legend={"x": 1, "y": 1, "xanchor": "right"}, hovermode="x unified",
        font={"family": "system-ui, sans-serif", "size": 12},
    )  # fmt: skip
    figure.update_xaxes(title="step", title_standoff=4)
    if zero:
        figure.update_yaxes(rangemode="tozero")
    for event in events:
        if event["event"] in ("resume", "skip"):
            colour = _GREY if event["event"] == "resume" else "#c0392b"
            figure.add_vline(x=event["step"], line={"color": colour, "width": 1, "dash": "dot"})
    body = chart(figure, wide=tall or wide)
    return f'<section class="chart{" tall" if tall else ""}"><h2>{html.escape(title)}</h2>{body}</section>'


def _tiles(
    every: list[dict[str, Any]], steps: list[dict[str, Any]], evaluations: list[dict[str, Any]],
    events: list[dict[str, Any]], time_spent: Goodput,
) -> str:  # fmt: skip
    """`every` step, and those `steps` of them that predicted a token."""
    ends = [e for e in events if e["event"] in ("start", "end")]
    state = (
        "running or killed" if not ends or ends[-1]["event"] == "start" else "finished" if ends[-1]["finished"] else "stopped"
    )
    counted = steps or every
    seconds = sorted(r["step_seconds"] for r in counted)[len(counted) // 2]
    rate = sorted(r["tokens_per_second"] for r in counted)[len(counted) // 2]
    computed = sum(r.get("computed_tokens", r["tokens"]) for r in every)
    predicted = sum(r["tokens"] for r in steps)
    tiles = [
        ("state", state),
        ("steps", f"{every[-1]['step']:,}"),
        ("training loss", format_loss(steps[-1]["loss"]) if steps else "none"),
        ("held-out loss", format_loss(evaluations[-1]["eval_loss"]) if evaluations else "-"),
        ("tokens computed", f"{computed:,}"),
        *([("tokens predicted", f"{predicted:,}")] if predicted != computed else []),
        ("tokens computed/s, median", f"{rate:,.0f}"),
        ("step, median", f"{seconds * 1000:,.0f} ms"),
        ("goodput", f"{time_spent.share:.1%}"),
        ("resumes", str(sum(e["event"] == "resume" for e in events))),
    ]
    if empty := len(every) - len(steps):
        tiles.insert(2, ("steps that predicted nothing", f"{empty:,}"))
    if "mfu" in counted[-1]:
        tiles.insert(-3, ("MFU, median", f"{sorted(r.get('mfu', 0) for r in counted)[len(counted) // 2]:.1%}"))
    return "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in tiles)


def _layout(config: RunConfig, events: list[dict[str, Any]]) -> str:
    start = next((e for e in reversed(events) if e["event"] == "start"), None)
    if start is None:
        return ""
    shares = {0: "nothing: every rank holds everything", 1: "the optimizer's state", 2: "the optimizer's state and gradients",
              3: "the optimizer's state, gradients and parameters"}  # fmt: skip
    told = (
        f"<p>{start['ranks']} rank(s) on {html.escape(start['device'])}, torch {html.escape(start['torch'])}. "
        f"ZeRO {start['zero']}: the data ranks share out {shares[start['zero']]}.</p>"
    )
    try:
        drawing = draw_layout(layout_view(config, start["ranks"]))
    except LayoutError:  # of a run from before its layout was refused
        return told
    return f"{told}<div class='layout'>{drawing}</div>"


def _event_rows(events: list[dict[str, Any]]) -> str:
    rows = []
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "step") and v not in ([], {})}
        told = ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
        cells = (when, event["event"], str(event.get("step", "")), told)
        rows.append(
            f"<tr class='{html.escape(event['event'])}'>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
        )
    return "".join(rows)


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title - Mikoshi run</title>
<style>
 :root { color-scheme: light; --ink: #1d2129; --soft: #667085; --line: #e3e6eb; --paper: #f6f7f9; }
 body { margin: 0; font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
 main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 48px; }
 h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
 .made { color: var(--soft); margin: 0 0 18px; }
 .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 10px; margin-bottom: 14px; }
 .tiles div, section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
 .tiles b { display: block; font-size: 18px; font-variant-numeric: tabular-nums; } .tiles span { color: var(--soft); }
 .grid { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; } .tall { grid-column: 1 / -1; }
 .grid section { min-width: 0; } section { margin-bottom: 0; } .below { margin-top: 14px; }
 table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
 td, th { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
 td:last-child { overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 500; }
 tr.skip td, tr.fault td, tr.diverged td, tr.save-failed td { color: #c0392b; }
 tr.resume td, tr.stop td, tr.restart td, tr.retry td, tr.spike td, tr.rewind td, tr.straggler td { color: #8a5a00; }
 .figures td:nth-child(2), .figures td:nth-child(3), .figures td:nth-child(4), .figures th:nth-child(2) { text-align: right;
   white-space: nowrap; padding-right: 20px; } .figures td:nth-child(1) { white-space: nowrap; }
 .scroll { max-height: 340px; overflow: auto; } pre { margin: 0; font-size: 12.5px; }
 .layout { overflow-x: auto; } .layout svg { display: block; width: 100%; min-width: 760px; } section p { margin: 0 0 8px; }
 .grid section:last-child:nth-child(even) { grid-column: 1 / -1; }
 .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 14px; margin-top: 14px; }
 .pair section { min-width: 0; }
$style
 @media (max-width: 760px) { .grid { grid-template-columns: 1fr; } }
</style>
</head>
<body><main>
<h1>$title</h1><p class="made">Mikoshi run, page made $made</p>
<div class="tiles">$tiles</div>
<div class="grid">$charts</div>
<section class="below"><h2>Where the time went</h2>$time</section>
<section class="below"><h2>Data</h2>$data</section>
<section class="below"><h2>Layout</h2>$layout</section>
<section class="below"><h2>Events</h2><div class="scroll"><table>
<tr><th>time, UTC</th><th>event</th><th>step</th><th></th></tr>$events</table></div></section>
<section class="below"><h2>Resolved config</h2><div class="scroll"><pre>$config</pre></div></section>
</main><script>$script</script></body></html>
""")
