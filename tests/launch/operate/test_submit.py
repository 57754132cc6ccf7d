import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.config.cluster import KubernetesCluster, LocalCluster, SlurmCluster, SshCluster
from mikoshi.launch.operate import control
from mikoshi.launch.operate.control import RunStatus, next_request, request_stop, resume, run_status, wait_for_end
from mikoshi.launch.operate.submit import check, make_plan, parse_axis, submit, submit_all, sweep_plans
from mikoshi.launch.runs.record import Attempt, Request, Result, Started, Status, SubmittedRun, create_run, open_submitted
from mikoshi.parallel.errors import LayoutError
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import ConfigError, DataError, LaunchError, TooFewError
from runs import run_config

LOCAL = LocalCluster(kind="local", ranks_per_node=2)
ONE = LocalCluster(kind="local", ranks_per_node=1)


class Cluster:
    """A cluster that remembers what it was asked, and refuses on demand: the flow's failures are what is tested here."""

    def __init__(self, refuse=None, at=1):
        self.refuse, self.at, self.jobs, self.cancelled, self.state = refuse, at, [], [], "running"
        self.checked, self.unless = [], []

    def check(self, run, request):
        self.checked.append(request)
        if self.refuse == "check":
            raise LaunchError("no such partition: long")
        if set(self.unless) & set(request.avoided):
            raise TooFewError("too few nodes")

    def preview(self, run, request):
        return "preview"

    def submit(self, run, attempt):
        if self.refuse == "submit" and len(self.jobs) + 1 == self.at:
            raise LaunchError("quota: 8 of 8 nodes are used")
        self.jobs.append(run.folder.path.name)
        return {"id": str(len(self.jobs))}

    def query(self, jobs):
        return [JobState(self.state) for _ in jobs]

    def cancel(self, attempt, now):
        if self.refuse == "cancel":
            raise LaunchError("no controller answers")
        self.cancelled.append((attempt.job["id"], now))


@pytest.fixture
def config(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run_config(dataset, Path("runs"))


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    monkeypatch.setattr("mikoshi.launch.operate.board.open_backend", lambda _: made)
    return made


def pairs(config):
    """Two ranks carry every layer together: an odd number of them cannot."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 2})})


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def test_a_run_that_is_submitted_is_told_by_its_folder_alone(config, tmp_path):
    run, attempt = submit(make_plan(config, LOCAL), Cluster())
    found = open_submitted(tmp_path / "runs" / "test")
    assert found.spec == run.spec and found.spec.config == config and found.spec.workdir == str(tmp_path)
    assert (attempt.number, attempt.job, attempt.request.nodes, attempt.request.cause) == (1, {"id": "1"}, 1, "submit")


def test_a_plan_makes_nothing(config, tmp_path):
    plan = make_plan(config, LOCAL, nodes=2)
    check(plan, Cluster())
    assert files(tmp_path) == [] and plan.folder == tmp_path / "runs" / "test"
    assert "4 ranks, 2 a node" in plan.layout


def test_a_cluster_that_refuses_leaves_no_run_folder_behind(config, tmp_path):
    with pytest.raises(LaunchError, match="no such partition"):
        check(make_plan(config, LOCAL), Cluster("check"))
    with pytest.raises(LaunchError, match="quota"):
        submit(make_plan(config, LOCAL), Cluster("submit"))
    assert files(tmp_path / "runs" / "test") == []


def test_a_folder_that_was_there_keeps_what_was_in_it(config, tmp_path):
    (tmp_path / "runs" / "test" / "notes").mkdir(parents=True)
    with pytest.raises(LaunchError, match="quota"):
        submit(make_plan(config, LOCAL), Cluster("submit"))
    assert files(tmp_path / "runs" / "test") == ["notes"]


def test_a_job_that_cannot_be_recorded_is_called_back(config, tmp_path, monkeypatch):
    cluster, write = Cluster(), Attempt.write_job

    def full(attempt, job):
        if tmp_path in attempt.path.parents:
            raise OSError(28, "No space left on device")
        write(attempt, job)

    monkeypatch.setattr(Attempt, "write_job", full)
    with pytest.raises(OSError, match="No space left"):
        submit(make_plan(config, LOCAL), cluster)
    assert cluster.cancelled == [("1", True)] and files(tmp_path / "runs" / "test") == []


def test_two_runs_of_one_name_are_one_too_many(config, tmp_path):
    plan = make_plan(config, LOCAL)
    submit(plan, Cluster())
    before, cluster = files(tmp_path / "runs"), Cluster()
    with pytest.raises(LaunchError, match=r"a run of this name is there already: `mikoshi resume"):
        check(plan, cluster)
    with pytest.raises(LaunchError, match="a run of this name is there already"):
        submit(make_plan(config, LOCAL), cluster)
    assert files(tmp_path / "runs") == before and cluster.jobs == []
    (tmp_path / "runs" / "plain").mkdir()
    (tmp_path / "runs" / "plain" / "config.toml").write_text(to_toml(config))
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": "plain"})})
    with pytest.raises(LaunchError, match="a run of this name is there already"):
        submit(make_plan(named, LOCAL), cluster)
    assert files(tmp_path / "runs" / "plain") == ["config.toml"]


def test_of_two_that_submit_one_name_at_once_one_is_told_so(config, tmp_path):
    plans, cluster = [make_plan(config, LOCAL) for _ in range(8)], Cluster()
    refused = []

    def one(plan):
        try:
            submit(plan, cluster)
        except LaunchError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=one, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7 and cluster.jobs == ["test"] and len(open_submitted(tmp_path / "runs" / "test").attempts) == 1


CALLS = ("mkdir", "open", "fsync", "link", "rename", "unlink")


def killed_at(call, work):
    """In a process of its own, killed before its call number `call` that may change a disk; whether it has come so far."""
    child = os.fork()
    if child == 0:
        left = call

        def counted(real):
            def count(*args, **named):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return real(*args, **named)

            return count

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_point_leaves_a_run_that_can_be_resumed(config, cluster, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    run, attempt = submit(make_plan(config, LOCAL), cluster)
    end(attempt)
    seen, call = run_status(run.folder.path), 0
    while killed_at(call, lambda: run.add(attempt.request)):
        for path in run.folder.path.glob("attempts/*/request.json"):
            os.utime(path, (1.0, 1.0))  # as after a while
        if len(run.attempts) == 1:
            second, _ = resume(seen, Cluster(), None, None, [], [])
            assert second.number == 2, call
        shutil.rmtree(run.folder.path / "attempts" / "2")
        call += 1
    assert call > 5


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_point_leaves_no_half_of_a_spec(config, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    plan, call = make_plan(config, LOCAL), 0
    spec = tmp_path / "runs" / "test" / "spec.json"
    while killed_at(call, lambda: create_run(plan.spec, plan.folder)):
        if spec.exists():
            os.utime(spec, (1.0, 1.0))
        if spec.exists() and spec.stat().st_size:
            with pytest.raises(LaunchError, match="a run of this name is there already"):
                create_run(plan.spec, plan.folder)
        else:
            create_run(plan.spec, plan.folder)
        assert open_submitted(plan.folder).spec == plan.spec
        shutil.rmtree(plan.folder)
        call += 1
    assert call > 5


def no_links(*_args, **_named):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_run_that_was_cut_off_before_it_had_a_job_can_be_resumed(config, cluster):
    plan = make_plan(config, LOCAL)
    run = create_run(plan.spec, plan.folder)
    run.add(plan.request)
    assert run_status(run.folder.path).state == "queued", "perhaps it is being handed over"
    run.attempts[0].write(plan.request.model_copy(update={"time": time.time() - 300}))
    seen = run_status(run.folder.path)
    assert (seen.state, seen.why) == ("lost", "it was cut off while it was handed to the cluster")
    assert resume(seen, cluster, None, None, [], [])[0].number == 2


def test_a_folder_that_cannot_be_made_is_told_in_one_line(config, tmp_path):
    plan = make_plan(config, LOCAL)
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(LaunchError, match=r"run.folder: cannot write to .*runs/test"):
        submit(plan, Cluster())


def test_what_cannot_be_laid_out_or_read_is_refused_first(config, tmp_path):
    with pytest.raises(LayoutError):
        make_plan(pairs(config), ONE, nodes=3)
    missing = config.model_copy(update={"data": config.data.model_copy(update={"path": "nowhere"})})
    with pytest.raises(DataError, match="nowhere"):
        make_plan(missing, LOCAL)
    assert files(tmp_path) == []


def test_the_numbers_of_nodes_that_a_run_can_go_on_with_are_found(config):
    plan = make_plan(pairs(config), ONE, nodes=6, min_nodes=2)
    assert plan.request.min_nodes == 2 and plan.fewer == (2, 4) and "tp=2" in plan.layout
    with pytest.raises(LaunchError, match=r"--min-nodes 3: .*; numbers of nodes that work: 4, 6"):
        make_plan(pairs(config), ONE, nodes=6, min_nodes=3)
    with pytest.raises(LaunchError, match="--min-nodes 5: more than the 4"):
        make_plan(config, LOCAL, nodes=4, min_nodes=5)
    assert make_plan(config, LOCAL, nodes=4).request.min_nodes == 4


def test_relative_paths_start_from_the_clusters_folder(config, dataset, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "mine").symlink_to(dataset)
    relative = config.model_copy(update={"data": config.data.model_copy(update={"path": "mine"})})
    with pytest.raises(DataError):
        make_plan(relative, LOCAL)
    plan = make_plan(relative, LOCAL.model_copy(update={"workdir": str(tmp_path / "far")}))
    assert plan.folder == tmp_path / "far" / "runs" / "test" and plan.spec.workdir == str(tmp_path / "far")
    assert Path.cwd() == tmp_path


def test_pods_with_a_disk_of_their_own_leave_a_record_here(config, tmp_path):
    plan = make_plan(config, KubernetesCluster(kind="kubernetes", claim="c", workdir="/mikoshi-not-here"))
    assert plan.folder == tmp_path / "runs" / "test" and "not on this machine" in plan.unseen
    run, _ = submit(plan, Cluster())
    assert run.spec.workdir == "/mikoshi-not-here" and open_submitted(plan.folder).spec == run.spec


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.lr=1e-3,3e-4", ["1e-3", "3e-4"]),
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ('data.path="a,b",c', ['"a,b"', "c"]),
        ("run.seed = 1", ["1"]),
    ],
)
def test_values_of_a_sweep_are_parted_at_commas(text, values):
    assert parse_axis(text)[1] == values


@pytest.mark.parametrize("text", ["optim.lr", "optim.lr=", "=1,2", "optim.lr=1,,2", "optim.lr=1,1"])
def test_a_sweep_without_key_or_values_is_refused(text):
    with pytest.raises(ConfigError, match="--sweep"):
        parse_axis(text)


def test_a_sweep_is_all_of_its_runs_or_none(config, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(config))
    pods = KubernetesCluster(kind="kubernetes", claim="c", workdir=str(tmp_path))
    sweeps = ["run.seed=1,2", "optim.lr=1e-3,3e-4"]
    plans = sweep_plans(tmp_path / "run.toml", [], sweeps, pods, None, None)
    assert [plan.folder.name for plan in plans] == ["test-000", "test-001", "test-002", "test-003"]
    assert [(p.spec.config.run.seed, p.spec.config.optim.lr) for p in plans] == [(1, 1e-3), (1, 3e-4), (2, 1e-3), (2, 3e-4)]
    cluster = Cluster("submit", at=3)
    with pytest.raises(LaunchError, match="quota"):
        submit_all(plans, cluster)
    assert sorted(cluster.cancelled) == [("1", True), ("2", True)] and files(tmp_path / "runs") == []
    submit_all(plans, Cluster())
    assert json.loads((plans[3].folder / "sweep.json").read_text()) == {"run.seed": "2", "optim.lr": "3e-4"}


def test_a_sweep_needs_a_queue(config, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(config))
    with pytest.raises(LaunchError, match="has no queue"):
        sweep_plans(tmp_path / "run.toml", [], ["run.seed=1,2"], LOCAL, None, None)
    slurm = SlurmCluster(kind="slurm")
    with pytest.raises(ConfigError, match="name each key once"):
        sweep_plans(tmp_path / "run.toml", [], ["run.seed=1,2", "run.seed=3"], slurm, None, None)
    with pytest.raises(LaunchError, match="1000 at most"):
        sweep_plans(tmp_path / "run.toml", [], [f"run.seed={','.join(map(str, range(1001)))}"], slurm, None, None)


def end(attempt, state="stopped", **more):
    attempt.write(Started(host="h", pid=1, began=1.0, nodes=["n1"], ranks_per_node=2, time=time.time()))
    attempt.write(Status(time=time.time(), phase="running", nodes=["n1"]))
    attempt.write(Result(state=state, code=0, why="because", time=time.time(), **more))


def test_a_run_that_has_ended_is_resumed_on_other_nodes(config, cluster):
    run, attempt = submit(make_plan(config, LOCAL, nodes=4, min_nodes=2), cluster)
    end(attempt, "failed", bad_nodes=["n3"])
    second, told = resume(run_status(run.folder.path), cluster, 2, None, ["n9"], [])
    assert (second.number, second.request.nodes, second.request.min_nodes) == (2, 2, 2)
    assert (second.request.exclude, second.request.bad) == (["n9"], ["n3"])
    assert second.request.cause == "resume" and "4 ranks" in told
    end(second)
    third = next_request(run, None, None, ["n4"], ["n3"])
    assert (third.exclude, third.bad) == (["n9", "n4"], []) and third.nodes == 2
    assert next_request(run, None, None, [], ["n9"]).exclude == []


def test_a_node_that_was_found_bad_is_used_again_where_there_are_too_few_others(config, cluster):
    run, attempt = submit(make_plan(config, LOCAL, nodes=2), cluster)
    end(attempt, "failed", bad_nodes=["n1"])
    cluster.unless = ["n1"]
    second, _ = resume(run_status(run.folder.path), cluster, None, None, [], [])
    assert second.request.bad == [] and [asked.bad for asked in cluster.checked] == [["n1"], []]
    end(second, "failed", bad_nodes=[])
    with pytest.raises(LaunchError, match="too few"):
        resume(run_status(run.folder.path), cluster, None, None, ["n1"], [])


def test_a_check_that_fails_for_another_reason_is_no_reason_to_use_a_bad_node(config, cluster):
    run, attempt = submit(make_plan(config, LOCAL, nodes=2), cluster)
    end(attempt, "failed", bad_nodes=["n1"])
    cluster.refuse = "check"
    with pytest.raises(LaunchError, match="no such partition"):
        resume(run_status(run.folder.path), cluster, None, None, [], [])
    assert len(cluster.checked) == 1


def test_a_run_led_from_elsewhere_that_gives_signs_of_life_is_not_resumed(config, cluster, monkeypatch):
    """Its clock may be another: that of the last sign tells nothing."""
    monkeypatch.setattr(control, "_LIVENESS_TIME", 1.0)
    monkeypatch.setattr(control, "POLL_INTERVAL", 0.05)
    run, attempt = submit(make_plan(config, LOCAL), cluster)
    long_ago = time.time() - 1000
    attempt.write(Started(host="elsewhere", pid=1, began=1.0, nodes=["n1"], ranks_per_node=2, time=long_ago))
    cluster.state, seen = "unknown", RunStatus(run, "lost", "")

    def live(until):
        while time.monotonic() < until:
            attempt.write(Status(time=long_ago + time.monotonic(), phase="running", nodes=["n1"]))
            time.sleep(0.1)

    thread = threading.Thread(target=live, args=(time.monotonic() + 1.0,))
    thread.start()
    with pytest.raises(LaunchError, match="it runs, led from elsewhere"):
        resume(seen, cluster, None, None, [], [])
    thread.join()
    assert resume(seen, cluster, None, None, [], [])[0].number == 2, "one that gives none"


def test_a_run_that_goes_on_is_not_resumed(config, cluster):
    run, attempt = submit(make_plan(config, LOCAL), cluster)
    for state in ("queued", "running"):
        cluster.state = state
        with pytest.raises(LaunchError, match=r"`mikoshi cancel .*` ends it first"):
            resume(run_status(run.folder.path), cluster, None, None, [], [])
    end(attempt, next="requeued")
    with pytest.raises(LaunchError, match="it is requeued"):
        resume(run_status(run.folder.path), cluster, None, None, [], [])
    assert len(run.attempts) == 1


def test_a_run_whose_scheduler_does_not_answer_is_not_resumed(config, monkeypatch):
    run, _ = submit(make_plan(config, LOCAL), Cluster())

    def query(_):
        raise LaunchError("squeue: no controller answers")

    silent = Cluster()
    silent.query = query
    monkeypatch.setattr("mikoshi.launch.operate.board.open_backend", lambda _: silent)
    with pytest.raises(LaunchError, match="whether it still runs cannot be told: squeue"):
        resume(run_status(run.folder.path), silent, None, None, [], [])


def test_a_resume_that_fails_leaves_no_attempt(config, cluster):
    run, attempt = submit(make_plan(pairs(config), ONE, nodes=2), cluster)
    end(attempt)
    seen = run_status(run.folder.path)
    for refuse, words in (("check", "no such partition"), ("submit", "quota")):
        with pytest.raises(LaunchError, match=words):
            resume(seen, Cluster(refuse), None, None, [], [])
    with pytest.raises(LayoutError):
        resume(seen, cluster, 3, None, [], [])
    with pytest.raises(LaunchError, match="no host name"):
        resume(seen, cluster, None, None, ["-oProxyCommand=x"], [])
    assert [one.number for one in run.attempts] == [1]


def test_of_two_that_resume_at_once_one_is_told_so(config, cluster):
    run, attempt = submit(make_plan(config, LOCAL), cluster)
    end(attempt)
    seen, refused = run_status(run.folder.path), []

    class Slow(Cluster):
        def check(self, run, request):
            run.add(Request(nodes=1, min_nodes=1, cause="resume", time=time.time()))  # by someone else, just now

    with pytest.raises(LaunchError, match="someone else has just resumed it"):
        resume(seen, Slow(), None, None, [], [])
    assert [one.number for one in run.attempts] == [1, 2] and not refused


def test_a_request_to_stop_that_reaches_nobody_is_not_on_record(config):
    run, attempt = submit(make_plan(config, LOCAL), Cluster())
    with pytest.raises(LaunchError, match="no controller answers"):
        request_stop(run, Cluster("cancel"), now=False)
    assert attempt.stop is None
    request_stop(run, Cluster(), now=False)
    with pytest.raises(LaunchError, match="no controller answers"):
        request_stop(run, Cluster("cancel"), now=True)
    assert attempt.stop is not None and attempt.stop.now is False


def test_cancelling_waits_for_the_end_also_of_an_attempt_that_begins_meanwhile(config, cluster, monkeypatch):
    monkeypatch.setattr("mikoshi.launch.operate.control.SCHEDULER_INTERVAL", 0.01)
    monkeypatch.setattr("mikoshi.launch.operate.control.POLL_INTERVAL", 0.01)
    run, attempt = submit(make_plan(config, LOCAL), cluster)
    request_stop(run, cluster, now=False)
    seen = []

    def show(state, _):
        seen.append(state)
        if len(seen) == 2:  # its scheduler has queued it again
            run.add(Request(nodes=1, min_nodes=1, cause="requeue", time=time.time())).write_job({"id": "9"})
        if len(seen) == 4:
            end(run.attempts[-1], "cancelled")

    ended = wait_for_end(run, cluster, False, show)
    assert ended.state == "cancelled" and cluster.cancelled == [("1", False), ("9", False)]
    assert run.attempts[-1].stop is not None and attempt.stop is not None


def test_a_workdir_that_is_not_there_is_refused_and_not_made(config, tmp_path):
    for missing in (LOCAL, SlurmCluster(kind="slurm"), SshCluster(kind="ssh", hosts=["n1"])):
        with pytest.raises(LaunchError, match=r"workdir = '.*/typo': no such folder"):
            make_plan(config, missing.model_copy(update={"workdir": str(tmp_path / "typo")}))
    assert files(tmp_path) == []


def test_a_secret_that_is_not_set_is_told_before_anything_is_asked(config, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(LaunchError, match="secrets: NO_SUCH_TOKEN"):
        check(make_plan(config, LOCAL.model_copy(update={"secrets": ["NO_SUCH_TOKEN"]})), Cluster("check"))


def test_a_sweep_names_its_runs_itself(config, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(config))
    with pytest.raises(LaunchError, match=r"--sweep run.name"):
        sweep_plans(tmp_path / "run.toml", [], ["run.name=c,d"], SlurmCluster(kind="slurm"), None, None)
    with pytest.raises(LaunchError, match="96 signs at most"):
        sweep_plans(tmp_path / "run.toml", [f"run.name={'n' * 100}"], ["run.seed=1,2"], SlurmCluster(kind="slurm"), None, None)


def test_a_stop_takes_a_job_alone_and_no_damaged_one(config):
    cluster = Cluster()
    run, attempt = submit(make_plan(config, LOCAL), cluster)
    for name in ("request", "result", "stop"):
        (attempt.path / f"{name}.json").write_text("{")
    request_stop(run, cluster, now=False)
    assert cluster.cancelled == [("1", False)] and attempt.stop is not None
    (attempt.path / "job.json").write_text("{")
    slurm = SubmittedRun(run.folder, run.spec.model_copy(update={"cluster": SlurmCluster(kind="slurm")}))
    with pytest.raises(LaunchError, match=r"job.json: damaged"):
        request_stop(slurm, cluster, now=True)
