"""Draws figures as inline SVG, so that a page needs no library and no network; a short script shows values on hover.

Drawn of plotly's figures is what our pages use: lines, points, stacked areas and bars, linear, logarithmic and category axes.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

_INK, _SOFT, _LINE = "#1d2129", "#667085", "#e3e6eb"
_DASH = {"dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
_UNIFIED = "x unified"
_FIELD = re.compile(r"%\{(\w+)(?:\[(\d+)\])?(?::([^}]*))?\}")
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

SCRIPT = """document.querySelectorAll("svg.plot").forEach(function (svg) {
 var rows = JSON.parse(svg.dataset.rows), box = svg.parentNode.querySelector(".tip"), rule = svg.querySelector(".rule");
 if (!rows.length) return;
 function hide() { box.hidden = true; rule.setAttribute("visibility", "hidden"); }
 svg.addEventListener("pointerleave", hide);
 svg.addEventListener("pointermove", function (event) {
  var frame = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / frame.width;
  var at = (event.clientX - frame.left) * scale, low = 0, high = rows.length - 1;
  while (high - low > 1) { var mid = (low + high) >> 1; if (rows[mid][0] < at) low = mid; else high = mid; }
  var row = Math.abs(rows[low][0] - at) < Math.abs(rows[high][0] - at) ? rows[low] : rows[high];
  rule.setAttribute("x1", row[0]); rule.setAttribute("x2", row[0]); rule.setAttribute("visibility", "visible");
  box.replaceChildren();
  row[2].forEach(function (line) {
   var shown = svg.parentNode.querySelector('[data-line="' + line[0] + '"]');
   if (shown && shown.getAttribute("visibility") === "hidden") return;
   var part = document.createElement("div"); part.textContent = line[1]; part.style.color = line[2]; box.append(part);
  });
  var head = document.createElement("b"); head.textContent = row[1]; box.prepend(head);
  box.hidden = false;
  var x = row[0] / scale;
  box.style.left = (x > frame.width / 2 ? x - box.offsetWidth - 12 : x + 12) + "px";
  box.style.top = "18px";
 });
});
document.querySelectorAll("svg.plot [data-toggles]").forEach(function (key) {
 key.style.cursor = "pointer";
 key.addEventListener("click", function () {
  var line = key.closest("svg").querySelector('[data-line="' + key.dataset.toggles + '"]');
  var on = line.getAttribute("visibility") === "hidden";
  line.setAttribute("visibility", on ? "visible" : "hidden"); key.setAttribute("opacity", on ? 1 : 0.4);
 });
});"""
STYLE = """ .plotted { position: relative; }
 .plotted svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
 .tip { position: absolute; pointer-events: none; background: #fffffff2; border: 1px solid #c3c8d0; border-radius: 6px;
   padding: 4px 8px; font-size: 12px; line-height: 1.4; white-space: nowrap; box-shadow: 0 2px 8px #0002; z-index: 1; }"""


@dataclass(frozen=True)
class Axis:
    """Values to pixels between `low` and `high`, and where its numbers stand: a value and its text each."""

    place: Callable[[Any], float]
    ticks: list[tuple[float, str]]


def chart(figure: go.Figure, wide: bool = False) -> str:
    """The figure, `wide` where it has the width of the page. What it shows stands in it; nothing else is loaded."""
    content = figure.to_plotly_json()
    lines, layout = content["data"], content["layout"]
    width, height = 1130 if wide else 560, layout["height"]
    legend = _legend(lines, width) if layout.get("showlegend", len(lines) > 1) else ("", 0)
    flat = all(line["type"] == "bar" and line.get("orientation") == "h" for line in lines[:1])
    names = layout.get("yaxis", {}).get("categoryarray", ()) if flat else ()
    left = min(width * 0.4, max([12, *(12 + 6.6 * len(html.unescape(str(name))) for name in names)])) if flat else 60
    area = (left, 12 + legend[1], width - 24, height - (44 if layout.get("xaxis", {}).get("title") else 26))
    stacked = _stacked(lines, layout.get("barmode") == "stack", flat)
    x, y = _axes(stacked, layout, area, flat)
    marks = [_draw(number, line, x, y, flat, layout, len(lines)) for number, line in enumerate(stacked)]
    title = layout.get("xaxis", {}).get("title", {}).get("text", "")
    rows = _rows(stacked, x, title) if layout.get("hovermode") == _UNIFIED else []
    rule = f'<line class="rule" y1="{area[1]}" y2="{area[3]}" stroke="{_SOFT}" visibility="hidden"/>'
    data = html.escape(json.dumps(rows, ensure_ascii=False, separators=(",", ":")))
    parts = (_frame(x, y, area, layout, flat), _shapes(layout, x, y, area), *marks, legend[0], rule)
    return (
        f'<div class="plotted"><svg class="plot" viewBox="0 0 {width} {height}" role="img" data-rows="{data}">{"".join(parts)}'
        '</svg><div class="tip" hidden=""></div></div>'
    )


def _text(x: float, y: float, text: object, anchor: str = "start", colour: str = _SOFT) -> str:
    shown = re.sub(r"<sup>(.*?)</sup>", lambda m: m[1].translate(_POWERS), str(text))
    plain = html.escape(html.unescape(shown))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{plain}</text>'


def _colour(line: dict[str, Any], at: int = 0) -> str:
    found = (line.get("line") if line["type"] == "scatter" else None) or line.get("marker") or {}
    colour = found.get("color", "#2457a6")
    return str(colour if isinstance(colour, str) else colour[at])


def _legend(lines: Sequence[dict[str, Any]], width: int) -> tuple[str, int]:
    """The names in rows above the figure, and how high they are."""
    out, x, y = [], 12.0, 14.0
    for number, line in enumerate(lines):
        name = line.get("name") or ""
        need = 30 + 6.6 * len(html.unescape(name))
        if x > 12 and x + need > width:
            x, y = 12.0, y + 18
        key = f'<rect x="{x:.1f}" y="{y - 6:.1f}" width="14" height="4" rx="2" fill="{_colour(line)}"/>'
        out.append(f'<g data-toggles="{number}">{key}{_text(x + 19, y, name, colour=_INK)}</g>')
        x += need
    return "".join(out), int(y + 4)


def _stacked(lines: Sequence[dict[str, Any]], bars: bool, flat: bool) -> list[dict[str, Any]]:
    """Each line with `base`, what it stands on: the sum of those before it, where they are stacked."""
    sums: dict[Any, float] = {}
    out = []
    for line in lines:
        across, along = ("y", "x") if flat else ("x", "y")
        base = [0.0] * len(line[along])
        if line.get("stackgroup") or (bars and line["type"] == "bar"):
            base = [sums.get(key, 0.0) for key in line[across]]
            for key, value in zip(line[across], line[along], strict=True):
                sums[key] = sums.get(key, 0.0) + value
        out.append({**line, "base": base})
    return out


def _axes(lines: Sequence[dict[str, Any]], layout: dict[str, Any], area: Sequence[float], flat: bool) -> tuple[Axis, Axis]:
    left, top, right, bottom = area
    axes = layout.get("xaxis", {}), layout.get("yaxis", {})
    made = []
    for key, ends, options in (("x", (left, right), axes[0]), ("y", (bottom, top), axes[1])):
        along = key == ("x" if flat else "y")
        values = [v for line in lines for v in line[key]]
        if any(isinstance(v, str) for v in values):
            names = list(options.get("categoryarray") or dict.fromkeys(values))
            made.append(_categories(names, ends))
            continue
        if along:
            values += [base + v for line in lines for base, v in zip(line["base"], line[key], strict=True) if _real(v)]
            values += [0.0] * (options.get("rangemode") == "tozero" or any(line["type"] == "bar" for line in lines))
        made.append(_numbers([float(v) for v in values if _real(v)], ends, options, exact=not along))
    return made[0], made[1]


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _categories(names: list[Any], ends: tuple[float, float]) -> Axis:
    each = (ends[1] - ends[0]) / max(1, len(names))
    places = {name: ends[0] + each * (number + 0.5) for number, name in enumerate(names)}
    return Axis(lambda name: places[name], [(places[name], str(name)) for name in names])


def _numbers(values: list[float], ends: tuple[float, float], options: dict[str, Any], exact: bool) -> Axis:
    logarithmic = options.get("type") == "log"
    suffix = options.get("ticksuffix", "")
    low, high = options.get("range") or (min(values, default=0.0), max(values, default=1.0))
    if low == high:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    elif not (exact or options.get("range")):
        spare = (high - low) * 0.05
        low, high = (low if low == 0 else low - spare), high + spare

    def place(value: float) -> float:
        at = math.log10(value) if logarithmic else value
        return ends[0] + (at - low) / (high - low) * (ends[1] - ends[0])

    if options.get("tickvals") is not None:
        return Axis(place, [(place(v), t) for v, t in zip(options["tickvals"], options["ticktext"], strict=True)])
    size = _round_up((high - low) / max(2, abs(ends[1] - ends[0]) / (90 if ends[0] < ends[1] else 45)))
    if exact and all(value == int(value) for value in values):  # steps
        size = max(1.0, size)
    first = math.ceil(low / size - 1e-9)
    numbers = [n * size for n in range(first, math.floor(high / size + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(size) + 1e-9))
    return Axis(place, [(place(v), (f"{v:,.{digits}f}" if digits < 5 else f"{v:.3g}") + suffix) for v in numbers])


def _round_up(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _frame(x: Axis, y: Axis, area: Sequence[float], layout: dict[str, Any], flat: bool) -> str:
    left, top, right, bottom = area
    out = []
    if layout.get("yaxis", {}).get("visible", True):
        for at, text in y.ticks:
            if not flat:
                out.append(f'<path d="M{left},{at:.1f}H{right}" stroke="{_LINE}"/>')
            out.append(_text(left - 6, at + 4, text, "end"))
    for at, text in x.ticks:
        if flat:
            out.append(f'<path d="M{at:.1f},{top}V{bottom}" stroke="{_LINE}"/>')
        out.append(_text(at, bottom + 16, text, "middle"))
    title = layout.get("xaxis", {}).get("title", {}).get("text", "")
    out.append(f'<path d="M{left},{bottom}H{right}" stroke="#c3c8d0"/>')
    return "".join(out) + (_text((left + right) / 2, bottom + 34, title, "middle") if title else "")


def _shapes(layout: dict[str, Any], x: Axis, y: Axis, area: Sequence[float]) -> str:
    """Lines and bands across all of the figure, and what is written beside them."""
    left, top, right, bottom = area
    out = []
    for shape in layout.get("shapes", ()):
        whole_height = str(shape.get("yref", "")).endswith("domain")
        x0, x1 = (x.place(shape["x0"]), x.place(shape["x1"])) if whole_height else (left, right)
        y0, y1 = (top, bottom) if whole_height else (y.place(shape["y0"]), y.place(shape["y1"]))
        x0, x1 = max(left, min(x0, right)), max(left, min(x1, right))
        line = shape.get("line", {})
        if shape["type"] == "rect":
            fill = f'fill="{shape["fillcolor"]}" opacity="{shape["opacity"]}"'
            out.append(f'<rect x="{x0:.1f}" y="{top}" width="{x1 - x0:.1f}" height="{bottom - top}" {fill}/>')
        else:
            dash = f'stroke-dasharray="{_DASH.get(line.get("dash", ""), "none")}"'
            out.append(f'<path d="M{x0:.1f},{y0:.1f}L{x1:.1f},{y1:.1f}" stroke="{line.get("color", _SOFT)}" {dash}/>')
    for note in layout.get("annotations", ()):
        low = note.get("yanchor") == "bottom" or note.get("y") == 0
        end = "end" if note.get("xanchor") == "right" else "start"
        at = max(left + 2, min(x.place(note["x"]), right)) + (-4 if end == "end" else 4)
        out.append(_text(at, bottom - 5 if low else top + 11, note.get("text", ""), end))
    return "".join(out)


def _draw(number: int, line: dict[str, Any], x: Axis, y: Axis, flat: bool, layout: dict[str, Any], lines: int) -> str:
    grouped = 1 if flat or layout.get("barmode") == "stack" else lines
    inner = _bars(number, line, x, y, flat, grouped) if line["type"] == "bar" else _points(line, x, y)
    return f'<g data-line="{number}">{inner}</g>'


def _bars(number: int, line: dict[str, Any], x: Axis, y: Axis, flat: bool, grouped: int) -> str:
    out = []
    across, along = (y, x) if flat else (x, y)
    near = [at for at, _ in across.ticks]
    each = abs(near[1] - near[0]) if len(near) > 1 else 60.0
    thick = min(each * 0.8, 44.0 if flat else 60.0) / grouped
    for at, (a, b, base) in enumerate(zip(line["x"], line["y"], line["base"], strict=True)):
        value, name = (a, b) if flat else (b, a)
        low, high = sorted((along.place(base), along.place(base + value)))
        begin = across.place(name) - thick * grouped / 2 + thick * (number if grouped > 1 else 0)
        box = (low, begin, high - low, thick) if flat else (begin, low, thick, high - low)
        size = 'x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"'.format(*box)
        tip = f"<title>{html.escape(_label(line, at))}</title>"
        out.append(f'<rect {size} fill="{_colour(line, at)}" opacity="{line.get("opacity") or 1}">{tip}</rect>')
        if line.get("text"):
            out.append(_text(low + 6, begin + thick / 2 + 4, line["text"][at], colour="#fff"))
    return "".join(out)


def _points(line: dict[str, Any], x: Axis, y: Axis) -> str:
    mode, colour, style = line.get("mode", "lines"), _colour(line), line.get("line") or {}
    points = [
        (x.place(a), y.place(base + b) if isinstance(b, int | float) else y.place(b)) if _drawn(b) else None
        for a, b, base in zip(line["x"], line["y"], line["base"], strict=True)
    ]
    out = []
    if "lines" in mode:
        path = _path(points, style.get("shape") == "hv")
        if line.get("stackgroup"):
            floor = [(x.place(a), y.place(base)) for a, base in zip(line["x"], line["base"], strict=True)]
            under = _path([*reversed(_steps(floor))], False).replace("M", "L", 1)
            out.append(f'<path d="{path}{under}Z" fill="{colour}" opacity="0.6"/>')
        dash = f' stroke-dasharray="{_DASH[style["dash"]]}"' if style.get("dash") in _DASH else ""
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{style.get("width", 2)}"{dash}/>')
    if "markers" in mode and len(points) <= 400:
        marker = line.get("marker") or {}
        radius = marker.get("size", 6) / 2
        for at, point in enumerate(points):
            if point is not None:
                tip = f"<title>{html.escape(_label(line, at))}</title>"
                place = f'cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{radius}"'
                out.append(
                    f'<circle {place} fill="{marker.get("color", colour)}" stroke="#fff" stroke-width="1">{tip}</circle>'
                )
    return "".join(out)


def _drawn(value: Any) -> bool:
    return isinstance(value, str) or _real(value)


def _steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """With every value held up to the next place."""
    hold = [(after[0], before[1]) for before, after in itertools.pairwise(points)]
    return [point for pair in zip(points, [*hold, points[-1]], strict=True) for point in pair]


def _path(points: Sequence[tuple[float, float] | None], hold: bool) -> str:
    """Broken where there is no value."""
    out, pen = [], "M"
    for point in _steps([p for p in points if p is not None]) if hold else points:
        if point is None:
            pen = "M"
        else:
            out.append(f"{pen}{point[0]:.1f},{point[1]:.1f}")
            pen = "L"
    return "".join(out)


def _label(line: dict[str, Any], at: int) -> str:
    """What a point says of itself."""
    template, _, extra = (line.get("hovertemplate") or "%{y}<extra></extra>").partition("<extra>")

    def value(field: re.Match[str]) -> str:
        found = line[field[1]][at]
        found = found if field[2] is None else found[int(field[2])]
        return format(found, field[3] or "") if _real(found) else str(found)

    name = extra.removesuffix("</extra>")
    text = _FIELD.sub(value, template)
    return html.unescape(f"{name}: {text}" if name and not text.startswith(f"{name}:") else text)


def _rows(lines: Sequence[dict[str, Any]], x: Axis, title: str) -> list[list[Any]]:
    """For the script: every place along the axis, what it is called, and what each line says there."""
    found: dict[Any, list[Any]] = {}
    for number, line in enumerate(lines):
        for at, (a, b) in enumerate(zip(line["x"], line["y"], strict=True)):
            if _drawn(b):
                found.setdefault(a, []).append([number, _label(line, at), _colour(line, at)])
    return sorted([round(x.place(a), 1), f"{title} {a}".strip(), labels] for a, labels in found.items())
