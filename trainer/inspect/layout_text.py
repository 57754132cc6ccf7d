"""A layout in a terminal or a pipe: degrees, stages, ranks, and the pipeline's clock in characters."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from mikoshi.parallel.layout import Layout
from mikoshi.parallel.schedule import timeline
from mikoshi.trainer.inspect.layout import (
    LayoutView,
    RankView,
    carried,
    degrees,
    format_count,
    format_kept,
    format_stage,
    notes,
    span,
    spans,
)

_EVERY_RANK = 64
_FIRST_RANKS = 16
_MOST_KINDS = 48
_TIMELINE_RANKS, _TIMELINE_UNITS = 8, 100
_LETTERS = {"forward": "F", "backward": "B", "backward-input": "B", "backward-weight": "W"}


def print_layout(view: LayoutView, console: Console) -> None:
    """Lines are never wrapped or cut, whatever the width of the terminal."""
    console.print(f"{view.name}: {degrees(view)}" if view.name else degrees(view), markup=False)
    for table in (_stage_table(view), _rank_table(view)):
        console.print()
        console.print(table)
    console.print("  keeps: parameters / gradients / optimizer, in elements, from one micro-batch to the next", markup=False)
    if hidden := len(view.ranks) - sum(n for _, n in _listed(view)):
        console.print(f"  and {hidden:,} ranks of further kinds", markup=False)
    for note in notes(view):
        console.print(f"  {note}", markup=False)
    if view.layout.pp > 1:
        console.print()
        console.print("\n".join(text_timeline(view.layout)), markup=False)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True, justify="right" if name in right else "left")
    return table


def _stage_table(view: LayoutView) -> Table:
    right = ("stage", "pipeline rank", "FLOPs", "parameters")
    table = _table("stage", "pipeline rank", "layers", "FLOPs", "parameters", right=right)
    for s in view.stages:
        table.add_row(str(s.stage), str(s.pp), format_stage(s), f"{s.flops:.1%}", format_count(s.parameters))
    return table


def _kind(rank: RankView) -> tuple[object, ...]:
    """Ranks of one kind differ in their rows alone."""
    return rank.stages, rank.heads, rank.experts, rank.tokens


def _listed(view: LayoutView) -> list[tuple[RankView, int]]:
    """The ranks to show, each with the number of ranks that it stands for: all; or of very many the first, and then one
    of every other kind."""
    if len(view.ranks) <= _EVERY_RANK:
        return [(rank, 1) for rank in view.ranks]
    alike: dict[tuple[object, ...], list[RankView]] = {}
    for rank in view.ranks[_FIRST_RANKS:]:
        alike.setdefault(_kind(rank), []).append(rank)
    kinds = [(ranks[0], len(ranks)) for ranks in alike.values()]
    return [(rank, 1) for rank in view.ranks[:_FIRST_RANKS]] + kinds[:_MOST_KINDS]


def _rank_table(view: LayoutView) -> Table:
    listed, right = _listed(view), ("rank", "node", "data")
    all_shown, experts = len(listed) == len(view.ranks), view.experts > 0
    columns = ["rank", "node", "stages", "layers", "heads", "kv heads", "tokens", "data", "rows", "keeps"]
    if experts:
        columns.insert(6, "experts")
    if not all_shown:
        columns.insert(1, "and like it")
    table = _table(*columns, right=right)
    for r, alike in listed:
        cells = [str(r.rank), str(r.node), ",".join(map(str, r.stages)), carried(view, r.stages), span(r.heads)]
        cells += [span(r.kv_heads) + (f" (with {view.kv_sharers - 1} more)" if view.kv_sharers > 1 else "")]
        cells += [",".join(spans(r.tokens)), str(r.at.data), span(r.rows), format_kept(r.kept)]
        if experts:
            cells.insert(6, "-" if r.experts is None else span(r.experts))
        if not all_shown:
            cells.insert(1, f"{alike - 1:,} more" if alike > 1 else "")
        table.add_row(*cells)
    return table


def text_timeline(layout: Layout) -> list[str]:
    """The pipeline's clock, a character a unit: of the first ranks and of the first units, where there are more."""
    bars = timeline(layout.schedule, layout.pp, layout.virtual, layout.micro_batches)
    units = round(max(bar.end for bar in bars))
    ranks = min(layout.pp, _TIMELINE_RANKS)
    cells = [["."] * units for _ in range(layout.pp)]
    for bar in bars:
        for unit in range(round(bar.start), round(bar.end)):
            cells[bar.rank][unit] = _LETTERS[bar.action.kind]
    lines = [f"pipeline rank {r:>{len(str(ranks - 1))}}  {''.join(cells[r][:_TIMELINE_UNITS])}" for r in range(ranks)]
    cut = [f"the first {ranks} of {layout.pp} pipeline ranks"] if ranks < layout.pp else []
    cut += [f"the first {_TIMELINE_UNITS} of {units:,} units"] if units > _TIMELINE_UNITS else []
    letters = "  F forward, B backward, W gradients of weights where they are apart, . bubble"
    return [*lines, letters + (f"; {', '.join(cut)}" if cut else "")]
