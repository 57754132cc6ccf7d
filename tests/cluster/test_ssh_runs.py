"""Runs over real hosts by ssh: they end with the weights of a run that nothing disturbed, over lost hosts, links and heads."""

import contextlib
import signal
import sys
import time

import psutil
import pytest

from clusterrun import SLOW, ended, events, step_of, until, words
from hosts import cut, lan, mend, on, power_off, power_on, why_not
from mikoshi.launch.chaos.run import same_weights
from mikoshi.launch.config.cluster import LocalCluster, SshCluster
from mikoshi.launch.runs.record import Request, create_run, new_spec
from runs import run_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")]

SUBMIT = """
import sys
from pathlib import Path
from mikoshi.launch.backends.open import open_backend
from mikoshi.launch.runs.record import open_submitted
run = open_submitted(Path(sys.argv[1]))
attempt, backend = run.attempts[-1], open_backend(run.spec.cluster)
backend.check(run, attempt.request)
attempt.write_job(backend.submit(run, attempt))
"""
ASK = """
import sys
from pathlib import Path
from mikoshi.launch.backends.open import open_backend
from mikoshi.launch.runs.record import open_submitted
run = open_submitted(Path(sys.argv[1]))
attempt, backend = run.attempts[-1], open_backend(run.spec.cluster)
if sys.argv[2] == "look":
    print(backend.query([attempt.job])[0].state)
else:
    backend.cancel(attempt, now=sys.argv[2] == "now")
"""
NODES = ["n1", "n2", "n3"]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Three hosts that train, and the one that they are reached from."""
    with lan(tmp_path_factory.mktemp("lan"), ["login", *NODES]) as made:
        yield made


@pytest.fixture
def submit(net, dataset, tmp_path):
    """Submit a run from the host `login`; every host is empty again at the end."""
    runs = []

    def begin(nodes, name="run", min_nodes=None, steps=20, cluster=None, **sections):
        sections.setdefault("engine", {"device": "cpu"})
        config = run_config(dataset, tmp_path / "runs", run={"name": name}, train={"steps": steps}, **sections)
        there = {"hosts": NODES, "identity": str(net.identity), "known_hosts": str(net.known_hosts), "connect_timeout": 3}
        patience = {"lost": 2.0, "rejoin": 0.0}
        made = cluster or SshCluster.model_validate({"kind": "ssh", **there, "patience": patience})
        run = create_run(new_spec(config, made, tmp_path))
        runs.append(run)
        go(run, nodes, min_nodes)
        return run

    def go(run, nodes, min_nodes=None, **fields):
        run.add(Request(nodes=nodes, min_nodes=min_nodes or nodes, time=time.time(), **fields))
        done = net["login"].run(sys.executable, "-P", "-c", SUBMIT, run.folder.path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    begin.again = go
    yield begin
    for run in runs:
        ask(net, run, "now")
    for name, host in net.hosts.items():
        until(lambda host=host: not left(host), f"{name} is empty: {left(host)}", 20)


def ask(net, run, what):
    """`look`, `cancel` or `now`, where the run was submitted."""
    done = net["login"].run(sys.executable, "-P", "-c", ASK, run.folder.path, what)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def left(host):
    """What runs on a host, sshd's own aside."""
    found = []
    for process in on(host):
        with contextlib.suppress(psutil.Error):
            if process.name() != "sshd":
                found.append(" ".join(process.cmdline())[:200])
    return found


def quiet(submit, nodes, **options):
    """The same on one machine, with as many ranks, by the same head."""
    run = submit(1, name="quiet", cluster=LocalCluster(kind="local", ranks_per_node=nodes), **options)
    assert ended(run).state == "done", words(run)
    return run


def training(run, step):
    until(lambda: step_of(run) >= step, f"step {step}", 90, run)


@pytest.mark.parametrize("nodes", [2, 3])
def test_hosts_train_to_the_very_weights_of_one_machine(submit, net, nodes):
    run = submit(nodes)
    result = ended(run)
    assert (result.state, result.code) == ("done", 0), words(run)
    used = events(run, "nodes")[-1]["nodes"]
    assert len(used) == nodes and used == [name for name in NODES if name in used], "those that came up first, in their order"
    until(lambda: ask(net, run, "look") == "ended", "its head ends, having left the result", 20, run)
    assert same_weights(run.spec.config, quiet(submit, nodes).spec.config)


def test_a_host_that_loses_its_power_is_done_without(submit, net):
    run = submit(3, min_nodes=2, steps=150, model=SLOW, checkpoint={"every": 10})
    training(run, 25)
    power_off(net, "n2")
    try:
        gone = time.monotonic()
        until(lambda: events(run, "nodes")[-1]["nodes"] == ["n1", "n3"], "it goes on with two", 30, run)
        print(f"power lost: the run goes on without the host after {time.monotonic() - gone:.1f} s")
        result = ended(run)
        assert result.state == "done" and "n2" in result.bad_nodes, words(run)
    finally:
        power_on(net, "n2")


def test_behind_a_link_that_is_cut_no_rank_is_left_and_once_it_is_mended_the_host_is_taken_back(submit, net):
    run = submit(3, min_nodes=2, steps=2000, model=SLOW, checkpoint={"every": 10})
    training(run, 15)
    cut(net, "n2")
    try:
        until(lambda: "n2" not in events(run, "nodes")[-1]["nodes"], "n2 is given up", 30, run)
        until(lambda: not left(net["n2"]), "n2 has ended its ranks by itself", 30, run)
        at = step_of(run)
        training(run, at + 3)
    finally:
        mend(net, "n2")
    until(lambda: events(run, "nodes")[-1]["nodes"] == NODES, "n2 is taken back", 60, run)
    ask(net, run, "cancel")
    assert ended(run).code == 75, words(run)


@pytest.mark.parametrize("how", ["kill -9", "power"])
def test_no_remote_process_outlives_the_local_end(submit, net, how):
    run = submit(2, steps=2000, model=SLOW)
    training(run, 3)
    assert all(left(net[name]) for name in events(run, "nodes")[-1]["nodes"])
    began = time.monotonic()
    if how == "power":
        power_off(net, "login")
    else:
        head = next(process for process in on(net["login"]) if "mikoshi.launch.controller.head" in process.cmdline())
        head.send_signal(signal.SIGKILL)
    try:
        for name in NODES:
            until(lambda name=name: not left(net[name]), f"{name} is empty", 15, run)
        print(f"{how} of the local end: the hosts are empty after {time.monotonic() - began:.1f} s")
    finally:
        if how == "power":
            power_on(net, "login")
    assert ask(net, run, "look") == "ended"


def test_a_cancelled_run_goes_on_elsewhere_with_the_weights_of_one_that_was_not(submit, net):
    run = submit(2, steps=40, model=SLOW)
    training(run, 5)
    ask(net, run, "cancel")
    result = ended(run)
    assert result.code == 75, words(run)
    submit.again(run, 2, exclude=["n1"], cause="resume")
    assert ended(run).state == "done", words(run)
    assert run.attempts[-1].started.nodes == ["n2", "n3"]
    assert same_weights(run.spec.config, quiet(submit, 2, steps=40, model=SLOW).spec.config)


def test_ended_at_once_nothing_of_it_is_left_anywhere(submit, net):
    run = submit(2, steps=2000, model=SLOW)
    training(run, 2)
    ask(net, run, "now")
    assert not [line for line in left(net["login"]) if "launch" in line]
    for name in NODES:
        until(lambda name=name: not left(net[name]), f"{name} is empty", 10, run)
