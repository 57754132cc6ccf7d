"""Submit, status, logs and cancel against an API server of the tests' own. No cluster stands behind it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.backends.kubernetes.kubernetes import KubernetesSite, log_lines
from mikoshi.launch.backends.kubernetes.manifests import job_name, jobset
from mikoshi.launch.backends.kubernetes.pod import unpack_run
from mikoshi.launch.backends.open import open_backend, open_site
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.runs.record import Request, Result, Stop, SubmittedRun, create_run, new_spec
from mikoshi.launch.transport.connect import port_of
from mikoshi.trainer.config.run import load_config
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder

pytest.importorskip("kubernetes")
pytest.importorskip("kubernetes_validate")
from kubeserver import serving

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def cluster(**more):
    return KubernetesCluster(kind="kubernetes", image="example.com/m:1", claim="runs", **more)


def new_run_spec(name, kind):
    config = load_config(ROOT / "configs/runs/quickstart.toml", [f"run.name={name}"])
    return new_spec(config, kind, Path("/workspace"))


def new_run(folder, name="quickstart", kind=None):
    return create_run(new_run_spec(name, kind or cluster()), folder / name)


def request(nodes=2, **more):
    return Request(nodes=nodes, min_nodes=1, time=time.time(), **more)


def submit(folder, backend, name="quickstart", nodes=2, kind=None):
    run = new_run(folder, name, kind)
    attempt = run.add(request(nodes))
    backend.server_dry_run(run, attempt.request)
    attempt.write_job(backend.submit(run, attempt))
    return run, attempt


def test_a_submit_makes_three_objects_of_which_two_go_with_the_first(tmp_path, server, monkeypatch):
    monkeypatch.setenv("API_KEY", "k3y")
    backend = open_backend(cluster(secrets=["API_KEY"]))
    run, attempt = submit(tmp_path, backend, kind=cluster(secrets=["API_KEY"]))
    assert server.kinds() == ["configmaps", "jobsets", "secrets"]
    name = attempt.job["jobset"]
    secret = server.objects["default", "secrets", name]["stringData"]
    assert secret["API_KEY"] == "k3y" and re.fullmatch("[0-9a-f]{64}", secret["token"])
    rehearsed = [query.get("dryRun") for method, _, query in server.asked if method == "POST"]
    assert rehearsed == ["All"] * 3 + [None] * 3
    assert all(query["fieldValidation"] == "Strict" for method, _, query in server.asked if method == "POST")
    assert secret["token"] not in json.dumps(attempt.job) and secret["token"] not in backend.preview(run, attempt.request)
    again = run.add(request(1, cause="resume"))
    assert backend.submit(run, again)["jobset"] == job_name(run, 2) != name
    backend.cancel(attempt, now=False)
    assert server.kinds() == ["configmaps", "jobsets", "secrets"], "what is left is the other attempt's"


@pytest.mark.parametrize("refused, told", [
    (("?POST", "jobsets", 403, 'exceeded quota: "gpus", requested: 16'), "exceeded quota"),
    (("POST", "jobsets", 403, 'jobsets is forbidden: User "me" cannot create'), "ask for that right"),
    (("POST", "configmaps", 403, "no"), "refuses (403): no"),
    (("POST", "secrets", 500, "etcd\nis gone"), "etcd is gone"),
    (("?POST", "secrets", 422, "stringData: invalid"), "stringData: invalid"),
])  # fmt: skip
def test_a_submit_that_is_refused_at_any_point_leaves_nothing(tmp_path, server, refused, told):
    method, plural, status, said = refused
    server.refuse[method, plural] = status, said
    with pytest.raises(LaunchError, match=re.escape(told)) as error:
        submit(tmp_path, open_backend(cluster()))
    assert "\n" not in str(error.value)
    assert server.objects == {}


def test_what_could_not_be_taken_back_is_named(tmp_path, server):
    server.refuse["POST", "secrets"] = 500, "out of order"
    server.refuse["DELETE", "jobsets"] = 500, "out of order as well"
    with pytest.raises(LaunchError, match=r"out of order; and it is still there: kubectl delete jobset quickstart-\w{12}-1"):
        submit(tmp_path, open_backend(cluster()))


def test_two_jobs_of_one_name_are_not_one(tmp_path, server):
    backend = open_backend(cluster())
    run, attempt = submit(tmp_path, backend)
    with pytest.raises(LaunchError, match=r"refuses \(409\)"):
        backend.submit(run, attempt)
    assert server.kinds() == ["configmaps", "jobsets", "secrets"], "the first one is left alone"


def test_a_cluster_is_checked_before_anything_is_made(server, tmp_path):
    def checked(**more):
        run = SubmittedRun(RunFolder(tmp_path), new_run_spec("quickstart", cluster(**more)))
        open_backend(cluster(**more)).check(run, request())

    with pytest.raises(LaunchError, match="claim = 'runs': not there"):
        checked()
    server.objects["default", "persistentvolumeclaims", "runs"] = {"metadata": {"name": "runs"}}
    checked()
    with pytest.raises(LaunchError, match="secret_refs = 'bucket': not there"):
        checked(secret_refs=["bucket"])
    server.objects["default", "secrets", "bucket"] = {"metadata": {"name": "bucket"}}
    checked(secret_refs=["bucket"])
    with pytest.raises(LaunchError, match="namespace = 'team': not there: kubectl create namespace team"):
        checked(namespace="team")
    with pytest.raises(LaunchError, match="context = 'other'"):
        checked(context="other")
    server.refuse["?POST", "secrets"] = 422, "stringData: invalid"
    with pytest.raises(LaunchError, match="stringData: invalid"):
        checked()  # what would be submitted is checked by the server, which keeps nothing
    del server.refuse["?POST", "secrets"]
    server.refuse["GET", "namespaces"] = server.refuse["GET", "persistentvolumeclaims"] = 403, "forbidden"
    checked()  # who may not look is not refused
    server.jobsets_known = False
    with pytest.raises(LaunchError, match="does not know JobSets"):
        checked()
    server.token = "another"
    with pytest.raises(LaunchError, match=r"\(401\).*log in again"):
        checked()
    assert server.kinds() == ["persistentvolumeclaims", "secrets"]


def test_a_server_that_is_not_there_is_one_line(tmp_path, server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        server.url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "gone")))
    with pytest.raises(LaunchError, match=r"does not answer: .*refused; check the network") as error:
        submit(tmp_path, open_backend(cluster()))
    assert "\n" not in str(error.value) and "object at 0x" not in str(error.value)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(LaunchError, match="no way to Kubernetes"):
        open_backend(cluster()).check(SubmittedRun(RunFolder(tmp_path), new_run_spec("r", cluster())), request())


def test_a_secret_that_is_not_set_is_named_before_anything_is_made(tmp_path, server, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(LaunchError, match="NOT_SET is not set here"):
        submit(tmp_path, open_backend(cluster(secrets=["NOT_SET"])), kind=cluster(secrets=["NOT_SET"]))
    assert server.objects == {}


def test_how_all_jobs_stand_takes_two_questions(tmp_path, server):
    backend = open_backend(cluster())
    names = ["queued", "pulling", "running", "done", "killed", "gone", "suspended", "fresh"]
    attempts = {name: submit(tmp_path, backend, name)[1] for name in names}
    jobs = {name: attempt.job for name, attempt in attempts.items()}

    def condition(name, kind, message=""):
        held = {"type": kind, "status": "True", "message": message}
        server.objects["default", "jobsets", jobs[name]["jobset"]]["status"] = {"conditions": [held]}

    full = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/4 nodes: insufficient nvidia.com/gpu",
    }
    server.add_pod(jobs["queued"]["jobset"], "head", 0, "Pending", conditions=[full])
    pull = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    server.add_pod(jobs["pulling"]["jobset"], "head", 0, "Pending", containerStatuses=[pull])
    server.add_pod(jobs["running"]["jobset"], "head", 0, "Running")
    server.add_pod(jobs["running"]["jobset"], "nodes", 0, "Running")
    condition("done", "Completed")
    condition("killed", "Failed", "jobset failed due to one or more job failures")
    server.add_pod(
        jobs["killed"]["jobset"], "head", 0, "Failed", containerStatuses=[{"state": {"terminated": {"reason": "OOMKilled"}}}]
    )
    backend.cancel(attempts["gone"], now=True)
    condition("suspended", "Suspended")
    server.asked.clear()
    found = dict(zip(names, backend.query(list(jobs.values())), strict=True))
    assert len(server.asked) == 2
    assert found == {
        "queued": JobState("queued", "Unschedulable: 0/4 nodes: insufficient nvidia.com/gpu"),
        "pulling": JobState("queued", "ImagePullBackOff: no such image"),
        "running": JobState("running", "", ("gpu-head-0", "gpu-nodes-0")),
        "done": JobState("ended", "Completed"),
        "killed": JobState("ended", "OOMKilled", ("gpu-head-0",)),
        "gone": JobState("ended", "its JobSet is deleted"),
        "suspended": JobState("queued", "Suspended"),
        "fresh": JobState("queued", "no pod yet"),
    }
    server.refuse["GET", "jobsets"] = 503, "busy"
    with pytest.raises(LaunchError, match="busy"):
        backend.query(list(jobs.values()))


def test_a_list_of_many_pages_is_read_to_its_end(server):
    from mikoshi.launch.backends.kubernetes.api import connect

    for number in range(1203):
        server.objects["default", "pods", f"p{number:04}"] = {"metadata": {"name": f"p{number:04}", "labels": {"a": "b"}}}
    pods = connect(cluster()).pods("default", "a=b")
    assert [pod["metadata"]["name"] for pod in pods] == [f"p{number:04}" for number in range(1203)]


def test_cancel_leaves_time_to_save_unless_it_is_to_be_at_once(tmp_path, server):
    backend = open_backend(cluster())
    for now in (False, True):
        _, attempt = submit(tmp_path, backend, f"run-{now}")
        other = submit(tmp_path, backend, f"other-{now}")[1]
        for each in (attempt, other):
            server.add_pod(each.job["jobset"], "head", 0, "Running")
        server.asked.clear()
        backend.cancel(attempt, now)
        assert ("default", "jobsets", attempt.job["jobset"]) not in server.objects
        pods = [name for _, plural, name in server.objects if plural == "pods"]
        assert any(name.startswith(other.job["jobset"]) for name in pods), "another run's pods are left alone"
        assert any(name.startswith(attempt.job["jobset"]) for name in pods) is not now, "its controllers end them in their time"
        backend.cancel(attempt, now)  # what is gone already is no error


def test_logs_are_those_of_the_newest_pod_of_a_node(tmp_path, server):
    _, attempt = submit(tmp_path, open_backend(cluster()))
    with pytest.raises(LaunchError, match="no pod of node 0"):
        log_lines(cluster(), attempt.job)
    first, second = (server.add_pod(attempt.job["jobset"], "head", 0, phase) for phase in ("Failed", "Running"))
    node = server.add_pod(attempt.job["jobset"], "nodes", 0, "Running")
    server.logs = {first: ["old"], second: ["step 1", "é" * 70000, "last"], node: ["listening on port 20480"]}
    assert list(log_lines(cluster(), attempt.job)) == ["step 1", "é" * 70000, "last"]
    assert list(log_lines(cluster(), attempt.job, node=1, follow=True)) == ["listening on port 20480"]


def test_following_waits_for_the_leading_pod_and_shows_what_it_prints(tmp_path, server, monkeypatch, capfd):
    from mikoshi.launch.cli.watch import follow_run
    from mikoshi.launch.operate import control

    run, attempt = submit(tmp_path, open_backend(cluster()))
    monkeypatch.setattr(control, "SCHEDULER_INTERVAL", 0.02)
    pod = server.add_pod(attempt.job["jobset"], "head", 0, "Pending")
    server.logs = {pod: ["step 1", "step 2"]}

    def start():
        time.sleep(0.5)
        server.objects["default", "pods", pod]["status"]["phase"] = "Running"

    thread = threading.Thread(target=start)
    thread.start()
    follow_run(run.folder.path, lines=1)
    thread.join()
    said = capfd.readouterr()
    assert said.out == "step 2\n"
    told = "quickstart: running: its progress is in the run folder on the cluster's disk"
    assert "waiting for the pod of node 0 to start" in said.err and said.err.rstrip().endswith(told)


def test_without_the_package_one_line_says_what_to_install():
    blocked = "import sys; sys.modules['kubernetes'] = None\nfrom mikoshi.launch.backends.kubernetes.api import connect\n" \
        "from mikoshi.launch.config.cluster import KubernetesCluster\nfrom mikoshi.trainer.errors import LaunchError\n" \
        "try: connect(KubernetesCluster(kind='kubernetes'))\nexcept LaunchError as error: print(error)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == 'Kubernetes needs one more package: pip install "mikoshi[kubernetes]"\n'


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs the Debian package kubernetes-client (kubectl)")
def test_kubectl_takes_the_preview_as_it_is(tmp_path, server):
    run = new_run(tmp_path)
    asked = request(2)
    server.token = ""  # which kubectl would not send without TLS
    text = open_backend(cluster()).preview(run, asked)
    done = subprocess.run(
        ["kubectl", "create", "--validate=false", "-f", "-"], input=text, text=True, capture_output=True, timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert server.kinds() == ["configmaps", "jobsets", "secrets"]
    for thing in jobset(run, asked, 1):
        made = dict(server.objects["default", f"{thing['kind'].lower()}s", job_name(run, 1)])
        made["metadata"] = {key: value for key, value in made["metadata"].items() if key != "uid"}
        assert made == thing


# --- inside the pods ---


def mounted(tmp_path, run, asked, number=1):
    """The ConfigMap of a submit as the kubelet mounts it."""
    folder = tmp_path / f"mount-{number}"
    folder.mkdir()
    for name, text in jobset(run, asked, number)[1]["data"].items():
        (folder / name).write_text(text)
    return folder


def test_the_leading_pod_finds_its_request_once_however_often_it_starts(tmp_path):
    run = new_run(tmp_path)
    first, second = request(2), request(1, cause="resume")
    there = tmp_path / "claim" / "quickstart"
    mount = mounted(tmp_path, run, first)
    for _ in range(2):
        placed = unpack_run(mount, there)
        assert [attempt.request for attempt in placed.attempts] == [first]
        assert placed.spec == run.spec
    placed.add(request(2, cause="requeue"))  # the head's own, when its pod started again
    later = unpack_run(mounted(tmp_path, run, second, 2), there)
    assert [attempt.request.cause for attempt in later.attempts] == ["submit", "requeue", "resume"]
    with pytest.raises(LaunchError, match="another run of this name is there"):
        unpack_run(mounted(tmp_path, new_run(tmp_path / "again"), first, 3), there)


def test_the_leading_pod_ends_with_a_users_mistake_where_it_cannot_start(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mikoshi.launch.backends.kubernetes.pod", str(tmp_path), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, "which ends the JobSet"
    assert done.stderr.count("\n") == 1 and "spec.json" in done.stderr


def test_the_site_reaches_itself_directly_and_the_others_by_dial(tmp_path):
    run = new_run(tmp_path)
    attempt = run.add(request(3))
    site = KubernetesSite(cluster(), run, attempt, mounted(tmp_path, run, attempt.request), Path("/secret"))
    first, second, third = site.nodes()
    assert first.startswith(f"{job_name(run, 1)}-head-0-0.")
    assert site.command(first) == [sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]
    assert site.command(third)[3:] == [
        "mikoshi.launch.transport.connect", "connect", third, "--port", str(port_of(run.spec.id)),
        "--token-file", "/secret/token", "--wait", "300",
    ]  # fmt: skip
    assert second != third
    with pytest.raises(LaunchError, match="is this a pod of a run"):
        open_site(cluster(), run, attempt).nodes()


@pytest.mark.parametrize(
    "code, stopped, again", [(0, False, False), (2, False, False), (1, False, True), (75, False, True), (75, True, False)]
)
def test_what_follows_an_attempt_is_told_as_the_jobset_will_do_it(tmp_path, code, stopped, again):
    run = new_run(tmp_path, kind=cluster(restarts=1))
    attempt = run.add(request(1))
    if stopped:
        attempt.write(Stop(time=time.time(), by="me", now=False))
    state = {0: "done", 2: "refused", 75: "stopped"}.get(code, "failed")
    result = Result(state=state, code=code, why="", time=time.time())
    site = KubernetesSite(cluster(restarts=1), run, attempt)
    assert site.after(run, attempt, result).next == ("requeued" if again else "")
    run.add(request(1, cause="requeue"))
    assert site.after(run, attempt, result).next == "", "its restarts are used up"


def test_a_run_is_opened_from_its_record_alone(tmp_path):
    run = new_run(tmp_path)
    assert SubmittedRun(RunFolder(run.folder.path), run.spec) == run
