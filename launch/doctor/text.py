"""Prints the doctor's report: the checks, what to do, and the settings that a run would get."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mikoshi.launch.doctor.doctor import Report
from mikoshi.trainer.exit_codes import DONE

_LABELS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("WRONG", "bold red"), "skipped": ("-", "dim")}


def show_report(console: Console, report: Report) -> None:
    """Print the report. Text from nodes is never taken for markup."""
    console.print(Group(_checks(report), Text(), _settings(report), Text(), _end(report)))


def _checks(report: Report) -> Table:
    table = Table(title=f"{len(report.nodes)} nodes: {_shorten(report.nodes)}", title_justify="left", show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found, and what to do", overflow="fold")
    for check in report.checks:
        sign, style = _LABELS[check.verdict]
        lines = Text("\n".join([check.found, *(f"- {line}" for line in check.todo)]).strip("\n"))
        table.add_row(Text(check.name), Text(sign, style), lines)
    return table


def _settings(report: Report) -> Table:
    table = Table(title="What every rank of a run would get", title_justify="left")
    table.add_column("variable", no_wrap=True)
    table.add_column("why", overflow="fold")
    for one in report.settings:
        table.add_row(Text(f"{one.name}={one.value}"), Text(one.why))
    return table


def _end(report: Report) -> Text:
    if report.code == DONE:
        notes = sum(check.verdict == "note" for check in report.checks)
        return Text(f"fit to train on{f', {notes} notes' if notes else ''}", "green")
    wrong = [check.name for check in report.checks if check.verdict == "bad"]
    return Text(f"not fit: {', '.join(wrong)}", "bold red")


def _shorten(nodes: tuple[str, ...]) -> str:
    return ", ".join(nodes) if len(nodes) <= 8 else f"{', '.join(nodes[:7])} ... {nodes[-1]}"
