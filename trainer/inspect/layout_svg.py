"""A layout as one picture that needs nothing else: every rank as a box in its node, and the pipeline on the clock."""

from __future__ import annotations

import bisect
import colorsys
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from mikoshi.data.io.atomic import write_file
from mikoshi.parallel.layout import Layout
from mikoshi.parallel.schedule import Bar, splits_backward, timeline
from mikoshi.trainer.errors import RunError
from mikoshi.trainer.inspect.layout import (
    LayoutView,
    RankView,
    bubble_of,
    carried,
    degrees,
    format_count,
    format_kept,
    notes,
    plural,
    span,
    spans,
)

_WIDTH, _MARGIN = 1200, 24
# Width of a character in font sizes, at most, in the usual sans-serif fonts: of digits, and of prose in the mean.
_DIGIT, _PROSE = 0.6, 0.54
_INK, _SOFT, _LINE, _PANEL = "#1d2129", "#667085", "#d5d9e0", "#f8f9fb"
_MOST_RANKS, _MOST_NODES, _MOST_STAGE_LINES = 64, 8, 16
_COLUMNS, _GAP = 8, 6
_BOX_WIDTH, _BOX_LINE = 280.5, 14
_MOST_BAR_ROWS, _ALL_UNITS, _FIRST_UNITS, _LAST_UNITS = 16, 180, 96, 48
_BREAK = 26  # pixels of the gap where the clock leaves something out

_WORK: dict[str, tuple[str, str]] = {
    "forward": ("forward", "#8fb4e8"),
    "backward": ("backward", "#f2b272"),
    "backward-input": ("backward, inputs", "#f2b272"),
    "backward-weight": ("backward, weights", "#93cfa0"),
}


def write_drawing(view: LayoutView, target: Path) -> None:
    """Draw into a file. Raises RunError where it cannot be written."""
    try:
        write_file(target, draw_layout(view).encode())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a file's name"
        raise RunError(f"{target}: the drawing cannot be written there: {why}") from None


def draw_layout(view: LayoutView) -> str:
    """The picture, as SVG."""
    parts: list[str] = []
    y = float(_MARGIN)
    for section in (_title, _stages, _grid, _remarks, _clock):
        drawn, y = section(view, y)
        parts += drawn
    height = round(y + _MARGIN - 8)
    label = escape(f"{view.name} {degrees(view)}", quote=True)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}" '
            'font-family="Arial, Helvetica, Liberation Sans, sans-serif">',
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


Section = tuple[list[str], float]
"""Elements, and the height at which the next section begins."""


def _text(x: float, y: float, text: str, size: float, fill: str = _INK, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    position = f'x="{x:.6g}" y="{y:.6g}" font-size="{size:.3g}" fill="{fill}" text-anchor="{anchor}"'
    return f"<text {position}{weight}>{escape(text, quote=False)}</text>"


def _rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: float = 5) -> str:
    position = f'x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height:.6g}" rx="{radius:.3g}"'
    return f'<rect {position} fill="{fill}" stroke="{stroke}"/>'


def _fits(width: float, size: float, advance: float = _DIGIT) -> int:
    return max(1, int(width / (advance * size)))


def _paragraph(x: float, y: float, text: str, size: float, fill: str, width: float) -> Section:
    lines = textwrap.wrap(text, _fits(width, size, _PROSE), break_on_hyphens=False)
    return [_text(x, y + size + i * size * 1.4, line, size, fill) for i, line in enumerate(lines)], y + len(lines) * size * 1.4


def _short(text: str, width: float, size: float, advance: float = _DIGIT) -> str:
    most = _fits(width, size, advance)
    return text if len(text) <= most else text[: most - 1] + "…"


def _colours(pp: int, of: int) -> tuple[str, str]:
    """Fill and edge of what a pipeline rank carries."""
    hue = (0.59 + pp / of * 0.9) % 1
    fill, edge = (colorsys.hls_to_rgb(hue, light, 0.62) for light in (0.93, 0.62))
    return tuple("#" + "".join(f"{round(255 * c):02x}" for c in rgb) for rgb in (fill, edge))  # type: ignore[return-value]


def _title(view: LayoutView, y: float) -> Section:
    out = [_text(_MARGIN, y + 20, _short(view.name or "Layout", _WIDTH - 2 * _MARGIN, 20, 0.8), 20, bold=True)]
    more, y = _paragraph(_MARGIN, y + 28, degrees(view), 13, _SOFT, _WIDTH - 2 * _MARGIN)
    return out + more, y + 10


def _chosen(many: int, most: int) -> list[int]:
    """All of `many`, or the first and the last one of them."""
    return list(range(many)) if many <= most else [*range(most - 1), many - 1]


def _stages(view: LayoutView, y: float) -> Section:
    """One line a pipeline rank: its colour, layers, share of FLOPs and parameters."""
    layout, out = view.layout, []
    stages_of_rank = [[s for s in view.stages if s.pp == pp] for pp in range(layout.pp)]
    lines = []
    for pp in _chosen(layout.pp, _MOST_STAGE_LINES):
        share, size = sum(s.flops for s in stages_of_rank[pp]), sum(s.parameters for s in stages_of_rank[pp])
        name = f"pipeline rank {pp}: " if layout.pp > 1 else ""
        layers = carried(view, [s.stage for s in stages_of_rank[pp]])
        lines.append((pp, f"{name}layers {layers}", f"{share:.1%} of FLOPs, {format_count(size)} parameters"))
    most = max(len(layers) * 12 + len(figures) * 11 for _, layers, figures in lines) * _PROSE + 80
    columns = 2 if len(lines) > 1 and most <= _WIDTH / 2 - _MARGIN else 1
    width = (_WIDTH - 2 * _MARGIN) / 2 if columns == 2 else min(_WIDTH - 2 * _MARGIN, most)
    for i, (pp, layers, figures) in enumerate(lines):
        x, at = _MARGIN + i % columns * width, y + i // columns * 19
        room = width - 70 - len(figures) * 11 * _PROSE
        out.append(_rect(x, at, 14, 14, *_colours(pp, layout.pp), radius=3))
        out.append(_text(x + 22, at + 11.5, _short(layers, room, 12, _PROSE), 12))
        out.append(_text(x + width - 24, at + 11.5, figures, 11, _SOFT, "end"))
    y += -(-len(lines) // columns) * 19
    if layout.pp > len(lines):
        out.append(_text(_MARGIN, y + 11, f"and {layout.pp - len(lines)} more pipeline ranks between the last two", 11, _SOFT))
        y += 18
    return out, y + 8


def _drawn_nodes(view: LayoutView) -> list[list[RankView]]:
    """The ranks to draw, node by node: all; or of very many the first ranks of every pipeline rank, and the next ones."""
    size, world = view.node_ranks, len(view.ranks)
    if world <= _MOST_RANKS:
        return [list(view.ranks[first : first + size]) for first in range(0, world, size)]
    piece = min(size, _COLUMNS)
    starts = [first for node in range(0, world, size) for first in range(node, min(node + size, world), piece)]
    wanted = [pp * view.layout.stage_ranks for pp in _chosen(view.layout.pp, _MOST_NODES)]
    chosen = dict.fromkeys(starts[bisect.bisect_right(starts, rank) - 1] for rank in wanted)
    most = max(_MOST_NODES, _MOST_RANKS // piece)
    more = [first for first in starts[:most] if first not in chosen][: most - len(chosen)]
    ends = dict(zip(starts, [*starts[1:], world], strict=True))
    return [list(view.ranks[first : ends[first]]) for first in sorted([*chosen, *more])]


def _grid(view: LayoutView, y: float) -> Section:
    nodes, out = _drawn_nodes(view), []
    columns = min(_COLUMNS, max(len(node) for node in nodes))
    beside = min(len(nodes), _COLUMNS // columns)  # nodes in a row
    room = (_WIDTH - 2 * _MARGIN - (beside - 1) * 2 * _GAP) / beside
    box = min(_BOX_WIDTH, (room - 2 * _GAP - (columns - 1) * _GAP) / columns)
    panel = columns * box + (columns + 1) * _GAP
    texts = {r.rank: _box_lines(view, r, box - 14) for node in nodes for r in node}
    tall = 24 + _BOX_LINE * max(len(lines) for lines in texts.values())
    for start in range(0, len(nodes), beside):
        row = nodes[start : start + beside]
        lines = max(-(-len(node) // columns) for node in row)
        height = 22 + lines * (tall + _GAP)
        for i, node in enumerate(row):
            x = _MARGIN + i * (panel + 2 * _GAP)
            out.append(_rect(x, y, panel, height, _PANEL, _LINE, 7))
            out.append(_text(x + _GAP + 2, y + 15, _short(_node_label(view, node), panel - 16, 11), 11, _SOFT))
            for j, rank in enumerate(node):
                at = (x + _GAP + j % columns * (box + _GAP), y + 22 + j // columns * (tall + _GAP))
                out += _box(view, rank, *at, box, tall, texts[rank.rank])
        y += height + _GAP
    shown = sum(len(node) for node in nodes)
    if shown < len(view.ranks):
        some = "of pipeline ranks the first" if view.layout.pp > 1 else "the first"
        more = f"{shown} of {len(view.ranks):,} ranks are drawn, {some}; the others differ in data rank, experts or stage alone"
        out.append(_text(_MARGIN, y + 12, more, 11, _SOFT))
        y += 18
    return out, y + 4


def _node_label(view: LayoutView, node: Sequence[RankView]) -> str:
    whole = view.ranks[node[0].node * view.node_ranks : (node[0].node + 1) * view.node_ranks]
    text = f"node {node[0].node}"
    if len(whole) > 1:
        text += f": ranks {whole[0].rank}-{whole[-1].rank}"
    return text + (f", of which {node[0].rank}-{node[-1].rank}" if len(node) < len(whole) else "")


def _box_lines(view: LayoutView, rank: RankView, width: float) -> list[str]:
    experts = [] if rank.experts is None else [("experts", [span(rank.experts)])]
    facts = [
        ("layers", spans(view.stages[s].layers for s in rank.stages)),
        ("heads", [span(rank.heads), f"kv {span(rank.kv_heads)}"]),
        *experts,
        ("tokens", spans(rank.tokens)),
        ("rows", [span(rank.rows)]),
    ]
    return [line for name, values in facts for line in _packed(name, values, width)]


def _packed(name: str, values: Iterable[str], width: float) -> list[str]:
    """`name value, value` on as few lines as hold it."""
    lines = [name]
    for i, value in enumerate(values):
        longer = f"{lines[-1]}{', ' if i else ' '}{value}"
        if len(longer) > _fits(width, 10) and i:
            lines[-1] += ","
            lines.append(f"  {value}")
        else:
            lines[-1] = longer
    return [_short(line, width, 10) for line in lines]


def _box(view: LayoutView, rank: RankView, x: float, y: float, width: float, height: float, lines: Sequence[str]) -> list[str]:
    fill, edge = _colours(rank.at.pp, view.layout.pp)
    at = rank.at
    tooltip = [
        f"rank {rank.rank}: pp {at.pp}, replica {at.replica}, shard {at.shard}, cp {at.cp}, tp {at.tp}",
        f"layers {carried(view, rank.stages)}",
        f"keeps {format_kept(rank.kept)} elements of parameters / gradients / optimizer",
    ]
    data = f"data {at.data}"
    short = "" if len(f"rank {rank.rank}") * 12 + len(data) * 10 > (width - 18) / _DIGIT else data
    return [
        f"<g><title>{escape(chr(10).join(tooltip))}</title>",
        _rect(x, y, width, height, fill, edge),
        _text(x + 7, y + 15, f"rank {rank.rank}", 12, bold=True),
        _text(x + width - 7, y + 15, short, 10, _SOFT, "end"),
        *(_text(x + 7, y + 29 + i * _BOX_LINE, line, 10) for i, line in enumerate(lines)),
        "</g>",
    ]


def _remarks(view: LayoutView, y: float) -> Section:
    text = ". ".join(note[0].upper() + note[1:] for note in notes(view)) + "."
    out, y = _paragraph(_MARGIN, y, text, 11, _SOFT, _WIDTH - 2 * _MARGIN)
    return out, y + 12


def _clock(view: LayoutView, y: float) -> Section:
    """The pipeline's timeline; nothing where there is no pipeline."""
    layout = view.layout
    if layout.pp == 1:
        return [], y
    bars = timeline(layout.schedule, layout.pp, layout.virtual, layout.micro_batches)
    units, rows = max(bar.end for bar in bars), _bar_rows(layout.pp)
    title = f"Pipeline, {layout.schedule}: {plural(layout.micro_batches, 'micro-batch')}".replace("batchs", "batches")
    out = [_text(_MARGIN, y + 14, f"{title}, bubble {bubble_of(layout):.1%}", 15, bold=True)]
    out += _legend(view, y + 14)
    y, left = y + 26, _MARGIN + 96
    windows = [(0.0, units)] if units <= _ALL_UNITS else [(0.0, float(_FIRST_UNITS)), (units - _LAST_UNITS, units)]
    seen = sum(stop - start for start, stop in windows)
    unit = min(60.0, (_WIDTH - _MARGIN - left - _BREAK * (len(windows) - 1)) / seen)
    tall = 22 if len(rows) <= 8 else 16
    for i, pp in enumerate(rows):
        out.append(_text(_MARGIN, y + tall / 2 + 4, f"pipeline rank {pp}", 11, _SOFT))
        x = float(left)
        for start, stop in windows:
            out.append(_rect(x, y, (stop - start) * unit, tall, "#eceef2", radius=0))
            inside = [bar for bar in bars if bar.rank == pp and bar.end > start and bar.start < stop]
            out += _bars(inside, (x, y), unit, tall, (start, stop), layout)
            x += (stop - start) * unit + _BREAK
        y += tall + 3
        if i + 1 < len(rows) and rows[i + 1] != pp + 1:
            out.append(_text(_MARGIN, y + 10, f"… {rows[i + 1] - pp - 1} more", 11, _SOFT))
            y += 16
    if len(windows) > 1:
        at = left + _FIRST_UNITS * unit
        more = f"the first {_FIRST_UNITS} and the last {_LAST_UNITS} of {units:,.0f} units"
        out.append(_text(at + _BREAK / 2, y + 11, more, 11, _SOFT, "middle"))
        y += 16
    return out, y


def _bar_rows(pp: int) -> list[int]:
    half = _MOST_BAR_ROWS // 2
    return list(range(pp)) if pp <= _MOST_BAR_ROWS else [*range(half), *range(pp - half, pp)]


def _legend(view: LayoutView, y: float) -> list[str]:
    layout, x = view.layout, float(_WIDTH - _MARGIN)
    kinds = ["forward", "backward"]
    if splits_backward(layout.schedule):
        kinds = ["forward", "backward-input", "backward-weight"]
    entries = [_WORK[kind] for kind in kinds] + [("waiting", "#eceef2")]
    if layout.virtual > 1:
        entries.append(("paler: a rank's later stages", ""))
    out = []
    for name, fill in reversed(entries):
        x -= len(name) * 11 * _PROSE
        out.append(_text(x, y, name, 11, _SOFT))
        if fill:
            x -= 18
            out.append(_rect(x, y - 10, 13, 12, fill, radius=2))
        x -= 12
    return out


def _bars(
    bars: Sequence[Bar], at: tuple[float, float], unit: float, tall: float, window: tuple[float, float], layout: Layout
) -> list[str]:
    """One path for all bars of a colour, because there are thousands; the micro-batch's number where it fits."""
    paths: dict[str, list[str]] = {}
    numbers, (left, y), digits = [], at, len(str(layout.micro_batches - 1))
    for bar in bars:
        start, stop = max(bar.start, window[0]), min(bar.end, window[1])
        x, width = left + (start - window[0]) * unit, (stop - start) * unit
        paths.setdefault(_shade(bar, layout.pp), []).append(f"M{x:.5g} {y:.5g}h{width:.4g}v{tall}h-{width:.4g}z")
        text, size = str(bar.action.micro), 10 if tall > 16 else 9
        if digits * size * _DIGIT + 1 <= width:
            numbers.append(_text(x + width / 2, y + tall / 2 + size * 0.36, text, size, anchor="middle"))
    edge = 'stroke="#fff" stroke-width="0.7"' if unit > 3 else ""
    return [f'<path fill="{fill}" {edge} d="{"".join(path)}"/>' for fill, path in paths.items()] + numbers


def _shade(bar: Bar, pp: int) -> str:
    """A rank's later stages paler."""
    fill, mix = _WORK[bar.action.kind][1], min(0.6, 0.4 * (bar.action.stage // pp))
    return "#" + "".join(f"{round(c + (255 - c) * mix):02x}" for c in bytes.fromhex(fill[1:]))
