"""Examines whether a cluster is fit to train on: it queries all nodes at once and makes one report."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mikoshi.launch.agent.pairs import MAX_ROUNDS, round_robin
from mikoshi.launch.config.cluster import Base
from mikoshi.launch.config.settings import Degrees, Setting, check_order, settings
from mikoshi.launch.doctor import checks
from mikoshi.launch.doctor.checks import Check, Facts, verdict
from mikoshi.launch.host.probe import wait_for_file
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.exit_codes import DONE, FAULT

TASK = "bandwidth"
"""The task's name in agent.tasks."""
_CLOCK_SAMPLES = 5
_NFS_TIMEOUT = 10.0
"""Seconds: NFS caches a folder for 3 to 60 s, and refreshes it when the folder is listed."""
_PROBE_TIMEOUT, _PAIR_TIMEOUT = 60.0, 20.0
_MAX_TRIES, _RETRY_WINDOW = 3, 60.0
"""Measurements of a node that seems slow, since its host may have been busy, and the seconds within which another may start.
Larger clusters take longer, but judge each node by more pairs."""


class Nodes(Protocol):
    """The nodes of a cluster, with an agent on each that came up."""

    @property
    def names(self) -> list[str]:
        """Nodes that came up."""
        ...

    @property
    def missing(self) -> dict[str, str]:
        """Nodes that did not come up, with the reason."""
        ...

    def probe(self, question: dict[str, Any], patience: float) -> dict[str, dict[str, Any]]:
        """Send a question to host.probe.answer on all nodes at once; {"error": reason} where there is no answer."""
        ...

    def ranks(
        self, nodes: list[str], per_node: int, work: str, arguments: dict[str, Any], patience: float
    ) -> dict[int, dict[str, Any]]:
        """Run a task in ranks of these nodes, and return each rank's answer. Raises LaunchError."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What to examine.

    folder: a folder that all nodes must share, as this machine sees it
    degrees: the parallelism of a run, if one is meant
    large: bytes of the large message; 0: as fits the device
    """

    folder: Path
    degrees: Degrees | None = None
    large: int = 0


@dataclass(frozen=True)
class Report:
    """The findings. settings: what a run's ranks would get."""

    nodes: tuple[str, ...]
    checks: tuple[Check, ...]
    settings: tuple[Setting, ...]

    @property
    def code(self) -> int:
        """DONE, or FAULT if a check is bad. A note is not bad."""
        return FAULT if any(check.verdict == "bad" for check in self.checks) else DONE

    def record(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {"ok": self.code == DONE, **asdict(self)}


def examine(nodes: Nodes, cluster: Base, inputs: Inputs, show: Callable[[str], None] = lambda _: None) -> Report:
    """Examine all nodes. Raises LaunchError if none came up.

    show: called with a line about what is being examined
    """
    if not nodes.names:
        why = "; ".join(f"{node}: {reason}" for node, reason in nodes.missing.items())
        raise LaunchError(f"no node came up: {why or 'the cluster gave none'}")
    show(f"asking {len(nodes.names)} nodes")
    facts, failed = _collect_facts(nodes, inputs, cluster)
    rows = [checks.check_up(nodes.names, nodes.missing)]
    if failed:
        rows.append(checks.check_answers(facts, failed))
    rows += [
        checks.check_versions(facts),
        checks.check_gpus(facts, cluster.gpus_per_node),
        checks.check_health(facts),
        checks.check_machine(facts),
        checks.check_disks(facts, str(inputs.folder)),
        checks.check_clock(_offsets(nodes)),
    ]
    show("looking whether the work folder is shared")
    rows.append(_shared(nodes, inputs.folder))
    show("connecting every node to every other")
    reached, cut = _ports(nodes, cluster)
    rows += [checks.check_network(facts), reached]
    device = "cuda" if facts and all(fact["torch_gpus"] for fact in facts.values()) else "cpu"
    able = [node for node in nodes.names if node in facts]
    ranks = _ranks(cluster, facts)
    show(f"measuring bandwidth between {len(able)} nodes")
    rows += _bandwidth(nodes, able, ranks, cut, device, inputs, show)
    if inputs.degrees is not None:
        rows.append(verdict("order of ranks", "node by node", [], check_order(inputs.degrees, ranks, len(able))))
    return Report(tuple(nodes.names), tuple(rows), tuple(_settings(cluster, facts, ranks, device)))


def _collect_facts(nodes: Nodes, inputs: Inputs, cluster: Base) -> tuple[Facts, dict[str, str]]:
    question = {"ask": "about", "workdir": str(inputs.folder), "interface": cluster.network.interface}
    answers = nodes.probe(question, _PROBE_TIMEOUT)
    # If only the GPU tool fails, the rest of the answer counts.
    facts = {node: answer for node, answer in answers.items() if "versions" in answer}
    return facts, {node: str(answer.get("error", "")) for node, answer in answers.items() if node not in facts}


def _ranks(cluster: Base, facts: Facts) -> int:
    """Ranks per node, as a run would have them."""
    there = min((int(fact["torch_gpus"]) for fact in facts.values()), default=0)
    return cluster.ranks_per_node or cluster.gpus_per_node or there or 1


def _offsets(nodes: Nodes) -> dict[str, tuple[float, float]]:
    """How many seconds each node's clock is ahead of this one, and the error: half of the shortest round trip (as in NTP)."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(_CLOCK_SAMPLES):
        sent = time.time()
        answers = nodes.probe({"ask": "clock"}, _PROBE_TIMEOUT)
        back = time.time()
        for node, answer in answers.items():
            within = (back - sent) / 2
            if "time" in answer and (node not in best or within < best[node][1]):
                best[node] = (float(answer["time"]) - (sent + back) / 2, within)
    return best


def _shared(nodes: Nodes, folder: Path) -> Check:
    """Check that files written here are visible there, and the other way round.

    A copy of the folder in a container, or one of the same name on a local disk, fails.
    """
    try:
        with _scratch_folder(folder) as scratch:
            token = secrets.token_hex(16)
            (scratch / "head").write_text(token, encoding="ascii")
            question = {"ask": "shared", "folder": str(scratch), "name": "head", "token": token, "patience": _NFS_TIMEOUT}
            answers = nodes.probe(question, _PROBE_TIMEOUT)
            wrong = {node: why for node, answer in answers.items() if (why := _not_shared(scratch, answer))}
    except OSError as error:
        return verdict("shared folder", str(folder), [f"{folder}: cannot write to it from here: {error.strerror}: set workdir"])
    return checks.check_shared(str(folder), wrong, {node: str(answer.get("kind", "")) for node, answer in answers.items()})


def _not_shared(scratch: Path, answer: dict[str, Any]) -> str:
    if why := answer.get("error") or answer.get("why"):
        return str(why)
    missing = wait_for_file(scratch, str(answer["wrote"]), str(answer["token"]), time.monotonic() + _NFS_TIMEOUT)
    return f"what it writes there is not seen here: {missing}" if missing else ""


@contextlib.contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    path = folder / f".mikoshi-doctor-{secrets.token_hex(8)}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _ports(nodes: Nodes, cluster: Base) -> tuple[Check, list[tuple[str, str]]]:
    """Connect from every node to a port of every other."""
    listening = nodes.probe(
        {"ask": "listen", "interface": cluster.network.interface, "seconds": _PROBE_TIMEOUT}, _PROBE_TIMEOUT
    )
    to = {node: [at["address"], at["port"], at["hello"]] for node, at in listening.items() if "port" in at}
    answers = nodes.probe({"ask": "connect", "to": to, "patience": 5.0}, _PROBE_TIMEOUT)
    reached = {
        node: {other: how for other, how in answer.get("reached", {}).items() if other != node}
        for node, answer in answers.items()
    }
    return checks.check_ports(reached)


def _bandwidth(
    nodes: Nodes, able: list[str], per_node: int, cut: list[tuple[str, str]], device: str, inputs: Inputs,
    show: Callable[[str], None],
) -> list[Check]:  # fmt: skip
    if len(able) * per_node < 2:
        return [Check("bandwidth", "skipped", "one rank: nothing to measure")]
    arguments = {
        "nodes": able, "per_node": per_node, "device": device, "cut": [list(pair) for pair in cut], "large": inputs.large,
        "patience": _PAIR_TIMEOUT,
    }  # fmt: skip
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    backend, wrong, began = "", "no rank has answered: see the logs of the ranks", time.monotonic()
    for tries in range(1, _MAX_TRIES + 1):
        try:
            answers = nodes.ranks(
                able, per_node, TASK, arguments, _PROBE_TIMEOUT + (len(round_robin(len(able), MAX_ROUNDS)) + 2) * _PAIR_TIMEOUT
            )
        except LaunchError as error:
            answers, wrong = {}, str(error)
        if not answers:
            break  # keep earlier measurements
        backend = str(next(iter(answers.values())).get("backend", ""))
        now, over_all = _merge_answers(answers)
        pairs |= {pair: _better(pairs.get(pair), how) for pair, how in now.items()}
        whole = _better(whole, over_all)
        slow = checks.slow_nodes(checks.speeds_of(pairs), able)
        if not slow or tries == _MAX_TRIES or time.monotonic() - began > _RETRY_WINDOW:
            break
        show(f"measuring again, {', '.join(slow)} seemed slow")
    if not whole:
        return [verdict("bandwidth", "not measured", [wrong])]
    return [checks.check_pairs(pairs, able), checks.check_all_ranks(whole, backend)]


def _merge_answers(answers: Mapping[Any, Mapping[str, Any]]) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    """The speeds between every two nodes, and over all ranks."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    whole = None
    for answer in answers.values():
        for other, how in answer.get("pairs", {}).items():
            pair = (min(answer["node"], other), max(answer["node"], other))
            pairs[pair] = _worse(pairs.get(pair), how)
        whole = _worse(whole, answer.get("all", {"error": "no answer"}))
    assert whole is not None
    return pairs, whole


def _worse(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """The worse of two measurements; a failure on one rank is a failure for all."""
    if one is None or "error" in other:
        return other
    return one if "error" in one or one["bus_gb_s"] <= other["bus_gb_s"] else other


def _better(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """The better of two measurements, since other load makes a link slower. A single failure counts."""
    if not one or "error" in other:
        return other
    return one if "error" in one or one["bus_gb_s"] >= other["bus_gb_s"] else other


def _settings(cluster: Base, facts: Facts, ranks: int, device: str) -> list[Setting]:
    if not facts:
        return []
    first = next(iter(facts.values()))
    cores = min(int(fact["cores"]) for fact in facts.values())
    return settings(cluster, len(facts), ranks, str(first["network"]["interface"]), device, cores)
