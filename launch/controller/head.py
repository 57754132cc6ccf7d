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
from mikoshi.launch.agent.outcome import Ended
from mikoshi.launch.agent.rendezvous import loopback_interface
from mikoshi.launch.agent.requests import Requests
from mikoshi.launch.backends.open import open_site
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.config.private_env import PRIVATE, applied, read_private
from mikoshi.launch.controller.agent_pool import LOOK, Crew
from mikoshi.launch.controller.claim import given, job_here, next_attempt
from mikoshi.launch.controller.gang import Course, Errand
from mikoshi.launch.controller.restart_policy import BLAMED, Fault, Verdict, bad_node, pause_before
from mikoshi.launch.controller.supervisor import asked, pause, persist, tell
from mikoshi.launch.controller.tee import echoed
from mikoshi.launch.runs.record import Attempt, Request, Result, Started, Status, Submitted, is_there, open_submitted
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.errors import USER_ERRORS, LaunchError, OutageError
from mikoshi.trainer.exit_codes import DONE, FAULT, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import read_jsonl
from mikoshi.trainer.streams import open_streams

if TYPE_CHECKING:
    from mikoshi.launch.backends.base import Site

_STATUS = 2.0
_GONE = 3
"""Looks in a row at which a run's folder is not there, before it is believed: a network's file system may hiccup."""

_FIRST = 10.0
"""Seconds that a run which may do with fewer nodes waits for all of them at its start, at least."""


def main() -> None:
    """Entry point; exits with the attempt's code."""
    open_streams(unread=True)
    requests = Requests(float("inf"))  # from the first moment on, a signal is a request
    with asked(requests):
        try:
            code = lead(given(sys.argv[1:]), requests)
        except USER_ERRORS as error:
            tell(f"error: {error}")
            code = USER_ERROR
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def lead(folder: Path, requests: Requests) -> int:
    """Carry the newest attempt that nobody leads yet to its end, or a new one if the scheduler has queued the job again; its
    exit code. Raises LaunchError where there is no such run, or nothing of it was asked for."""
    run = open_submitted(folder)
    requests.start(run.spec.config.recovery.grace)
    attempt = next_attempt(run, job_here(run))
    pod = isinstance(run.spec.cluster, KubernetesCluster)
    with echoed([attempt.head_log, attempt.rank_log(0)]) if pod else contextlib.nullcontext():
        _print_to(attempt.head_log)
        _many_files()
        return _led(run, attempt, requests)


def _led(run: Submitted, attempt: Attempt, requests: Requests) -> int:
    """See an attempt through to its result.json; its exit code."""
    site: Site | None = None
    try:
        os.chdir(run.spec.workdir)
        site = open_site(run.spec.cluster, run, attempt)
        result = _carried(run, attempt, site, requests)
    except USER_ERRORS as error:
        tell(f"error: {error}")
        result = Result(state="refused", code=USER_ERROR, why=str(error), time=time.time())
    except Exception as error:  # ours: it is in the log, and the run can go on from its newest checkpoint
        traceback.print_exception(error)
        why = f"the head failed: {type(error).__name__}: {error}"
        result = Result(state="failed", code=FAULT, why=why, time=time.time())
    if site is not None:
        result = site.after(run, attempt, result)
    try:
        attempt.write(result)
    except FileNotFoundError:  # the folder was removed, and the run with it
        pass
    except OSError as error:
        tell(f"error: {attempt.path / 'result.json'}: cannot be written: {error.strerror}")
    tell(f"{result.state}: {result.why}{f'; {result.next}' if result.next else ''}")
    return result.code


def _witness(run: Submitted) -> Path | None:
    """What all nodes must see of the run's folder; nothing where pods have a disk each, and a bucket for what they save."""
    cluster = run.spec.cluster
    apart = isinstance(cluster, KubernetesCluster) and not cluster.claim
    return None if apart else run.folder.path.absolute() / "spec.json"


@dataclass
class Lead:
    """What the head knows of its attempt. names: nodes of the ranks that run; set: those that settings were written down for;
    faults: since the last save."""

    run: Submitted
    attempt: Attempt
    crew: Crew
    request: Request
    names: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    struck: float = 0.0
    gone: int = 0
    faults: list[Fault] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    restarts: int = 0
    why: str = ""
    told: float = 0.0

    def carry(self, number: int) -> Ended:
        """One attempt of ranks, on the most nodes that answer and can be laid out. Raises LaunchError where too few do."""
        patience = self.crew.cluster.patience
        rejoin = patience.rejoin if number else max(patience.rejoin, _FIRST)
        up = self.crew.gather(self.request.nodes, self.request.min_nodes, patience.start, rejoin, first=not number)
        if self.crew.requests.asked:
            return Ended(ranks=0, codes={0: PREEMPTED})
        names = self.choose(up)
        before, self.names = self.names, names
        if names != before:
            self.run.folder.event("nodes", nodes=names, lost=self.lost(), attempt=self.attempt.number)
        self.restarts = number
        envs = self._settings(names)
        errand = Errand(
            "train", {"config": json.loads(self.run.spec.config.model_dump_json())}, self.run.folder.path.absolute(),
            self.attempt.path.absolute(), envs,
            bind="gpus" if self._device == "cuda" else "cores",
        )  # fmt: skip
        self.tick(True)
        ended = Course(self.crew, number, names, errand, self.more).run()
        if USER_ERROR in ended.codes.values():
            self.why = next((text for rank, text in ended.said.items() if ended.codes.get(rank) == USER_ERROR), "")
        return ended

    def choose(self, up: list[str]) -> list[str]:
        """Of these nodes, those for the next attempt: as many as were asked for, or the largest number that can be laid out.
        Raises LaunchError where none can."""
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

        layout_of(self.run.spec.config, nodes * self.crew.cluster.ranks)

    def more(self) -> bool:
        """Whether more nodes could carry the run than do: one that was lost may be back."""
        if len(self.names) >= self.request.nodes:
            return False
        self.crew.reach()
        steady = self.crew.steady
        if len(steady) <= len(self.names) or not set(self.names) <= set(steady):
            return False
        return len(self.choose(steady)) > len(self.names)

    def lost(self) -> list[str]:
        """Nodes that were to be used and are not."""
        return [name for name in self.crew.why if name not in self.names]

    def note(self, fault: Fault, saved: bool, verdict: Verdict) -> None:
        """Learn from a fault: a node that is at fault again and again is left out, where the run can do without it."""
        self.why = f"{fault.who} {fault.how}{fault.where}{f'. {verdict.why}' if verdict.why else ''}"
        self.struck = time.time()
        if saved:  # those that carried the run to a checkpoint are sound
            self.faults = []
            self.bad = [name for name in self.bad if name not in self.names]
        self.faults.append(fault)
        if verdict.bug:
            self.bad = []
            return
        node = fault.node if fault.cause == "node" else bad_node(self.faults)
        if not node or node in self.bad:
            return
        self.bad.append(node)
        others = [name for name in self.crew.up if name != node]
        if fault.cause != "node" and verdict.restart and len(others) >= self.request.min_nodes:
            self.crew.avoided.add(node)
            self.run.folder.event("avoid", node=node, how=f"{BLAMED} faults in a row there")
            tell(f"{node}: {BLAMED} faults in a row there: the run goes on without it")

    def unsound(self) -> list[str]:
        """Nodes that another attempt had better avoid, by the scheduler's names for them; none where that would be all."""
        since = [e for e in read_jsonl(self.run.folder.events) if e.get("event") == "save" and e.get("time", 0) > self.struck]
        bad = [name for name in self.bad if name not in self.names or not since]
        if not set(self.crew.names) - set(bad):
            return []
        return [self.crew.known.get(name, {}).get("node") or name for name in bad]

    def give_up(self, error: ValueError) -> int:
        """The exit code where `error` keeps the ranks from starting. It is the user's mistake only before the very first start:
        what was in order then is an outage now, of nodes which are bad."""
        if isinstance(error, OutageError):
            up = self.crew.up
            self.bad += [name for name in self.crew.why if name not in (*up, *self.bad)]
        elif self.ran and not self.names and self.run.spec.cluster.kind == "slurm":
            self.bad.append(self.crew.names[0])  # this one: others may have what it lacks
        return FAULT if self.ran or isinstance(error, OutageError) else USER_ERROR

    @property
    def ran(self) -> bool:
        """Whether ranks of this run have ever started: then it was in order once."""
        return bool(self.names) or any(event.get("event") == "nodes" for event in read_jsonl(self.run.folder.events))

    def idle(self) -> None:
        """A moment in which there is nothing to do but to hear from nodes and to give a sign of life."""
        self.crew.listen(LOOK)
        self.tick()

    @property
    def _device(self) -> str:
        spec = self.run.spec
        return "cpu" if spec.config.engine.device == "cpu" or not spec.cluster.gpus_per_node else "cuda"

    def _settings(self, names: list[str]) -> dict[str, dict[str, str]]:
        """The variables of each node's ranks; those of the first are written down, with the reasons."""
        from mikoshi.launch.config.settings import check_order, records, settings

        spec, ranks = self.run.spec, self.crew.cluster.ranks
        alone = loopback_interface() if len(names) == 1 else ""
        chosen = {
            name: settings(spec.cluster, len(names), ranks, alone or hello["interface"], self._device, hello["cores"])
            for name, hello in self.crew.hello.items()
            if name in names
        }
        if names != self.set:
            self.set = names
            write_file(self.attempt.settings, json.dumps(records(chosen[names[0]]), indent=2).encode())
            for line in check_order(spec.config.parallel, ranks, len(names)):
                tell(f"warning: {line}")
        return {name: {one.name: one.value for one in settings} for name, settings in chosen.items()}

    def tick(self, now: bool = False) -> None:
        """A sign of life, every other second."""
        if not now and time.monotonic() - self.told < _STATUS:
            return
        self.told = time.monotonic()
        self._there()
        phase = "stopping" if self.crew.requests.asked else "running" if self.names else "starting"
        with contextlib.suppress(OSError):  # a disk that is full costs the sign, not the run
            self.attempt.write(
                Status(time=time.time(), phase=phase, nodes=self.names, lost=self.lost(), restarts=self.restarts)
            )

    def _there(self) -> None:
        """A run whose folder was removed is ended: nobody could ask it to stop any more, nor find what it makes. So is this
        attempt where somebody, who took it for dead, has begun another."""
        follower = self.attempt.path.with_name(str(self.attempt.number + 1)) / "request.json"
        try:
            there, followed = is_there(self.run.folder.path / "spec.json"), is_there(follower)
        except OSError:  # a network's file system that does not answer tells nothing
            return
        self.gone = self.gone + 1 if followed or not there else 0
        if self.gone == _GONE:
            told = f"{follower.parent} is another attempt" if followed else f"{self.run.folder.path} was removed"
            tell(f"error: {told}: this one is ended")
            for _ in range(2):  # as the second Ctrl-C does: at once
                self.crew.requests.ask(signal.SIGINT)


def _carried(run: Submitted, attempt: Attempt, site: Site, requests: Requests) -> Result:
    """From the nodes' start to the last rank's end."""
    spec, request = run.spec, attempt.request
    me = psutil.Process()
    crew: Crew | None = None
    lead: Lead | None = None
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
        crew = Crew(
            site, spec.cluster, spec.config.recovery, requests, attempt.node_log, Path(spec.workdir), env, _witness(run)
        )  # fmt: skip
        lead = Lead(run, attempt, crew, request)
        crew.tick = lead.tick
        crew.reach()  # they import, while this process looks at the data
        with applied(env | spec.cluster.env):
            _foreseen(lead)
        run.folder.make()
        again = request.cause != "submit"
        code = persist(lead.carry, requests, run.folder, spec.config.recovery, lead.note, again, lead.idle)
    except USER_ERRORS as error:
        code, why = (lead.give_up(error) if lead is not None else USER_ERROR), str(error)
        tell("\n".join(f"error: {line}" for line in why.splitlines()))
    finally:
        if crew is not None:
            crew.close()
    return _result(attempt, code, why or (lead.why if lead else ""), lead)


def _foreseen(lead: Lead) -> None:
    """Look at layout, data and tokenizer before any rank does. Storage that does not answer is asked again, as often and after
    as long as ranks that fail are started again. Raises OutageError where it never does, else what foresee() raises."""
    from mikoshi.trainer.train.preflight import foresee
    from mikoshi.trainer.train.rank import outage

    spec, policy = lead.run.spec, lead.run.spec.config.recovery
    for number in itertools.count(1):
        try:
            foresee(spec.config, lead.request.nodes * spec.cluster.ranks)  # what this machine has is not what the nodes have
            return
        except Exception as error:
            if not outage(error):
                raise
            if lead.crew.requests.asked:
                return
            if number > policy.restarts:
                raise OutageError(str(error)) from None
            seconds = pause_before(number + 1, policy.backoff)
            tell(f"{error}; asked again in {seconds:g} s")
            pause(seconds, lead.crew.requests, lead.idle)


def _result(attempt: Attempt, code: int, why: str, lead: Lead | None) -> Result:
    """What result.json says, before the scheduler has a say in what follows."""
    stop = attempt.stop
    now = time.time()
    bad = lead.unsound() if lead else []
    if code == DONE:
        return Result(state="done", code=code, why="all steps are done", time=now, bad_nodes=bad)
    if code == PREEMPTED:
        if stop is not None:
            return Result(state="cancelled", code=code, why=f"asked to by {stop.by}", time=now, bad_nodes=bad)
        return Result(state="stopped", code=code, why="a signal asked it to stop; all is saved", time=now, bad_nodes=bad)
    state = "refused" if code == USER_ERROR else "failed"
    return Result(state=state, code=code, why=why or f"exit code {code}", time=now, bad_nodes=bad)


def _many_files() -> None:
    """Two pipe ends a node: with a thousand nodes, more than a process may have open by default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _print_to(log: Path) -> None:
    """What this process prints belongs to its attempt, also where a scheduler opened a file for all of a job's attempts."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


if __name__ == "__main__":
    main()
