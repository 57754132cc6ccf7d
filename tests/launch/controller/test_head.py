"""A run over several nodes: killed ranks, lost nodes, hangs, stops. The nodes are agents on this machine, the rest is real."""

import contextlib
import json
import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest

import severalnodes
from mikoshi.data.errors import DataError, StorageError
from mikoshi.launch.agent import node
from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.chaos.run import same_weights
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.controller import head as leading
from mikoshi.launch.controller.agent_pool import AgentPool
from mikoshi.launch.controller.tee import tee
from mikoshi.launch.runs.record import open_submitted
from mikoshi.trainer.errors import OutageError
from mikoshi.trainer.exit_codes import DONE, FAULT, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.train import preflight
from runs import run_config

QUICK = {"lost": 2.0, "start": 60.0}
TRAIN = {"steps": 60, "global_batch": 4, "context": 32}


@pytest.fixture
def lead(dataset, tmp_path):
    """Start a run over so many nodes; whatever is left of it at the end is ended."""
    started = []

    def begin(nodes=2, name="run", min_nodes=None, ranks=1, spare=0, steps=60, **sections):
        sections = {"checkpoint": {"every": 10}, "train": {**TRAIN, "steps": steps}, **sections}
        sections["run"] = {"name": name, "folder": "runs"}
        run = severalnodes.submitted(dataset, tmp_path, nodes, min_nodes, ranks, QUICK, **sections)
        names = [f"n{number}" for number in range(nodes + spare)]
        started.append(severalnodes.start(run, names))
        return run, started[-1]

    begin.again = lambda run, names: started.append(severalnodes.start(run, names)) or started[-1]
    yield begin
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(one.pid).children(recursive=True)
            one.kill()
            psutil.wait_procs(family, 10)
        one.wait()


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def steps(run):
    return max((record["step"] for record in read_jsonl(run.folder.metrics)), default=0)


def events(run, kind):
    return [event for event in read_jsonl(run.folder.events) if event["event"] == kind]


def ranks_of(head):
    """The ranks of all nodes, by their number."""
    names = {child.pid: child.name() for child in psutil.Process(head.pid).children(recursive=True)}
    return {int(name.removeprefix("mikoshi-rank")): pid for pid, name in names.items() if name.startswith("mikoshi-rank")}


def same_end(one, other, folder):
    with contextlib.chdir(folder):
        return same_weights(one.spec.config, other.spec.config)


@pytest.mark.slow
def test_three_nodes_end_like_one_node_with_three_ranks(lead, tmp_path):
    spread, head = lead(3, "spread", steps=20)
    assert head.wait(120) == DONE
    one, head = lead(1, "one", ranks=3, steps=20)
    assert head.wait(120) == DONE
    assert same_end(spread, one, tmp_path)
    attempt = spread.attempts[0]
    assert attempt.result.state == "done"
    assert attempt.started.nodes == ["n0", "n1", "n2"]
    assert all(attempt.rank_log(rank).exists() for rank in range(3))
    assert "step" in attempt.rank_log(0).read_text()
    assert not events(spread, "fault")


@pytest.mark.slow
def test_a_node_that_dies_is_done_without_and_taken_back_when_it_answers(lead):
    run, head = lead(2, min_nodes=1, steps=10**5)
    until(lambda: events(run, "save"))
    severalnodes.down(run, "n1")
    struck = time.time()
    severalnodes.agents(head)["n1"].kill()
    (fault,) = until(lambda: events(run, "fault"))
    assert (fault["cause"], fault["rank"], fault["node"]) == ("node", 1, "n1")
    assert fault["time"] - struck < 3
    fewer = until(lambda: events(run, "nodes")[1:])[0]
    assert (fewer["nodes"], fewer["lost"]) == (["n0"], ["n1"])
    at = steps(run)
    until(lambda: steps(run) > at + 5)
    (run.folder.path / "down-n1").unlink()
    assert until(lambda: events(run, "nodes")[2:])[0]["nodes"] == ["n0", "n1"]
    until(lambda: len(events(run, "start")) == 3)
    head.terminate()
    assert head.wait(60) == PREEMPTED
    assert [event["cause"] for event in events(run, "fault")] == ["node"], "coming back is no fault"
    assert [event["ranks"] for event in events(run, "start")] == [2, 1, 2]


@pytest.mark.slow
def test_a_node_that_is_needed_is_waited_for_and_a_stop_ends_the_wait(lead):
    run, head = lead(2)
    until(lambda: steps(run) > 5)
    severalnodes.down(run, "n1")
    severalnodes.agents(head)["n1"].kill()
    until(lambda: "no route to this host" in run.attempts[0].node_log("n1").read_text())
    os.kill(head.pid, signal.SIGTERM)
    assert head.wait(60) == PREEMPTED
    result = run.attempts[0].result
    assert (result.state, result.bad_nodes) == ("stopped", ["n1"])


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_in_another_attempt_with_the_weights_of_one_that_was_not(lead, tmp_path):
    quiet, head = lead(2, "quiet", steps=40)
    assert head.wait(120) == DONE
    run, head = lead(2, "stopped", steps=40)
    until(lambda: steps(run) > 10)
    os.kill(head.pid, signal.SIGUSR2)
    assert head.wait(60) == PREEMPTED
    assert run.attempts[0].result.state == "stopped"
    again = lead.again(run, ["n0", "n1"])
    assert again.wait(120) == DONE
    _, second = run.attempts
    assert (second.request.cause, second.result.state) == ("requeue", "done")
    assert same_end(quiet, run, tmp_path)


@pytest.mark.slow
def test_what_a_scheduler_tells_one_node_all_of_them_heed(lead):
    run, head = lead(2, steps=10**5)
    until(lambda: steps(run) > 5)
    severalnodes.agents(head)["n1"].send_signal(signal.SIGTERM)
    assert head.wait(60) == PREEMPTED
    (save,) = [event for event in events(run, "save") if event["step"] == steps(run)]
    assert run.attempts[0].result.state == "stopped"
    assert save


@pytest.mark.slow
def test_nothing_outlives_a_head_that_is_killed(lead):
    run, head = lead(2, steps=10**5)
    until(lambda: steps(run) > 5)
    family = psutil.Process(head.pid).children(recursive=True)
    assert len([child for child in family if child.name().startswith("mikoshi-rank")]) == 2
    head.kill()
    head.wait()
    _, alive = psutil.wait_procs(family, 5)
    assert not alive


@pytest.mark.slow
def test_a_stopped_rank_is_found_among_all_nodes_ranks_and_its_stack_kept(lead):
    run, head = lead(2, ranks=2, steps=200, recovery={"silence": 4.0})
    until(lambda: steps(run) > 10)
    os.kill(ranks_of(head)[3], signal.SIGSTOP)
    (fault,) = until(lambda: events(run, "fault"))
    assert (fault["cause"], fault["rank"], fault["node"]) == ("hang", 3, "n1")
    assert head.wait(120) == DONE
    assert sorted(path.name for path in run.folder.stacks.iterdir()) == [f"attempt-0-rank-{rank}.txt" for rank in range(4)]


@pytest.mark.slow
def test_a_node_whose_ranks_die_again_and_again_is_replaced_by_a_spare(lead):
    run, head = lead(2, steps=10**5, spare=1, checkpoint={"every": 0})
    for number in range(2):
        until(lambda n=number: len(events(run, "restart")) == n and steps(run) > 5)
        os.kill(until(lambda: ranks_of(head).get(1)), signal.SIGKILL)
        until(lambda n=number: len(events(run, "fault")) == n + 1)
    (avoided,) = until(lambda: events(run, "avoid"))
    assert avoided["node"] == "n1"
    assert until(lambda: events(run, "nodes")[1:])[0]["nodes"] == ["n0", "n2"]
    before = steps(run)
    until(lambda: steps(run) != before)
    os.kill(head.pid, signal.SIGTERM)
    assert head.wait(60) == PREEMPTED
    assert run.attempts[0].result.bad_nodes == ["n1"]


@pytest.mark.slow
def test_a_config_that_cannot_run_is_refused_in_a_line_and_no_rank_starts(lead):
    run, head = lead(2, data={"path": "nowhere"})
    assert head.wait(60) == USER_ERROR
    result = run.attempts[0].result
    assert result.state == "refused"
    assert "nowhere" in result.why
    assert not run.attempts[0].rank_log(0).exists()


@pytest.mark.slow
def test_a_run_whose_folder_is_removed_ends(lead):
    run, head = lead(1, steps=10**5)
    until(lambda: steps(run) > 5)
    family = psutil.Process(head.pid).children(recursive=True)
    (run.folder.path / "spec.json").unlink()
    assert head.wait(60) != DONE
    _, alive = psutil.wait_procs(family, 5)
    assert not alive


def test_nodes_that_never_come_up_are_named(dataset, tmp_path):
    run = severalnodes.submitted(dataset, tmp_path, 2, patience={"start": 5.0}, run={"name": "run", "folder": "runs"})
    severalnodes.down(run, "n1")
    head = severalnodes.start(run, ["n0", "n1"])
    assert head.wait(60) == FAULT, "nobody's mistake: elsewhere it may work"
    attempt = open_submitted(run.folder.path).attempts[0]
    assert attempt.result.why.startswith("1 of 2 nodes are up after 5 s (n1: its agent ended: no route to this host)")
    assert (attempt.result.state, attempt.result.bad_nodes, attempt.nodes_to_avoid) == ("failed", ["n1"], ["n1"])


def test_where_no_node_can_do_what_the_cluster_file_says_it_is_a_mistake(dataset, tmp_path):
    run = severalnodes.submitted(dataset, tmp_path, 1, patience={"start": 1.0}, run={"name": "run", "folder": "runs"})
    severalnodes.down(run, "n0")
    assert severalnodes.start(run, ["n0"]).wait(60) == USER_ERROR
    result = open_submitted(run.folder.path).attempts[0].result
    assert (result.state, result.bad_nodes) == ("refused", [])


def test_storage_that_does_not_answer_is_asked_again(monkeypatch, tmp_path):
    asked, config = [], run_config(tmp_path / "data", tmp_path, recovery={"restarts": 3, "backoff": 0.0})
    spec = SimpleNamespace(config=config, cluster=SimpleNamespace(ranks=1))
    pool = SimpleNamespace(requests=StopRequests(1.0))
    lead = SimpleNamespace(run=SimpleNamespace(spec=spec), request=SimpleNamespace(nodes=1), pool=pool, idle=lambda: None)

    def foresee(*_):
        asked.append(1)
        if len(asked) < answers:
            raise StorageError("s3://b: 503")

    monkeypatch.setattr(preflight, "foresee", foresee)
    answers = 4
    leading._preflight(lead)
    assert len(asked) == 4
    answers = 100
    with pytest.raises(OutageError, match="503"):
        leading._preflight(lead)
    assert len(asked) == 8, "as often as ranks are started again"
    pool.requests.add(signal.SIGTERM)
    leading._preflight(lead)
    assert len(asked) == 9, "and not at all by one that is to stop"


def test_every_agent_is_told_what_it_must_see(dataset, tmp_path):
    run = severalnodes.submitted(dataset, tmp_path, 1, run={"name": "run", "folder": "runs"})
    said = tmp_path / "said"
    site = SimpleNamespace(nodes=lambda: ["n0"], command=lambda _: ["sh", "-c", f"head -n 1 > {said}"])
    witness = leading._witness(run)
    pool = AgentPool(
        site, run.spec.cluster, run.spec.config.recovery, StopRequests(1.0), tmp_path.joinpath, tmp_path, {}, witness
    )
    try:
        pool.start_agents()
        until(lambda: said.exists() and said.read_text())
    finally:
        pool.close()
    assert json.loads(said.read_text())["witness"] == str(run.folder.path / "spec.json")
    pods = KubernetesCluster(kind="kubernetes", image="m:1")
    assert leading._witness(SimpleNamespace(spec=SimpleNamespace(cluster=pods), folder=run.folder)) is None


def test_a_mistake_is_one_only_before_ranks_have_ever_started(tmp_path):
    folder = RunFolder(tmp_path)
    run = SimpleNamespace(spec=SimpleNamespace(cluster=SimpleNamespace(kind="slurm")), folder=folder)
    pool = SimpleNamespace(up=["n1"], down={"n2": "no route"}, names=["n1", "n2"])

    def given_up(error, cause="resume"):
        lead = leading.HeadState(run, None, pool, SimpleNamespace(cause=cause))
        return lead.code_for(error), lead.bad

    assert given_up(DataError("no data"), "submit") == given_up(DataError("no data")) == (USER_ERROR, [])
    assert given_up(OutageError("1 of 2 nodes are up"), "submit") == (FAULT, ["n2"])
    folder.event("nodes", nodes=["n1", "n2"])
    assert given_up(DataError("no data")) == (FAULT, ["n1"]), "this node lacks what others may have"


def test_what_a_pod_prints_is_what_its_logs_say(tmp_path, capfd):
    first, second = tmp_path / "head.log", tmp_path / "rank-0.log"
    first.write_text("of another attempt\n")
    with tee([first, second]):
        with first.open("a") as file:
            file.write("n1 is lost\nand")
        time.sleep(1.2)
        assert capfd.readouterr().out == "n1 is lost\n"
        second.write_text("step 1\n")
    assert capfd.readouterr().out == "andstep 1\n"


def test_a_node_that_does_not_see_the_runs_folder_ends(monkeypatch, tmp_path, capfd):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(node, "_WITNESS_TIMEOUT", 0.1)
    monkeypatch.setattr(node.os, "_exit", end)
    node._wait_for_witness("")
    node._wait_for_witness(str(tmp_path))
    with pytest.raises(SystemExit):
        node._wait_for_witness(str(tmp_path / "spec.json"))
    assert "spec.json is not there: its folder is not shared with this node" in capfd.readouterr().err


@pytest.mark.slow
def test_an_attempt_that_another_follows_ends(lead):
    run, head = lead(1, steps=10**5)
    until(lambda: steps(run) > 5)
    family = psutil.Process(head.pid).children(recursive=True)
    run.add(run.attempts[-1].request)
    assert head.wait(60) != DONE
    assert "another attempt: this one is ended" in run.attempts[0].head_log.read_text()
    _, alive = psutil.wait_procs(family, 5)
    assert not alive
