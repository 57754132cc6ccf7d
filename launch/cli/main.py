"""The `mikoshi` command, with its verbs in the order of a user's day. No verb imports what another one needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
import typer.core

from mikoshi.launch.cli import chaos, checkpoint, cluster, compare, config, data, megatron, plan, train, watch, weights
from mikoshi.trainer.exit_codes import DONE
from mikoshi.trainer.streams import open_streams
from mikoshi.trainer.train.rank import exit_now, is_outage, report_error, user_message


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
"""Each verb with its examples, by panel of the help."""

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
    """Run the command. Exit codes: 0 done, 1 fault, 2 the user's mistake, 75 stopped on request and saved."""
    open_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Exception as error:
        if user_message(error) is None and not is_outage(error):
            raise
        sys.exit(report_error(error, rank=0))


def command() -> NoReturn:
    """Run main() and exit. A process that was a rank exits at once, without waiting for threads and destructors.

    gloo's destructor joins a thread that waits for the interpreter lock, which the destructor holds.
    """
    try:
        main()
        code: object = DONE
    except SystemExit as end:
        code = end.code
    world = sys.modules.get("mikoshi.parallel.process.process_group")
    if world is not None and world.has_joined() and isinstance(code, int):
        exit_now(code)
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    command()
