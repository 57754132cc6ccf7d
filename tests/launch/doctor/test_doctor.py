"""The doctor, on this machine as a cluster of several nodes: real ranks, real connections, real files.

What this machine cannot have (GPUs, a clock that is wrong, a cut link) is written into one node's answer.
"""

import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median_high
from types import SimpleNamespace

import pytest
from rich.console import Console

from mikoshi.launch.agent import answers
from mikoshi.launch.agent.pairs import round_robin
from mikoshi.launch.config.cluster import LocalCluster
from mikoshi.launch.controller.allocation import allocate_nodes
from mikoshi.launch.doctor import checks
from mikoshi.launch.doctor.doctor import Inputs, examine
from mikoshi.launch.doctor.text import show_report
from mikoshi.launch.host.network import select_interface
from mikoshi.launch.host.probe import answer
from mikoshi.trainer.errors import LaunchError

ROOT = Path(__file__).parents[3]
CLUSTER = LocalCluster(kind="local", network={"interface": "lo"})
RANK = """import json, sys
from mikoshi.launch.agent.tasks import resolve_task
function, arguments = resolve_task(sys.argv[1], json.loads(sys.argv[2]))
sys.exit(function(*arguments))"""


class Here:
    """Nodes that are all this machine. change: of a node, what to make of its answers."""

    def __init__(self, folder, names=("a", "b", "c"), missing=None, change=None):
        self.folder, self.names, self.missing = folder, list(names), missing or {}
        self.change = change or {}

    def probe(self, question, patience):
        with ThreadPoolExecutor(len(self.names)) as pool:
            told = pool.map(lambda _: json.loads(json.dumps(answer(question))), self.names)
        return {
            node: self.change.get(node, lambda _, said: said)(question, said)
            for node, said in zip(self.names, told, strict=True)
        }

    def ranks(self, nodes, per_node, work, arguments, patience):
        size, processes = len(nodes) * per_node, []
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(size):
            place = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank % per_node,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            env = {**os.environ, **{key: str(value) for key, value in place.items()}, "GLOO_SOCKET_IFNAME": "lo"}
            env |= {"OMP_NUM_THREADS": "1", answers.VARIABLE: str(self.folder / f"answer-{rank}")}
            command = [sys.executable, "-P", "-c", RANK, work, json.dumps(arguments)]
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        try:
            ended = [(process.communicate(timeout=patience)[1], process.returncode) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if wrong := [said for said, code in ended if code]:
            raise LaunchError(f"ranks ended: {wrong[0].splitlines()[-1]}")
        return {rank: answers.read_answer(self.folder / f"answer-{rank}") for rank in range(size)}


class Mute(Here):
    """Whose ranks are not looked at."""

    def ranks(self, nodes, per_node, work, arguments, patience):
        raise LaunchError("not started in this test")


def rows(report):
    return {check.name: check for check in report.checks}


def look(nodes, tmp_path, cluster=CLUSTER, **inputs):
    return examine(nodes, cluster, Inputs(tmp_path, large=1 << 16, **inputs))


def about(change):
    def made(question, told):
        if question["ask"] == "about":
            change(told)
        return told

    return made


def gpu(index=0, **more):
    return {"index": index, "name": "H100", "memory_mib": 81559, "used_mib": 0, "celsius": 40, "ecc": 0, "pids": [], **more}


def with_gpus(*there, torch=None):
    return about(lambda told: told.update(gpus=list(there), torch_gpus=len(there) if torch is None else torch))


def test_three_sound_nodes_are_green_and_nothing_is_left_behind(tmp_path):
    seen = []
    folder = tmp_path / "work"
    folder.mkdir()
    report = examine(Here(tmp_path), CLUSTER, Inputs(folder, large=1 << 16), seen.append)
    # Which of three nodes on two cores is slow is chance.
    bad = {name: row for name, row in rows(report).items() if row.verdict == "bad" and name != "between nodes"}
    assert not bad
    assert "GB/s" in rows(report)["between nodes"].found and "3 ranks, gloo" in rows(report)["over all ranks"].found
    assert rows(report)["ports"].found == "6 of 6 connections"
    assert {one.name for one in report.settings} == {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "RES_OPTIONS"}
    assert not list(folder.iterdir()) and len([line for line in seen if "again" not in line]) == 4
    assert json.loads(json.dumps(report.record()))["nodes"] == ["a", "b", "c"]


@pytest.mark.parametrize(("setup", "said"), [("touch here", ""), ("echo no such module >&2; false", "no such module")])
def test_agents_start_as_those_of_a_run_do_after_the_lines_of_setup(tmp_path, setup, said):
    cluster = LocalCluster(kind="local", setup=f"cd {tmp_path}\n{setup}", patience={"start": 60.0})
    with allocate_nodes(cluster, 1, tmp_path) as nodes:
        if said:
            assert not nodes.names and all(why.endswith(said) for why in nodes.missing.values())
        else:
            assert nodes.names and not nodes.missing and (tmp_path / "here").exists()
    assert not list(tmp_path.glob(".mikoshi-doctor-*"))


def test_a_work_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    with (
        pytest.raises(LaunchError, match=r"workdir = .*: cannot be written to: No such file"),
        allocate_nodes(CLUSTER, 1, tmp_path / "no"),
    ):
        pass


@pytest.mark.slow
def test_a_cut_pair_is_named_and_the_other_pairs_are_measured(tmp_path):
    def cut(question, told):
        if question["ask"] == "connect":
            told["reached"]["b"] = {"error": "10.0.0.2 port 5: timed out"}
        return told

    found = rows(look(Here(tmp_path, change={"a": cut}), tmp_path))
    assert found["ports"].verdict == "bad" and "a cannot connect to b: 10.0.0.2 port 5: timed out" in found["ports"].todo[0]
    assert found["between nodes"].todo[0] == "a and b: no all-reduce between them: cannot reach each other"
    assert "GB/s" in found["between nodes"].found
    assert found["over all ranks"].verdict == "bad"


@pytest.mark.slow
def test_a_node_with_several_ranks_measures_with_all_of_them(tmp_path):
    cluster = LocalCluster(kind="local", ranks_per_node=2, network={"interface": "lo"})
    found = rows(look(Here(tmp_path, names=("a", "b")), tmp_path, cluster))
    assert "4 ranks" in found["over all ranks"].found and found["between nodes"].verdict == "ok"


class Measured(Mute):
    """Whose ranks say these speeds between a-b, a-c and b-c, of one try after the other; None: no all-reduce. A try of no
    speeds cannot be made."""

    def __init__(self, folder, *tries):
        super().__init__(folder)
        self.tries, self.asked = tries, 0

    def ranks(self, nodes, per_node, work, arguments, patience):
        if not self.tries[self.asked]:
            raise LaunchError("node a is gone")
        ab, ac, bc = ({"error": "cut"} if speed is None else self.speed(speed) for speed in self.tries[self.asked])
        self.asked += 1
        told = {"a": {"b": ab, "c": ac}, "b": {"a": ab, "c": bc}, "c": {"a": ac, "b": bc}}
        return {
            rank: {"node": node, "backend": "gloo", "pairs": told[node], "all": self.speed(self.asked)}
            for rank, node in enumerate(nodes)
        }

    def speed(self, speed):
        return {"latency_us": 9.0, "bus_gb_s": float(speed), "ranks": 2}


@pytest.mark.parametrize(
    ("tries", "asked", "todo"),
    [
        ([(9, 9, 9)], 1, []),
        ([(5, 9, 9)], 1, []),
        ([(5, 5, 9), (8, 8, 4)], 2, []),
        ([(5, 5, 9), (9, 9, 9)], 2, []),
        ([(1, 1, 9), (1, 2, 8), (9, 9, 9)], 3, []),
        ([(1, 1, 9), (1, 2, 8), (1, 1, 9)], 3, ["a: slow: 2.00 GB/s to the others, which have 9.00: check its link"]),
        ([(1, 1, 9), (1, None, 8), (9, 9, 9)], 3, ["a and c: no all-reduce between them: cut"]),
    ],
)
def test_a_node_that_seems_slow_is_measured_again(tmp_path, tries, asked, todo):
    nodes = Measured(tmp_path, *tries)
    row = rows(look(nodes, tmp_path))["between nodes"]
    assert nodes.asked == asked, "no more than it takes"
    assert row.verdict == ("bad" if todo else "ok")
    assert len(row.todo) == len(todo) and all(line.startswith(start) for line, start in zip(row.todo, todo, strict=True))
    assert rows(look(Measured(tmp_path, *tries), tmp_path))["over all ranks"].found.startswith(f"{asked}.00 GB/s")


def test_what_was_measured_stays_when_it_cannot_be_measured_again(tmp_path):
    found = rows(look(Measured(tmp_path, (1, 1, 9), ()), tmp_path))
    assert found["between nodes"].todo[0].startswith("a: slow: 1.00 GB/s") and found["over all ranks"].verdict == "ok"
    assert rows(look(Measured(tmp_path, ()), tmp_path))["bandwidth"].todo == ("node a is gone",)


def test_what_takes_long_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mikoshi.launch.doctor.doctor._RETRY_WINDOW", -1.0)
    nodes = Measured(tmp_path, (1, 1, 9), (9, 9, 9))
    assert rows(look(nodes, tmp_path))["between nodes"].verdict == "bad" and nodes.asked == 1


def test_one_rank_has_nothing_to_measure(tmp_path):
    report = look(Here(tmp_path, names=("a",)), tmp_path)
    assert report.code == 0 and rows(report)["bandwidth"].verdict == "skipped"


def test_a_node_that_did_not_come_up_is_named_with_why(tmp_path):
    report = look(Mute(tmp_path, names=("a",), missing={"b": "ssh: connect: No route to host"}), tmp_path)
    assert report.code == 1 and rows(report)["nodes up"].found == "1 of 2"
    assert rows(report)["nodes up"].todo == ("b: did not come up: ssh: connect: No route to host",)
    with pytest.raises(LaunchError, match="no node came up: b: refused"):
        look(Mute(tmp_path, names=(), missing={"b": "refused"}), tmp_path)


def test_the_node_with_another_version_is_named(tmp_path):
    other = about(lambda told: told["versions"].update(torch="2.9.0", kernel="5.4"))
    row = rows(look(Mute(tmp_path, change={"b": other}), tmp_path))["versions"]
    assert row.verdict == "bad" and row.todo[0].startswith("b: torch 2.9.0, 2 of 3 have")
    assert row.todo[1].startswith("b: kernel 5.4")


def test_a_node_that_cannot_answer_is_named_and_the_rest_is_still_looked_at(tmp_path):
    found = rows(look(Mute(tmp_path, change={"c": lambda *_: {"error": "no answer within 60 s"}}), tmp_path))
    assert found["nodes answer"].todo == ("c: no answer within 60 s",)
    assert found["versions"].verdict == "ok"


def test_a_clock_that_is_wrong_is_named_with_by_how_much(tmp_path):
    late = {"b": lambda q, a: {"time": a["time"] - 90} if q["ask"] == "clock" else a}
    row = rows(look(Mute(tmp_path, change=late), tmp_path))["clocks"]
    assert row.verdict == "bad" and len(row.todo) == 1
    assert row.todo[0].startswith("b: its clock is 90.0 s behind")


def test_a_node_that_writes_elsewhere_does_not_share_the_folder(tmp_path):
    """As a copy of the folder in a container would: it reads what was there, and what it writes stays in it."""

    def overlay(question, told):
        if question["ask"] == "shared":
            (Path(question["folder"]) / told["wrote"]).unlink()
            told["kind"] = "overlay"
        return told

    import mikoshi.launch.doctor.doctor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mikoshi.launch.doctor.doctor, "_NFS_TIMEOUT", 0.2)
        row = rows(look(Mute(tmp_path, change={"c": overlay}), tmp_path))["shared folder"]
    assert row.verdict == "bad" and len(row.todo) == 1
    assert "c:" in row.todo[0] and "(overlay): what it writes there is not seen here" in row.todo[0]


def test_a_work_folder_that_is_not_there_is_told(tmp_path):
    report = look(Mute(tmp_path, names=("a",)), tmp_path / "absent")
    assert "No such file or directory" in rows(report)["shared folder"].todo[0]
    assert rows(report)["disks"].verdict == "bad"


def test_gpus_that_are_missing_odd_or_unseen_by_torch_are_named(tmp_path):
    change = {"a": with_gpus(gpu(0), gpu(1)), "b": with_gpus(gpu(0)), "c": with_gpus(gpu(0), gpu(1), torch=0)}
    cluster = LocalCluster(kind="local", gpus_per_node=2, network={"interface": "lo"})
    row = rows(look(Mute(tmp_path, change=change), tmp_path, cluster))["GPUs"]
    assert row.verdict == "bad" and row.found == "2 x H100 80 GiB"
    assert "b: gpus_per_node = 2, and the driver has 1, torch sees 1" in row.todo[0]
    assert "c: gpus_per_node = 2, and the driver has 2, torch sees 0" in row.todo[1]
    assert row.todo[2].startswith("b: GPUs 1 x H100 80 GiB, 2 of 3 have 2 x H100")


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ({"ecc": 3}, "bad", "b GPU 1: 3 uncorrected memory errors"),
        ({"celsius": 91}, "bad", "b GPU 1: 91 C"),
        ({"pids": [77]}, "bad", "b GPU 1: in use by process 77"),
        ({"used_mib": 40000}, "note", "b GPU 1: 40000 MiB in use"),
        ({"ecc": None, "celsius": None}, "ok", ""),
    ],
)
def test_a_gpu_that_is_not_well_is_named(fault, kind, said):
    facts = {"a": {"gpus": [gpu(0), gpu(1)]}, "b": {"gpus": [gpu(0), gpu(1, **fault)]}}
    row = checks.check_health(facts)
    assert row.verdict == kind and len(row.todo) == bool(said)
    assert not said or row.todo[0].startswith(said)


def test_limits_disks_and_infiniband_say_what_to_do():
    facts = {
        "a": {
            "cores": 8, "memory": 64 << 30, "limits": {"nofile": 1024, "memlock": 65536},
            "disk": {"workdir": 1 << 40, "tmp": 1 << 40, "shm": 64 << 20},
            "network": {"interface": "ib0", "mbit": 0, "infiniband": {"mlx5_0/1": "ACTIVE 400", "mlx5_1/1": "DOWN 10"}},
        }
    }  # fmt: skip
    machine = checks.check_machine(facts)
    assert "1024 open files" in machine.todo[0] and "64 KiB of locked memory" in machine.todo[1]
    assert checks.check_disks(facts, "/w").todo == (
        "a: /dev/shm: 0.1 GiB free, 1 wanted; in a container, give it more (shared_memory, --shm-size)",
    )
    assert checks.check_network(facts).todo[0].startswith("a: InfiniBand mlx5_1/1 is DOWN 10")


def speeds(nodes, slow=(), cut=()):
    pairs = [(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :]]
    return {p: {"bus_gb_s": 1.0 if set(p) & set(slow) or p in cut else 10.0, "latency_us": 20.0, "ranks": 2} for p in pairs}


@pytest.mark.parametrize("count", [3, 4, 8])
def test_the_slow_node_is_named_and_only_it(count):
    nodes = [f"n{i}" for i in range(count)]
    row = checks.check_pairs(speeds(nodes, slow=("n1",)), nodes)
    assert len(row.todo) == 1 and row.todo[0].startswith("n1: slow: 1.00 GB/s to the others, which have 10.00")


def test_one_slow_link_makes_neither_of_its_ends_slow_and_two_nodes_cannot_be_told_apart():
    nodes = ["a", "b", "c", "d"]
    row = checks.check_pairs(speeds(nodes, cut=(("a", "c"),)), nodes)
    assert row.verdict == "ok" and "slowest: 1.00 GB/s, a and c" in row.found
    assert checks.check_pairs(speeds(["a", "b"], slow=("a",)), ["a", "b"]).verdict == "ok"


@pytest.mark.parametrize("count", range(9))
def test_everyone_meets_everyone_once_in_as_few_rounds_as_can_be(count):
    rounds = round_robin(count)
    met = [pair for pairing in rounds for pair in pairing]
    assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all(len({one for pair in pairing for one in pair}) == 2 * len(pairing) for pairing in rounds)
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)


@pytest.mark.parametrize(("count", "most"), [(256, 64), (257, 64), (1024, 64), (9, 3), (8, 64)])
def test_of_many_nodes_a_sample_of_the_pairs_is_measured_and_said(count, most):
    rounds = round_robin(count, most)
    met = [pair for pairing in rounds for pair in pairing]
    assert len(rounds) == min(most, count - 1 + count % 2)
    assert len(set(met)) == len(met) == len(rounds) * (count // 2)
    assert all(len({one for pair in pairing for one in pair}) == 2 * len(pairing) for pairing in rounds)
    nodes = [f"n{i}" for i in range(count)]
    pairs = {(nodes[a], nodes[b]): {"bus_gb_s": 1.0 if 7 in (a, b) else 10.0, "latency_us": 9.0} for a, b in met}
    row = checks.check_pairs(pairs, nodes)
    assert (f"a sample: {len(met)} of {count * (count - 1) // 2} pairs" in row.found) == (most < count - 1)
    assert len(row.todo) == 1 and row.todo[0].startswith("n7: slow: 1.00 GB/s to the others, which have 10.00")


def test_slow_nodes_are_those_of_the_definition():
    by_chance = random.Random(1)
    for count in (2, 3, 4, 5, 9, 12) * 10:
        nodes = [f"n{i}" for i in range(count)]
        pairs = {
            (a, b): by_chance.choice((1.0, 2.0, 3.0)) for a, b in itertools.combinations(nodes, 2) if by_chance.random() < 0.9
        }
        wanted = {}
        for node in nodes:
            own = [speed for pair, speed in pairs.items() if node in pair]
            others = [speed for pair, speed in pairs.items() if node not in pair]
            if own and others and median_high(own) < checks.SLOW * median_high(others):
                wanted[node] = (median_high(own), median_high(others))
        assert checks.slow_nodes(pairs, nodes) == wanted


def test_to_find_slow_nodes_every_pair_is_looked_at_a_few_times_alone():
    class Counted(float):
        looks = 0

        def __lt__(self, other):
            Counted.looks += 1
            return float(self) < float(other)

    nodes = [f"n{i}" for i in range(64)]
    pairs = {pair: Counted(random.Random(str(pair)).random()) for pair in itertools.combinations(nodes, 2)}
    checks.slow_nodes(pairs, nodes)
    assert Counted.looks < 20 * len(pairs), "sorted once, not for each node"


def test_tensor_parallelism_across_nodes_is_a_note(tmp_path):
    degrees = SimpleNamespace(tp=4, cp=1, ep=1, expert_tp=None)
    row = rows(look(Mute(tmp_path), tmp_path, degrees=degrees))["order of ranks"]
    assert row.verdict == "note" and "parallel.tp = 4" in row.todo[0]


def test_the_table_tells_all_and_takes_nothing_for_markup(tmp_path):
    report = look(Mute(tmp_path, names=("a",), missing={"b": "[bold]denied[/bold]"}), tmp_path)
    console = Console(width=100, record=True, file=io.StringIO())
    show_report(console, report)
    text = console.export_text()
    assert "[bold]denied[/bold]" in text and "not fit: nodes up" in text
    assert f"GLOO_SOCKET_IFNAME={select_interface('lo')[0]}" in text
    assert all(check.name in text for check in report.checks)


def test_an_answer_is_left_only_where_one_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(answers.VARIABLE, raising=False)
    answers.write_answer({"x": 1})
    path = tmp_path / "answer"
    monkeypatch.setenv(answers.VARIABLE, str(path))
    answers.write_answer({"x": 2})
    assert answers.read_answer(path) == {"x": 2}
    path.write_text("[1")
    assert answers.read_answer(path) == {} == answers.read_answer(tmp_path / "absent")
