"""The `mikoshi` command: its verbs in the order of a user's day. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
import typer.core

from mikoshi.launch.cli import chaos, checkpoint, cluster, compare, config, data, megatron, plan, train, watch, weights
from mikoshi.trainer.exit_codes import DONE
from mikoshi.trainer.streams import open_streams
from mikoshi.trainer.train.rank import end_now, outage, say, told


class InOrder(typer.core.TyperGroup):
    """Lists groups of verbs, such as `checkpoint`, before the verbs of the same panel, where Typer has them last of all."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """The verbs in the order of their panels."""
        late = ("config", "chaos")
        names = super().list_commands(ctx)
        return [*(name for name in names if name not in late), *late]


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train a GPT on any layout of GPUs: one config, one plain model, the same run.",
    epilog="First run: `mikoshi prepare configs/runs/quickstart.toml`, then `mikoshi train configs/runs/quickstart.toml`.",
)

VERBS: dict[str, list[tuple[Callable[..., Any], str]]] = {
    "Train": [
        (data.prepare, data.PREPARE_EXAMPLES), (train.train, train.TRAIN_EXAMPLES), (train.generate, train.GENERATE_EXAMPLES),
        (train.report, train.REPORT_EXAMPLES),
    ],
    "Plan": [
        (plan.layout, plan.LAYOUT_EXAMPLES), (plan.dryrun, plan.DRYRUN_EXAMPLES), (plan.fit_batch, plan.FIT_BATCH_EXAMPLES),
        (compare.compare, compare.EXAMPLES),
    ],
    "Cluster": [
        (cluster.doctor, cluster.DOCTOR_EXAMPLES), (cluster.submit, cluster.SUBMIT_EXAMPLES),
        (watch.status, watch.STATUS_EXAMPLES), (watch.logs, watch.LOGS_EXAMPLES), (cluster.resume, cluster.RESUME_EXAMPLES),
        (cluster.cancel, cluster.CANCEL_EXAMPLES), (watch.runs, watch.RUNS_EXAMPLES), (cluster.export, cluster.EXPORT_EXAMPLES),
    ],
    "Look after": [(config.config, config.CONFIG_EXAMPLES), (chaos.chaos, chaos.EXAMPLES)],
}  # fmt: skip
"""By panel of the help: each verb and its examples."""

for panel, verbs in VERBS.items():
    for verb, examples in verbs:
        app.command(epilog=examples, rich_help_panel=panel)(verb)
for name, group in (("checkpoint", checkpoint.checkpoint_app), ("data", data.data_app), ("tokenizer", data.tokenizer_app)):
    app.add_typer(group, name=name, rich_help_panel="Look after")
checkpoint.checkpoint_app.command(name="export", epilog=weights.EXPORT_EXAMPLES)(weights.export_weights)
checkpoint.checkpoint_app.command(name="import", epilog=weights.IMPORT_EXAMPLES)(weights.import_weights)
for name, verb, examples in megatron.VERBS:
    checkpoint.checkpoint_app.command(name=name, epilog=examples)(verb)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 fault, 2 the user's mistake, 75 stopped on request and saved."""
    open_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Exception as error:
        if told(error) is None and not outage(error):
            raise
        sys.exit(say(error, rank=0))


def command() -> NoReturn:
    """The program: main(). One that was a rank itself is gone after it, whatever threads and destructors of libraries want:
    gloo's joins a thread that waits for the interpreter, which waits for it."""
    try:
        main()
        code: object = DONE
    except SystemExit as end:
        code = end.code
    world = sys.modules.get("mikoshi.parallel.process.process_group")
    if world is not None and world.has_joined() and isinstance(code, int):
        end_now(code)
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    command()
