"""The verbs that submit runs to a cluster, cancel and resume them: a thin layer over launch, imported on demand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mikoshi.data.io.json import dumps
from mikoshi.launch.cli.arguments import AsJson, Config, NamedRun, Overrides
from mikoshi.launch.cli.watch import exit_on_interrupt, follow_run, print_notes
from mikoshi.trainer.streams import go_on_unread

if TYPE_CHECKING:
    from mikoshi.launch.backends.base import Backend
    from mikoshi.launch.config.cluster import Cluster
    from mikoshi.launch.operate.submit import SubmitPlan

On = Annotated[str, typer.Option("--on", help="a cluster file, or the name of one in configs/clusters", show_default=False)]
Nodes = Annotated[int | None, typer.Option(min=1, help="nodes (default: as the cluster file has it)", show_default=False)]
MinNodes = Annotated[
    int | None,
    typer.Option(
        min=1, help="go on with so few when nodes are lost (default: recovery.min_nodes, else all)", show_default=False
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="cluster settings over the file's, as cluster.key=value", show_default=False)
]

SUBMIT_EXAMPLES = (
    "Examples: `mikoshi submit configs/runs/quickstart.toml --on local`, "
    "`mikoshi submit run.toml --on slurm --nodes 8 --min-nodes 6 parallel.tp=8 --dry-run`, "
    "`mikoshi submit run.toml --on slurm --sweep optim.lr=1e-3,3e-4 --sweep run.seed=1,2`, "
    "`mikoshi submit run.toml --on my/cluster.toml --set cluster.partition=long`"
)
CANCEL_EXAMPLES = "Examples: `mikoshi cancel runs/quickstart`, `mikoshi cancel quickstart --now`"
RESUME_EXAMPLES = (
    "Examples: `mikoshi resume runs/quickstart`, `mikoshi resume quickstart --nodes 2`, "
    "`mikoshi resume quickstart --exclude-node n7 --exclude-node n9`"
)
EXPORT_EXAMPLES = (
    "Examples: `mikoshi export run.toml --on kubernetes --as pytorchjob > job.yaml`, "
    "`mikoshi export run.toml --on slurm --as slurm --nodes 4`"
)
DOCTOR_EXAMPLES = (
    "Examples: `mikoshi doctor --on local`, `mikoshi doctor --on slurm --nodes 8`, "
    "`mikoshi doctor --on ssh --run configs/runs/gpt2-124m.toml --json`"
)


def submit(
    config: Config,
    on: On,
    overrides: Overrides = None,
    nodes: Nodes = None,
    min_nodes: MinNodes = None,
    settings: Set = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="a run for each value, as key=a,b,c; of several, each combination", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check what can be known before, print what would be submitted, and end")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="then show what rank 0 says, until the run has ended")] = False,
) -> None:
    """Hand a run to a cluster: check it, make its run folder, queue it. The terminal can be closed then.

    What cannot be laid out, read or run there is refused before anything is queued.
    """
    from mikoshi.launch.operate.submit import check, make_plan, submit_all, sweep_plans
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.errors import LaunchError

    cluster = _cluster(on, settings)
    if sweep:
        if follow:
            raise LaunchError("--follow shows one run: leave it out with --sweep, and use `mikoshi logs RUN -f`")
        plans = sweep_plans(config, overrides or [], sweep, cluster, nodes, min_nodes)
    else:
        plans = [make_plan(load_config(config, overrides or []), cluster, nodes, min_nodes)]
    from mikoshi.launch.backends.open import open_backend

    backend = open_backend(cluster)
    print_notes({plan.unseen for plan in plans if plan.unseen})
    if dry_run:
        _preview(plans, cluster, backend)
        return
    for plan in plans:
        check(plan, backend)
    made = submit_all(plans, backend)
    _print_submitted(plans, [attempt.job for _, attempt in made])
    if follow:
        exit_on_interrupt(lambda: follow_run(plans[0].folder))


def _cluster(on: str, settings: list[str] | None) -> Cluster:
    from mikoshi.launch.config.cluster import load_cluster

    return load_cluster(on, tuple(text.removeprefix("cluster.") for text in settings or []))


def _preview(plans: list[SubmitPlan], cluster: Cluster, backend: Backend) -> None:
    """Print what would be submitted, even if it would be refused; that is reported after it. Raises LaunchError."""
    from mikoshi.launch.operate.submit import check
    from mikoshi.trainer.errors import LaunchError

    refused: LaunchError | None = None
    for plan in plans:
        try:
            if refused is None:  # query a cluster that does not answer only once
                check(plan, backend)
        except LaunchError as error:
            refused = error
        _print_plan(plan, cluster)
        try:
            typer.echo(backend.preview(plan.run, plan.request))
        except LaunchError as error:
            raise refused or error from None
    if refused is not None:
        raise refused


def _print_plan(plan: SubmitPlan, cluster: Cluster) -> None:
    from mikoshi.launch.config.paths import printable
    from mikoshi.launch.config.settings import check_order

    request = plan.request
    fewer = f"; goes on with {', '.join(map(str, plan.fewer))}" if plan.fewer else ""
    lines = [
        ("run", printable(plan.folder)),
        ("cluster", cluster.kind),
        ("nodes", f"{request.nodes}{fewer}"),
        ("layout", plan.layout),
    ]
    if plan.swept:
        lines.insert(1, ("swept", " ".join(f"{key}={value}" for key, value in plan.swept.items())))
    if any((cluster.env, cluster.secrets)):
        lines.append(("variables", " ".join([*cluster.env, *(f"{name} (secret)" for name in cluster.secrets)])))
    for name, text in lines:
        typer.echo(f"{name:<10}{text}")
    for warning in check_order(plan.spec.config.parallel, cluster.ranks, request.nodes):
        typer.echo(f"{'note':<10}{warning}")


def _print_submitted(plans: list[SubmitPlan], jobs: list[dict[str, str]]) -> None:
    from mikoshi.launch.config.paths import printable, relative, shell_quoted
    from mikoshi.launch.operate.board import job_name

    first, job = plans[0], job_name(jobs[0])
    path = shell_quoted(relative(first.folder))
    if len(plans) == 1:
        size = f"{first.request.nodes} node(s), {first.layout}"
        typer.echo(f"submitted: {printable(relative(first.folder))} ({size}){f', {job}' if job else ''}")
        for command in (f"mikoshi status {path}", f"mikoshi logs {path} -f", f"mikoshi cancel {path}"):
            typer.echo(f"  {command}")
        return
    for plan, one in zip(plans, jobs, strict=True):
        swept = " ".join(f"{key}={value}" for key, value in plan.swept.items())
        typer.echo(f"submitted: {printable(relative(plan.folder))} {swept} {job_name(one)}".rstrip())
    parent = shell_quoted(relative(first.folder.parent))
    typer.echo(f"  mikoshi runs --folder {parent}\n  mikoshi logs {path} -f\n  mikoshi cancel {path}")


def cancel(
    run: NamedRun,
    now: Annotated[bool, typer.Option("--now", help="end it at once, without a checkpoint")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="wait until it has ended")] = True,
) -> None:
    """End a run: it finishes its step, saves and stops; `mikoshi resume` goes on with it."""
    from mikoshi.launch.backends.open import open_backend
    from mikoshi.launch.config.paths import printable, shell_quoted
    from mikoshi.launch.operate.board import folder_of, newest_save
    from mikoshi.launch.operate.control import request_stop, run_status, wait_for_end
    from mikoshi.launch.operate.status import FINAL
    from mikoshi.launch.runs.record import open_submitted
    from mikoshi.trainer.errors import LaunchError

    path = folder_of(run)
    name, action = printable(path), "asked to end at once" if now else "asked to save and end"
    try:
        seen = run_status(path)
    except LaunchError as error:
        submitted = open_submitted(path)
        if not submitted.attempts:
            raise
        request_stop(submitted, open_backend(submitted.spec.cluster), now)  # this needs no record but the job
        typer.echo(f"{name}: {action}; not waited for: {error}")
        return
    if seen.state in FINAL:
        typer.echo(f"{name}: it has ended already: {seen.state}{f': {seen.why}' if seen.why else ''}")
        return
    backend = open_backend(seen.run.spec.cluster)
    request_stop(seen.run, backend, now)
    if not wait:
        typer.echo(f"{name}: {action}; `mikoshi status {shell_quoted(path)}` tells when it has")
        return
    shown = ""

    def show(state: str, why: str) -> None:
        nonlocal shown
        if state not in (shown, *FINAL):
            shown = state
            print(f"{name}: {state}{f': {why}' if why else ''} ...", file=sys.stderr, flush=True)

    try:
        end = wait_for_end(seen.run, backend, now, show)
    except KeyboardInterrupt:
        typer.echo(f"{name}: asked to end; not waited for")
        raise typer.Exit(130) from None
    saved = newest_save(end.run.folder)
    step = "no step is saved" if saved is None else f"step {saved} is saved"
    if end.run.attempts[-1].job.get("apart"):
        step = "what it saved is in the run folder on the cluster's disk"
    typer.echo(f"{name}: {end.state}{f': {end.why}' if end.why else ''}; {step}")
    if end.state != "done":
        typer.echo(f"  mikoshi resume {shell_quoted(path)}")


def resume(
    run: NamedRun,
    nodes: Annotated[int | None, typer.Option(min=1, help="nodes (default: as before)", show_default=False)] = None,
    min_nodes: MinNodes = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude-node", help="a node not to use from here on", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include-node", help="an avoided node to use again", show_default=False)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="then show what rank 0 says, until the run has ended")] = False,
) -> None:
    """Go on with a run that has ended, from its newest checkpoint, on as many nodes as before or on others.

    The global batch stays, and the next sample is the next one. Nodes that were found bad are avoided.
    """
    from mikoshi.launch.backends.open import open_backend
    from mikoshi.launch.config.paths import printable, shell_quoted
    from mikoshi.launch.operate.board import folder_of, job_name
    from mikoshi.launch.operate.control import resume as resume_run
    from mikoshi.launch.operate.control import run_status

    path = folder_of(run)
    seen = run_status(path)
    if seen.state == "done":
        typer.echo(f"{printable(path)}: it is done already: `mikoshi report {shell_quoted(path)}`")
        return
    attempt, layout = resume_run(seen, open_backend(seen.run.spec.cluster), nodes, min_nodes, exclude or [], include or [])
    request, job = attempt.request, job_name(attempt.job)
    avoided = f", avoiding {' '.join(request.avoided)}" if request.avoided else ""
    size = f"{request.nodes} node(s), {layout}{avoided}"
    typer.echo(f"resumed: {printable(path)}, attempt {attempt.number} ({size}){f', {job}' if job else ''}")
    again = shell_quoted(path)
    for command in (f"mikoshi status {again}", f"mikoshi logs {again} -f", f"mikoshi cancel {again}"):
        typer.echo(f"  {command}")
    if follow:
        exit_on_interrupt(lambda: follow_run(path))


def export(
    config: Config,
    on: On,
    kind: Annotated[
        Literal["pytorchjob", "trainjob", "jobset", "skypilot", "slurm"],
        typer.Option("--as", help="what to write it as", show_default=False),
    ],
    overrides: Overrides = None,
    nodes: Nodes = None,
    settings: Set = None,
) -> None:
    """Print a run as another tool takes it: a PyTorchJob, TrainJob or JobSet, a SkyPilot task, a Slurm script."""
    from mikoshi.launch.backends.open import open_backend
    from mikoshi.launch.operate.submit import make_plan
    from mikoshi.trainer.config.run import load_config
    from mikoshi.trainer.errors import LaunchError

    cluster = _cluster(on, settings)
    if kind == "slurm" and cluster.kind != "slurm":
        raise LaunchError(f"--as slurm: {on} is a cluster of kind {cluster.kind}: give one of kind slurm")
    plan = make_plan(load_config(config, overrides or []), cluster, nodes)
    if plan.unseen:
        print_notes([plan.unseen])
    if kind == "slurm":
        typer.echo(open_backend(cluster).preview(plan.run, plan.request))
        return
    from mikoshi.launch.backends.kubernetes.manifests import jobset, pytorchjob, to_yaml, trainjob
    from mikoshi.launch.backends.skypilot import skypilot

    made = {"jobset": jobset, "pytorchjob": pytorchjob, "trainjob": trainjob}
    objects = skypilot(plan.run, plan.request) if kind == "skypilot" else made[kind](plan.run, plan.request)
    typer.echo(to_yaml(objects), nl=False)


def doctor(
    on: On,
    nodes: Nodes = None,
    settings: Set = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="a run's TOML file, to look at its layout too", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at every node of a cluster: versions, GPUs, clock, disk, shared folder, ports, bandwidth between every pair.

    One table: green, or what to do. Exit code 0 where nothing is wrong, else 1.
    """
    go_on_unread()
    from rich.console import Console

    from mikoshi.launch.controller.allocation import allocate_nodes
    from mikoshi.launch.doctor.doctor import Inputs, examine
    from mikoshi.launch.doctor.text import show_report
    from mikoshi.trainer.config.run import load_config

    cluster = _cluster(on, settings)
    workdir = Path(cluster.workdir).expanduser().absolute() if cluster.workdir else Path.cwd()
    degrees = None if run is None else load_config(run).parallel
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    try:
        with console.status("bringing up nodes") as spinner, allocate_nodes(cluster, nodes or cluster.nodes, workdir) as found:
            report = examine(found, cluster, Inputs(workdir, degrees), spinner.update)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(dumps(report.record(), indent=2))
    else:
        show_report(Console(highlight=False, soft_wrap=True), report)
    raise typer.Exit(report.code)
