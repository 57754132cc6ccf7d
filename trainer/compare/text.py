"""A comparison as text: a table for the terminal, and the full table with notes as Markdown."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mikoshi.trainer.compare.comparison import WARM_UP, Comparison, ContestantResult, Difference

COLUMNS = (
    "engine", "layout", "tokens/s", "middle half of steps", "speed", "in the rounds", "MFU", "step", "peak memory a rank",
    "loss apart (relative)", "grad norm apart (relative)", "first loss", "",
)  # fmt: skip
AS_IS = "as the config says"
_GIB = 2**30


def cells(row: ContestantResult, first: bool) -> dict[str, str]:
    """Of a row, by the columns' names; empty where there is nothing to say."""
    one, f = row.contestant, row.figures
    named = dict.fromkeys(COLUMNS, "") | {"engine": one.engine, "layout": one.layout, "": outcome(row)}
    if f is None:
        return named
    if f.left:
        left = f"{f.left} steps were not applied (loss or gradient norm not a number)"
        named[""] = "; ".join(filter(None, [named[""], left]))
    measured = {
        "tokens/s": f"{f.tokens_per_second:,.0f}", "middle half of steps": f"{f.quartiles[0]:,.0f} to {f.quartiles[1]:,.0f}",
        "MFU": f"{f.mfu:.1%}" if f.mfu is not None else "", "step": f"{f.step_ms:,.1f} ms",
        "peak memory a rank": memory(f.memory, f.reserved),
    }  # fmt: skip
    if first:
        return named | measured
    return named | measured | {
        "speed": f"{f.ratio:.2f}x", "in the rounds": f"{f.ratios[0]:.2f}x to {f.ratios[1]:.2f}x" if f.ratios else "",
        "loss apart (relative)": _apart(f.loss), "grad norm apart (relative)": _apart(f.grad_norm),
        "first loss": "same bits" if f.same_first_loss else "differs",
    }  # fmt: skip


def outcome(row: ContestantResult) -> str:
    """Why a contestant did not run, or not to its end; empty for one that did."""
    if row.contestant.refused:
        return f"refused: {row.contestant.refused}"
    return f"FAILED: {row.failed}" if row.failed else ""


def _apart(apart: Difference) -> str:
    if not apart.absolute:
        return "0"
    return f"{apart.absolute:.1e} ({apart.relative:.1e})"


def memory(allocated: list[int], reserved: list[int]) -> str:
    """The largest of all ranks, and the smallest where they differ much."""
    most, least = max(allocated), min(allocated)
    told = f"{most / _GIB:.2f} GiB" if least > 0.95 * most else f"{least / _GIB:.2f} to {most / _GIB:.2f} GiB"
    return f"{told}, {max(reserved) / _GIB:.2f} reserved" if reserved else told


def table(found: Comparison) -> list[dict[str, str]]:
    """The rows, with the columns alone in which one of them says something."""
    rows = [cells(row, number == found.first) for number, row in enumerate(found.rows)]
    said = [name for name in COLUMNS if any(row[name] for row in rows)]
    return [{name: row[name] or (AS_IS if name == "layout" else "") for name in said} for row in rows]


def summary_lines(found: Comparison) -> list[str]:
    """What the figures are of, a line each."""
    plan, machine = found.plan, found.plan.machine
    gpus = list(dict.fromkeys(machine["gpus"]))
    on = " and ".join(f"{machine['gpus'].count(name)} x {name}" for name in gpus) or f"{machine['processor']}, no GPU"
    software = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    lines = [
        f"{plan.ranks} rank(s) on {on}, {machine['cores']} cores; {software}",
        f"medians over {plan.rounds} round(s) of {plan.steps} steps in turn, the first {WARM_UP} of each left out",
    ]
    ran = [row.contestant for row in found.rows if row.figures is not None]
    if any(one.compiled for one in ran):
        plain = ", ".join(one.name for one in ran if not one.compiled)
        lines.append(f"compiled by torch.compile{f', but for {plain}' if plain else ''}")
    if found.first is not None:
        one = found.rows[found.first]
        assert one.figures is not None
        lines.append(f"speed and differences: to {one.contestant.name}")
        if one.figures.own:
            lines.append(f"its own losses differ by up to {one.figures.own:.1e} from round to round: no difference is less")
        if max(len(row.rounds) for row in found.rows) < 2:
            lines.append("one round: how much of a difference is the machine's is not known: --rounds 2 or more tells")
    if not found.complete:
        lines.append("NOT COMPLETE: interrupted, or ended by a fault; the figures are of what had been run")
    return lines


def print_comparison(found: Comparison, console: Console, width: int) -> None:
    """As a table, or where that is wider than `width` as a few lines a contestant; with the reasons below."""
    rows = table(found)
    drawn = _drawn(found, rows)
    why = [f"{one.contestant.name}: {row['']}" for one, row in zip(found.rows, rows, strict=True) if row.get("")]
    if console.measure(drawn).maximum <= width:
        console.print(drawn)
    else:
        for one, row in zip(found.rows, rows, strict=True):
            console.print(Text("\n".join([one.contestant.name, *(f"  {line}" for line in _lines(row))]), style=_style(one)))
    console.print("\n".join(["", *why, *summary_lines(found)]), markup=False)


def _drawn(found: Comparison, rows: list[dict[str, str]]) -> Table:
    """As narrow as can be: the range of a figure is in its cell, and what is of less use is left to the files."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    brief = [_brief(one, row) for one, row in zip(found.rows, rows, strict=True)]
    for name in [name for name in brief[0] if any(row[name] for row in brief)]:
        left = name in ("engine", "layout", "first\nloss", "")
        shown.add_column(name, justify="left" if left else "right", vertical="bottom", no_wrap=True)
    for one, row in zip(found.rows, brief, strict=True):
        shown.add_row(*[Text(row[str(column.header)]) for column in shown.columns], style=_style(one))
    return shown


def _brief(one: ContestantResult, row: dict[str, str]) -> dict[str, str]:
    speed, spread = row.get("speed", ""), row.get("in the rounds", "")
    remark = "FAILED" if one.failed else "refused" if one.contestant.refused else "not all applied" if row.get("") else ""
    measured = one.figures is not None
    return {
        "engine": row["engine"],
        "layout": row.get("layout", ""),
        "tokens/s": row["tokens/s"] if measured else remark,
        "speed": f"{speed} ({spread.replace('x', '')})" if speed and spread else speed,
        "MFU": row.get("MFU", ""),
        "step": row.get("step", ""),
        "peak\nmemory": row.get("peak memory a rank", "").partition(",")[0],
        "loss\napart": row.get("loss apart (relative)", "").partition(" ")[0],
        "norm\napart": row.get("grad norm apart (relative)", "").partition(" ")[0],
        "first\nloss": row.get("first loss", "").removesuffix(" bits"),
        "": remark if measured else "",
    }


def _lines(row: dict[str, str]) -> list[str]:
    """A row's figures in lines of less than 80 characters; its outcome where it has none."""
    if not row.get("tokens/s"):
        return [row[""].partition(":")[0]]
    mfu = f", MFU {row['MFU']}" if row.get("MFU") else ""
    lines = [f"{row['tokens/s']} tokens/s ({row['middle half of steps']}), step {row['step']}{mfu}"]
    lines.append(f"peak memory of a rank {row['peak memory a rank']}")
    if row.get("speed"):
        lines.append(f"speed {row['speed']}{f' ({rounds})' if (rounds := row.get('in the rounds')) else ''}")
        lines.append(f"loss apart {row['loss apart (relative)']}, grad norm apart {row['grad norm apart (relative)']}")
        lines.append(f"first loss: {row['first loss']}")
    return lines


def _style(row: ContestantResult) -> str:
    return "red" if row.failed else "dim" if row.contestant.refused else ""


def markdown(found: Comparison) -> str:
    """All columns as a document, with the command that it came from."""
    rows = table(found)
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.values())} |" for row in rows]
    return "\n".join([f"`{found.plan.command}`", "", *[f"- {line}" for line in summary_lines(found)], "", *lines, ""])
