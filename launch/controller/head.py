"""The process that leads one attempt at a submitted run, to its result.json, over lost ranks and lost nodes.

`python -P -m mikoshi.launch.controller.head RUNFOLDER`, started by a backend inside the cluster (or, for ssh, where the run was
submitted). With --list FILE the folder is a line of that file: the one whose number SLURM_ARRAY_TASK_ID gives.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mikoshi.data.io.atomic import write_file
from mikoshi.launch.agent.outcome import RanksOutcome
from mikoshi.launch.agent.rendezvous import loopback_interface
from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.backends.open import open_site
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.config.private_env import PRIVATE, read_private, set_env
from mikoshi.launch.controller.agent_pool import POLL_INTERVAL, AgentPool
from mikoshi.launch.controller.claim import claim_attempt, current_job, folder_from_arguments
from mikoshi.launch.controller.gang import Gang, RankTask
from mikoshi.launch.controller.restart_policy import FAULTS_TO_BLAME, Fault, RestartDecision, bad_node, pause_before
from mikoshi.launch.controller.supervisor import collect_signals, pause, print_stderr, run_with_restarts
from mikoshi.launch.controller.tee import tee
from mikoshi.launch.runs.record import Attempt, Request, Result, Started, Status, SubmittedRun, exists, open_submitted
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.errors import USER_ERRORS, LaunchError, OutageError
from mikoshi.trainer.exit_codes import DONE, FAULT, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import read_jsonl
from mikoshi.trainer.streams import open_streams

if TYPE_CHECKING:
    from mikoshi.launch.backends.base import Site

_STATUS_INTERVAL = 2.0
_MISSING_LIMIT = 3
"""Failed checks in a row before the run folder counts as removed, since a network file system may fail briefly."""

_FIRST_REJOIN = 10.0
"""Minimum seconds that a run which accepts fewer nodes waits for all of them at its start."""


def main() -> None:
    """Run the head process and exit with the attempt's code."""
    open_streams(unread=True)
    requests = StopRequests(float("inf"))  # signals count from the first moment on
    with collect_signals(requests):
        try:
            code = run_attempt(folder_from_arguments(sys.argv[1:]), requests)
        except USER_ERRORS as error:
            print_stderr(f"error: {error}")
            code = USER_ERROR
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def run_attempt(folder: Path, requests: StopRequests) -> int:
    """Lead one attempt to its end, and return its exit code.

    It is the newest attempt that nobody leads yet, or a new one if the scheduler has requeued the job. Raises LaunchError
    if there is no such run, or no attempt to lead.
    """
    run = open_submitted(folder)
    requests.set_grace(run.spec.config.recovery.grace)
    attempt = claim_attempt(run, current_job(run))
    pod = isinstance(run.spec.cluster, KubernetesCluster)
    with tee([attempt.head_log, attempt.rank_log(0)]) if pod else contextlib.nullcontext():
        _redirect_output(attempt.head_log)
        _raise_file_limit()
        return _run_to_result(run, attempt, requests)


def _run_to_result(run: SubmittedRun, attempt: Attempt, requests: StopRequests) -> int:
    """Run an attempt and write its result.json; return its exit code."""
    site: Site | None = None
    try:
        os.chdir(run.spec.workdir)
        site = open_site(run.spec.cluster, run, attempt)
        result = _run_nodes(run, attempt, site, requests)
    except USER_ERRORS as error:
        print_stderr(f"error: {error}")
        result = Result(state="refused", code=USER_ERROR, why=str(error), time=time.time())
    except Exception as error:  # a bug of ours: the log has it, and the run can resume from its checkpoint
        traceback.print_exception(error)
        why = f"the head failed: {type(error).__name__}: {error}"
        result = Result(state="failed", code=FAULT, why=why, time=time.time())
    if site is not None:
        result = site.after(run, attempt, result)
    try:
        attempt.write(result)
    except FileNotFoundError:  # the run folder was removed
        pass
    except OSError as error:
        print_stderr(f"error: {attempt.path / 'result.json'}: cannot be written: {error.strerror}")
    print_stderr(f"{result.state}: {result.why}{f'; {result.next}' if result.next else ''}")
    return result.code


def _witness(run: SubmittedRun) -> Path | None:
    """A file of the run folder that all nodes must see, or None where every pod has its own disk and saves to a bucket."""
    cluster = run.spec.cluster
    apart = isinstance(cluster, KubernetesCluster) and not cluster.claim
    return None if apart else run.folder.path.absolute() / "spec.json"


@dataclass
class HeadState:
    """What the head knows about its attempt.

    names: nodes whose ranks run
    settings_nodes: nodes that settings.json was written for
    last_fault_time: Unix time of the last fault
    missing_checks: checks in a row in which the run folder was missing
    faults: faults since the last checkpoint
    bad: nodes that were found bad
    why: the reason for the result
    last_status: monotonic time of the last status.json
    """

    run: SubmittedRun
    attempt: Attempt
    pool: AgentPool
    request: Request
    names: list[str] = field(default_factory=list)
    settings_nodes: list[str] = field(default_factory=list)
    last_fault_time: float = 0.0
    missing_checks: int = 0
    faults: list[Fault] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    restarts: int = 0
    why: str = ""
    last_status: float = 0.0

    def run_gang(self, number: int) -> RanksOutcome:
        """Run gang number `number` on as many of the available nodes as a layout exists for. Raises LaunchError if too few
        are up."""
        patience = self.pool.cluster.patience
        rejoin = patience.rejoin if number else max(patience.rejoin, _FIRST_REJOIN)
        up = self.pool.gather(self.request.nodes, self.request.min_nodes, patience.start, rejoin, first=not number)
        if self.pool.requests.signals:
            return RanksOutcome(ranks=0, codes={0: PREEMPTED})
        names = self.choose_nodes(up)
        before, self.names = self.names, names
        if names != before:
            self.run.folder.event("nodes", nodes=names, lost=self.lost(), attempt=self.attempt.number)
        self.restarts = number
        envs = self._rank_settings(names)
        task = RankTask(
            "train", {"config": json.loads(self.run.spec.config.model_dump_json())}, self.run.folder.path.absolute(),
            self.attempt.path.absolute(), envs,
            bind="gpus" if self._device == "cuda" else "cores",
        )  # fmt: skip
        self.tick(True)
        outcome = Gang(self.pool, number, names, task, self.can_grow).run()
        if USER_ERROR in outcome.codes.values():
            self.why = next((text for rank, text in outcome.said.items() if outcome.codes.get(rank) == USER_ERROR), "")
        return outcome

    def choose_nodes(self, up: list[str]) -> list[str]:
        """Choose the nodes for the next gang from those that are up: the requested number, or the largest number with a
        valid layout.

        Raises LaunchError if no number has one.
        """
        least = self.request.min_nodes
        for count in range(min(len(up), self.request.nodes), least - 1, -1):
            with contextlib.suppress(LayoutError):
                self._layout(count)
                return up[:count]
        raise LaunchError(
            f"{len(up)} nodes are up, and no number of them from {least} on can be laid out: ask for other --nodes"
        )

    def _layout(self, nodes: int) -> None:
        from mikoshi.trainer.engines.layout import layout_of

        layout_of(self.run.spec.config, nodes * self.pool.cluster.ranks)

    def can_grow(self) -> bool:
        """Whether the run could use more nodes than it does, such as a lost one that is back."""
        if len(self.names) >= self.request.nodes:
            return False
        self.pool.start_agents()
        stable = self.pool.stable
        if len(stable) <= len(self.names) or not set(self.names) <= set(stable):
            return False
        return len(self.choose_nodes(stable)) > len(self.names)

    def lost(self) -> list[str]:
        """Nodes that were meant to be used and are not."""
        return [name for name in self.pool.down if name not in self.names]

    def on_fault(self, fault: Fault, saved: bool, decision: RestartDecision) -> None:
        """Record a fault. A node with several faults in a row is avoided if the run can do without it.

        saved: whether a checkpoint was committed since the fault before
        """
        self.why = f"{fault.who} {fault.how}{fault.where}{f'. {decision.why}' if decision.why else ''}"
        self.last_fault_time = time.time()
        if saved:  # nodes that reached a checkpoint are sound
            self.faults = []
            self.bad = [name for name in self.bad if name not in self.names]
        self.faults.append(fault)
        if decision.bug:
            self.bad = []
            return
        node = fault.node if fault.cause == "node" else bad_node(self.faults)
        if not node or node in self.bad:
            return
        self.bad.append(node)
        others = [name for name in self.pool.up if name != node]
        if fault.cause != "node" and decision.restart and len(others) >= self.request.min_nodes:
            self.pool.avoided.add(node)
            self.run.folder.event("avoid", node=node, how=f"{FAULTS_TO_BLAME} faults in a row there")
            print_stderr(f"{node}: {FAULTS_TO_BLAME} faults in a row there: the run goes on without it")

    def nodes_to_avoid(self) -> list[str]:
        """Names, as the scheduler knows them, of the nodes that another attempt should avoid; none if that would be all of
        them."""
        since = [
            e
            for e in read_jsonl(self.run.folder.events)
            if e.get("event") == "save" and e.get("time", 0) > self.last_fault_time
        ]
        bad = [name for name in self.bad if name not in self.names or not since]
        if not set(self.pool.names) - set(bad):
            return []
        return [self.pool.last_hello.get(name, {}).get("node") or name for name in bad]

    def code_for(self, error: ValueError) -> int:
        """Return the exit code for an error that keeps the ranks from starting.

        It is the user's error only before the first start. What worked once and fails now is an outage, and its nodes are
        bad.
        """
        if isinstance(error, OutageError):
            up = self.pool.up
            self.bad += [name for name in self.pool.down if name not in (*up, *self.bad)]
        elif self.has_run and not self.names and self.run.spec.cluster.kind == "slurm":
            self.bad.append(self.pool.names[0])  # the node of this head: others may have what it lacks
        return FAULT if self.has_run or isinstance(error, OutageError) else USER_ERROR

    @property
    def has_run(self) -> bool:
        """Whether ranks of this run have started before, so that its config was valid once."""
        return bool(self.names) or any(event.get("event") == "nodes" for event in read_jsonl(self.run.folder.events))

    def idle(self) -> None:
        """Poll the nodes and update status.json. Called again and again during a pause."""
        self.pool.poll(POLL_INTERVAL)
        self.tick()

    @property
    def _device(self) -> str:
        spec = self.run.spec
        return "cpu" if spec.config.engine.device == "cpu" or not spec.cluster.gpus_per_node else "cuda"

    def _rank_settings(self, names: list[str]) -> dict[str, dict[str, str]]:
        """The environment variables of each node's ranks. Those of the first node go into settings.json with their reasons."""
        from mikoshi.launch.config.settings import as_records, check_order, settings

        spec, ranks = self.run.spec, self.pool.cluster.ranks
        alone = loopback_interface() if len(names) == 1 else ""
        chosen = {
            name: settings(spec.cluster, len(names), ranks, alone or hello["interface"], self._device, hello["cores"])
            for name, hello in self.pool.hello.items()
            if name in names
        }
        if names != self.settings_nodes:
            self.settings_nodes = names
            write_file(self.attempt.settings, json.dumps(as_records(chosen[names[0]]), indent=2).encode())
            for line in check_order(spec.config.parallel, ranks, len(names)):
                print_stderr(f"warning: {line}")
        return {name: {one.name: one.value for one in settings} for name, settings in chosen.items()}

    def tick(self, now: bool = False) -> None:
        """Update status.json if two seconds have passed, or at once if `now` is set."""
        if not now and time.monotonic() - self.last_status < _STATUS_INTERVAL:
            return
        self.last_status = time.monotonic()
        self._check_folder()
        phase = "stopping" if self.pool.requests.signals else "running" if self.names else "starting"
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.attempt.write(
                Status(time=time.time(), phase=phase, nodes=self.names, lost=self.lost(), restarts=self.restarts)
            )

    def _check_folder(self) -> None:
        """End this attempt if its run folder was removed, or if another attempt was begun since it was taken for dead."""
        follower = self.attempt.path.with_name(str(self.attempt.number + 1)) / "request.json"
        try:
            there, followed = exists(self.run.folder.path / "spec.json"), exists(follower)
        except OSError:  # the file system does not answer
            return
        self.missing_checks = self.missing_checks + 1 if followed or not there else 0
        if self.missing_checks == _MISSING_LIMIT:
            reason = f"{follower.parent} is another attempt" if followed else f"{self.run.folder.path} was removed"
            print_stderr(f"error: {reason}: this one is ended")
            for _ in range(2):  # twice, like a second Ctrl-C: end at once
                self.pool.requests.add(signal.SIGINT)


def _run_nodes(run: SubmittedRun, attempt: Attempt, site: Site, requests: StopRequests) -> Result:
    """Run an attempt from the start of its nodes to the end of its last rank."""
    spec, request = run.spec, attempt.request
    me = psutil.Process()
    pool: AgentPool | None = None
    state: HeadState | None = None
    why = ""
    try:
        attempt.write(
            Started(
                host=socket.gethostname(),
                pid=me.pid,
                began=me.create_time(),
                nodes=site.nodes(),
                ranks_per_node=spec.cluster.ranks,
                time=time.time(),
            )
        )
        run.folder.event("attempt", number=attempt.number, cause=request.cause, nodes=site.nodes())
        env = read_private(run.folder.path / PRIVATE)
        pool = AgentPool(
            site, spec.cluster, spec.config.recovery, requests, attempt.node_log, Path(spec.workdir), env, _witness(run)
        )  # fmt: skip
        state = HeadState(run, attempt, pool, request)
        pool.tick = state.tick
        pool.start_agents()  # they import while this process checks the data
        with set_env(env | spec.cluster.env):
            _preflight(state)
        run.folder.make()
        again = request.cause != "submit"
        code = run_with_restarts(state.run_gang, requests, run.folder, spec.config.recovery, state.on_fault, again, state.idle)
    except USER_ERRORS as error:
        code, why = (state.code_for(error) if state is not None else USER_ERROR), str(error)
        print_stderr("\n".join(f"error: {line}" for line in why.splitlines()))
    finally:
        if pool is not None:
            pool.close()
    return _result(attempt, code, why or (state.why if state else ""), state)


def _preflight(state: HeadState) -> None:
    """Check layout, data and tokenizer before any rank starts.

    Storage that does not answer is tried again as often, and after the same pauses, as failed ranks are restarted. Raises
    OutageError if it never answers, else what foresee() raises.
    """
    from mikoshi.trainer.train.preflight import foresee
    from mikoshi.trainer.train.rank import is_outage

    spec, policy = state.run.spec, state.run.spec.config.recovery
    for number in itertools.count(1):
        try:
            foresee(spec.config, state.request.nodes * spec.cluster.ranks)  # the nodes' hardware may differ from this machine's
            return
        except Exception as error:
            if not is_outage(error):
                raise
            if state.pool.requests.signals:
                return
            if number > policy.restarts:
                raise OutageError(str(error)) from None
            seconds = pause_before(number + 1, policy.backoff)
            print_stderr(f"{error}; asked again in {seconds:g} s")
            pause(seconds, state.pool.requests, state.idle)


def _result(attempt: Attempt, code: int, why: str, head: HeadState | None) -> Result:
    """Build the record for result.json, before the site decides what follows."""
    stop = attempt.stop
    now = time.time()
    bad = head.nodes_to_avoid() if head else []
    if code == DONE:
        return Result(state="done", code=code, why="all steps are done", time=now, bad_nodes=bad)
    if code == PREEMPTED:
        if stop is not None:
            return Result(state="cancelled", code=code, why=f"asked to by {stop.by}", time=now, bad_nodes=bad)
        return Result(state="stopped", code=code, why="a signal asked it to stop; all is saved", time=now, bad_nodes=bad)
    state = "refused" if code == USER_ERROR else "failed"
    return Result(state=state, code=code, why=why or f"exit code {code}", time=now, bad_nodes=bad)


def _raise_file_limit() -> None:
    """Allow as many open files as possible: each node takes two pipe ends, so a thousand nodes exceed the default limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _redirect_output(log: Path) -> None:
    """Append this process's output to the attempt's log, even if the scheduler opened one file for all attempts."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    main()
