"""On a real Slurm: runs are queued, watched, cancelled, resumed on fewer nodes, and come through time limits, preemption and
lost nodes with the weights of a run that nothing disturbed."""

import json
import signal
import subprocess
import sys

import pytest

import clusterrun
import slurmcluster
from clusterrun import SLOW, digests, ended, events, mikoshi, opened, step_of, until, write_cluster, write_run
from mikoshi.launch.backends.slurm.slurm import SlurmBackend
from mikoshi.launch.config.cluster import load_cluster
from mikoshi.launch.runs.record import Request, create_run, new_spec
from mikoshi.parallel.process.nodelist import expand_nodelist
from mikoshi.trainer.errors import LaunchError
from runs import run_config

pytestmark = pytest.mark.skipif(bool(slurmcluster.missing()), reason=slurmcluster.missing() or "none")

PATIENCE = {"lost": 3.0, "start": 60.0}

STAND_IN = """
from mikoshi.launch.runs.record import Result, open_submitted
from mikoshi.launch.backends.slurm.site import SlurmSite

task = os.environ["SLURM_ARRAY_TASK_ID"]
run = open_submitted(Path(sys.argv[2]))
attempt = run.attempts[-1]
if task == "1" and "SLURM_RESTART_COUNT" not in os.environ:
    site = SlurmSite(run.spec.cluster, run, attempt)
    site.after(run, attempt, Result(state="failed", code=1, why="a node", time=1.0, bad_nodes=["n3"]))
time.sleep(600)
"""
"""In the place of controller.head: the second task of an array asks to be queued again, as for a node that is bad."""


def place(folder, dataset, name="run", cluster=None, **sections):
    """A run and a cluster, written; what `submit` is given."""
    fields = {"gpus_per_node": 0, "patience": PATIENCE, "time": "5", **(cluster or {})}
    made = write_cluster(folder, kind="slurm", **fields)
    return write_run(folder, dataset, name, **sections), "--on", made


def submit(folder, arguments, *more):
    done = mikoshi(folder, "submit", *arguments, *more)
    assert done.returncode == 0, done.stderr
    return done


def jobs(slurm):
    return slurm.call("squeue", "-h", "-o", "%i %T").split()


@pytest.mark.slow
def test_a_run_is_submitted_watched_and_read(slurm, dataset, tmp_path):
    submit(tmp_path, place(tmp_path, dataset, cluster={"env": {"HELLO": "a b"}, "gpus_per_node": 1}), "--nodes", 2)
    run = opened(tmp_path)
    result = ended(run)
    assert (result.state, result.code) == ("done", 0), clusterrun.words(run)
    attempt = run.attempts[-1]
    assert "gpu:1" in slurm.job(attempt.job["id"])["TresPerNode"]
    assert attempt.started.nodes == ["n1", "n2"] and attempt.started.host == "n1"
    assert {path.name for path in attempt.path.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    said = mikoshi(tmp_path, "status", "runs/run", "--json")
    assert said.returncode == 0, said.stderr
    logs = mikoshi(tmp_path, "logs", "runs/run")
    assert logs.returncode == 0 and "10" in logs.stdout
    # What the scheduler keeps of it: neither variables nor lines of the user's.
    kept = [file.read_bytes() for file in (slurm.folder / "state").rglob("*") if file.is_file()]
    assert kept and not any(b"HELLO" in content for content in kept)


@pytest.mark.slow
def test_a_run_that_is_cancelled_saves_and_goes_on_with_fewer_nodes(slurm, dataset, tmp_path):
    arguments = place(tmp_path, dataset, steps=40, model=SLOW, train={"global_batch": 12})
    submit(tmp_path, arguments, "--nodes", 3)
    run = opened(tmp_path)
    until(lambda: step_of(run) >= 3, "step 3", 60, run)
    assert mikoshi(tmp_path, "cancel", "runs/run").returncode == 0
    result = ended(run)
    assert result.state == "cancelled" and events(run, "save"), clusterrun.words(run)
    until(lambda: not jobs(slurm), "no job is left", 30, run)
    saved = events(run, "save")[-1]["step"]
    done = mikoshi(tmp_path, "resume", "runs/run", "--nodes", 2)
    assert done.returncode == 0, done.stderr
    assert ended(run, 2).state == "done", clusterrun.words(run)
    assert len(run.attempts[-1].started.nodes) == 2
    records = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == sorted(set(steps)) and steps[-1] == 40 and saved < 40


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit_chains_itself_to_the_end(slurm, dataset, tmp_path):
    """It stands still until Slurm's warning comes, however fast the machine is."""
    sections = dict(steps=40, model=SLOW, train={"global_batch": 12}, recovery={"silence": 600.0})
    # Slurm warns up to a minute early: ranks start within a minute, or in a later job.
    submit(tmp_path, place(tmp_path, dataset, cluster={"time": "3", "warning": 60}, **sections), "--nodes", 2)
    run = opened(tmp_path)
    until(lambda: step_of(run) >= 3, "step 3", 300, run)
    attempt = run.attempts[-1]
    slurm.kill_rank("n2", signal.SIGSTOP)
    until(lambda: attempt.status.phase == "stopping", "the warning", 150, run)
    slurm.kill_rank("n2", signal.SIGCONT)
    first = ended(run, attempt.number)
    assert (first.state, first.next) == ("stopped", "requeued"), clusterrun.words(run)
    assert events(run, "stop")[0]["asked"] == "SIGUSR2" and events(run, "save")
    until(lambda: (result := run.attempts[-1].result) and result.state == "done", "the run is done", 500, run)
    assert len({attempt.job["id"] for attempt in run.attempts}) == 1 and len(run.attempts) > 1
    assert all(attempt.request.cause == "requeue" for attempt in run.attempts[1:])
    submit(tmp_path, place(tmp_path, dataset, "quiet", **sections), "--nodes", 2)
    assert ended(opened(tmp_path, "quiet")).state == "done"
    assert digests(run) == digests(opened(tmp_path, "quiet"))


@pytest.mark.slow
def test_a_preempted_run_saves_makes_room_and_comes_back(slurm, dataset, tmp_path):
    sections = dict(steps=40, model=SLOW, train={"global_batch": 12})
    submit(tmp_path, place(tmp_path, dataset, **sections), "--nodes", 3)
    run = opened(tmp_path)
    until(lambda: step_of(run) >= 3, "step 3", 60, run)
    urgent = slurm.call(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap=sleep 1"
    ).strip()
    first = ended(run, 1)
    assert (first.state, first.next) == ("stopped", "requeued"), clusterrun.words(run)
    until(lambda: slurm.job(urgent).get("JobState") == "COMPLETED", "the urgent job is done", 60, run)
    until(lambda: (result := run.attempts[-1].result) and result.state == "done", "the run is done", 120, run)
    submit(tmp_path, place(tmp_path, dataset, "quiet", **sections), "--nodes", 3)
    assert ended(opened(tmp_path, "quiet")).state == "done"
    assert digests(run) == digests(opened(tmp_path, "quiet"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "cut"])
def test_a_node_that_is_lost_is_done_without(slurm, dataset, tmp_path, how):
    sections = dict(steps=40, model=SLOW, train={"global_batch": 12}, checkpoint={"every": 5})
    submit(tmp_path, place(tmp_path, dataset, **sections), "--nodes", 3, "--min-nodes", 2)
    run = opened(tmp_path)
    until(lambda: len(events(run, "save")) >= 1, "the first save", 60, run)
    nodes = run.attempts[-1].started.nodes
    (slurm.kill_node if how == "killed" else slurm.cut)(nodes[-1])
    assert ended(run, seconds=90).state == "done", clusterrun.words(run)
    assert len(run.attempts) == 1, "no other job"
    assert events(run, "nodes")[-1]["nodes"] == nodes[:-1]


@pytest.mark.slow
def test_a_node_whose_ranks_die_again_and_again_is_left_out_when_the_job_is_queued_again(slurm, dataset, tmp_path):
    sections = dict(steps=60, model=SLOW, train={"global_batch": 12}, recovery={"restarts": 1, "backoff": 0.0})
    submit(tmp_path, place(tmp_path, dataset, **sections), "--nodes", 2)
    run = opened(tmp_path)
    for number in range(2):
        until(lambda n=number: len(events(run, "start")) > n and step_of(run) > 0, f"start {number}", 60, run)
        slurm.kill_rank("n2")
        until(lambda n=number: len(events(run, "fault")) > n, f"fault {number}", 60, run)
    first = ended(run, 1)
    assert (first.state, first.next, first.bad_nodes) == ("failed", "requeued", ["n2"]), clusterrun.words(run)
    until(lambda: (result := run.attempts[-1].result) and result.state == "done", "the run is done", 120, run)
    assert run.attempts[-1].started.nodes == ["n1", "n3"]
    assert {attempt.job["id"] for attempt in run.attempts} == {run.attempts[0].job["id"]}
    submit(tmp_path, place(tmp_path, dataset, "quiet", **sections), "--nodes", 2)
    assert ended(opened(tmp_path, "quiet")).state == "done"
    assert digests(run) == digests(opened(tmp_path, "quiet"))


@pytest.mark.soak
def test_the_loss_of_the_heads_own_node_is_another_attempt(slurm, dataset, tmp_path):
    sections = dict(steps=40, model=SLOW, train={"global_batch": 12}, checkpoint={"every": 5})
    submit(tmp_path, place(tmp_path, dataset, **sections), "--nodes", 2)
    run = opened(tmp_path)
    until(lambda: len(events(run, "save")) >= 1, "the first save", 60, run)
    slurm.kill_node(run.attempts[-1].started.nodes[0])
    until(lambda: len(run.attempts) > 1 and run.attempts[-1].started, "the job is queued again", 90, run)
    assert ended(run).state == "done", clusterrun.words(run)
    submit(tmp_path, place(tmp_path, dataset, "quiet", **sections), "--nodes", 2)
    assert ended(opened(tmp_path, "quiet")).state == "done"
    assert digests(run) == digests(opened(tmp_path, "quiet"))


@pytest.mark.slow
def test_the_loss_of_the_heads_own_node_does_not_leave_nodes_without_a_leader(slurm, dataset, tmp_path):
    # Slurm keeps this job, which may go on with fewer nodes, also without the node that leads it.
    sections = dict(steps=40, model=SLOW, train={"global_batch": 12}, checkpoint={"every": 5})
    submit(tmp_path, place(tmp_path, dataset, **sections), "--nodes", 3, "--min-nodes", 2)
    run = opened(tmp_path)
    until(lambda: len(events(run, "save")) >= 1, "the first save", 60, run)
    nodes = run.attempts[-1].started.nodes
    slurm.power_off(nodes[0])
    until(lambda: len(run.attempts) > 1 and run.attempts[-1].started, "the job is queued again", 180, run)
    assert ended(run).state == "done", clusterrun.words(run)
    assert run.attempts[-1].started.nodes == nodes[1:]
    assert {attempt.job["id"] for attempt in run.attempts} == {run.attempts[0].job["id"]}


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_sweep_runs_as_one_array(dataset, tmp_path):
    submit(tmp_path, place(tmp_path, dataset, steps=3), "--nodes", 1, "--sweep", "optim.lr=1e-3,2e-3")
    folders = sorted(folder for folder in (tmp_path / "runs").iterdir() if not folder.name.startswith("."))
    assert len(folders) == 2
    runs = [clusterrun.open_submitted(folder) for folder in folders]
    assert [ended(run).state for run in runs] == ["done", "done"], clusterrun.words(runs[0])
    assert sorted(run.attempts[0].job["id"].partition("_")[2] for run in runs) == ["0", "1"]


@pytest.mark.slow
def test_a_task_of_an_array_that_queues_itself_again_leaves_the_others_alone(slurm, dataset, tmp_path):
    made = load_cluster(str(write_cluster(tmp_path, kind="slurm")))
    run = create_run(new_spec(run_config(dataset, tmp_path / "runs", run={"name": "run"}), made, tmp_path))
    run.add(Request(nodes=1, min_nodes=1, time=1.0))
    script = "import os, sys, time; from pathlib import Path; exec(Path(sys.argv[1]).read_text())"
    work = tmp_path / "site.py"
    work.write_text(STAND_IN)
    argv = [
        "--export=NIL",
        "--requeue",
        "-N1",
        "-n1",
        "--mem=100",
        "--array=0-1",
        f"--output={tmp_path}/%a.out",
        f"--chdir={tmp_path}",
    ]
    lines = f"#!/bin/bash\nexec {sys.executable} -P -c '{script}' {work} {run.folder.path}\n"
    (tmp_path / "batch.sh").write_text(lines)
    (tmp_path / "batch.sh").chmod(0o755)
    job = slurm.call("sbatch", "--parsable", *argv, str(tmp_path / "batch.sh")).strip()
    until(lambda: slurm.job(f"{job}_1").get("Restarts") == "1", "task 1 is queued again", 30)
    until(lambda: slurm.job(f"{job}_1").get("JobState") == "RUNNING", "task 1 runs again", 30)
    assert slurm.job(f"{job}_1")["ExcNodeList"] == "n3" and run.attempts[-1].result.next == "requeued"
    assert (slurm.job(f"{job}_0")["Restarts"], slurm.job(f"{job}_0")["JobState"]) == ("0", "RUNNING")
    slurm.call("scancel", job)


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_job_that_is_held_is_told_with_the_way_out(slurm, tmp_path):
    backend = SlurmBackend(load_cluster(str(write_cluster(tmp_path, kind="slurm"))))
    job = slurm.call("sbatch", "--parsable", "-o", "/dev/null", "--mem=100", "--requeue", "--wrap=sleep 100").strip()
    until(lambda: slurm.job(job).get("JobState") == "RUNNING", "it runs", 30)
    slurm.call("scontrol", "requeuehold", job)
    until(lambda: slurm.job(job).get("JobState") != "COMPLETING", "it waits", 30)
    (state,) = backend.query([{"id": job}])
    assert state.state == "queued" and state.why.endswith(f"held; let it go by `scontrol release {job}`"), state
    slurm.call("scontrol", "release", job)
    assert "release" not in backend.query([{"id": job}])[0].why


@pytest.mark.slow
def test_the_doctor_looks_at_nodes_of_a_job_of_its_own(slurm, tmp_path):
    write_cluster(tmp_path, kind="slurm", gpus_per_node=0, patience=PATIENCE)
    done = mikoshi(tmp_path, "doctor", "--on", "cluster.toml", "--nodes", 2, "--json", timeout=240)
    rows = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    ill = {name for name, row in rows.items() if row["verdict"] == "bad"}
    assert ill <= {"bandwidth"} and done.returncode == (1 if ill else 0), done.stdout + done.stderr
    assert rows["nodes up"]["found"] == "2 of 2"
    until(lambda: not jobs(slurm), "its nodes are given back", 30)


@pytest.mark.slow
def test_a_doctor_that_is_ended_gives_its_nodes_back(slurm, tmp_path):
    write_cluster(tmp_path, kind="slurm", gpus_per_node=0, patience=PATIENCE)
    argv = [sys.executable, "-P", "-m", "mikoshi", "doctor", "--on", "cluster.toml", "--nodes", "2"]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as doctor:
        try:
            until(lambda: jobs(slurm), "it has nodes", 60)
            (ident,) = slurm.call("squeue", "-h", "-o", "%i").split()
            assert slurm.job(ident)["TimeLimit"] == "00:15:00"
            doctor.send_signal(signal.SIGTERM)
            assert doctor.wait(60)
        finally:
            doctor.kill()
    assert not [line for line in slurm.call("squeue", "-h", "-o", "%T").split() if line != "COMPLETING"]


@pytest.mark.slow
def test_what_slurm_refuses_is_one_line_and_nothing_is_queued(slurm, dataset, tmp_path):
    for more, told in [
        (["--nodes", 4], "partition main has 3 nodes"),
        (["--set", "cluster.partition=none"], "no such partition, but main, urgent"),
        (["--set", "cluster.time=2-0"], "partition main allows 01:00:00"),
        (["--set", "cluster.account=a b"], "account"),
        (["--set", "cluster.gpus_per_node=3"], "Requested node configuration is not available"),
        (["--set", 'cluster.options=["--no-such=1"]'], "unrecognized option '--no-such=1'"),
    ]:
        done = mikoshi(tmp_path, "submit", *place(tmp_path, dataset), *more)
        errors = [line for line in done.stderr.splitlines() if line]
        assert done.returncode == 2 and len(errors) == 1 and told in errors[0], (more, done.stderr)
        assert not (tmp_path / "runs" / "run" / "spec.json").exists()
    assert not jobs(slurm)


def test_names_of_nodes_are_read_as_slurm_reads_them(slurm):
    for text in ("n[1-3]", "n[01-03,7],login", "gpu[098-101]", "r[1-2]n[1-2]", "a,b[3]"):
        assert expand_nodelist(text) == slurm.call("scontrol", "show", "hostnames", text).split()


def test_jobs_that_slurm_does_not_know_do_not_hide_those_it_does(slurm, tmp_path):
    backend = SlurmBackend(load_cluster(str(write_cluster(tmp_path, kind="slurm"))))
    job = slurm.call("sbatch", "--parsable", "-o", "/dev/null", "--hold", "--wrap=true").strip()
    states = backend.query([{"id": "999999"}, {"id": job}, {}])
    assert [state.state for state in states] == ["ended", "queued", "unknown"]
    assert backend.query([{"id": "999999"}])[0].state == "ended"


def test_a_controller_that_is_gone_is_one_line(slurm, tmp_path, monkeypatch):
    conf = tmp_path / "slurm.conf"
    conf.write_text(slurm.conf.read_text().replace(f"SlurmctldPort={slurm.port}", "SlurmctldPort=1"))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    with pytest.raises(LaunchError, match="the controller does not answer") as told:
        made = load_cluster(str(write_cluster(tmp_path, kind="slurm")))
        run = create_run(new_spec(run_config(tmp_path / "data", tmp_path / "runs"), made, tmp_path))
        SlurmBackend(made).check(run, Request(nodes=1, min_nodes=1, time=1.0))
    assert "\n" not in str(told.value)
