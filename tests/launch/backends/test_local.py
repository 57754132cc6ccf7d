"""The head on this machine: started detached, found again, stopped, and nothing left of it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hosts import until
from mikoshi.launch.backends.local.local import LocalBackend, LocalSite
from mikoshi.launch.config.cluster import LocalCluster, SshCluster
from mikoshi.launch.config.private_env import PRIVATE, read_private
from mikoshi.launch.runs.record import Request, Started, SubmittedRun, create_run, new_spec
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder
from runs import run_config
from standin import noted, standin

WAIT = "time.sleep(60)"
PARENT = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
listener = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
print(child.pid, listener.pid, flush=True)
time.sleep(60)
"""


def request(**fields):
    return Request(**{"nodes": 1, "min_nodes": 1, "time": 1.0, **fields})


def submitted(folder, cluster):
    """A run in a folder, and its first attempt."""
    run = create_run(new_spec(run_config(folder / "data", folder / "runs"), cluster, folder))
    return run, run.add(request())


@pytest.fixture
def started(tmp_path):
    """Start stand-ins as heads; whatever is left of them is killed."""
    jobs = []

    def start(then=WAIT, python=None, **fields):
        python = standin(python or tmp_path / "python", then)
        cluster = LocalCluster(kind="local", python=str(python), **fields)
        run, attempt = submitted(tmp_path, cluster)
        backend = LocalBackend(cluster)
        job = backend.submit(run, attempt)
        jobs.append(int(job["pid"]))
        attempt.write_job(job)
        return backend, run, attempt, python

    yield start
    for pid in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_the_head_is_started_in_the_workdir_in_a_session_of_its_own(started, tmp_path):
    _, run, attempt, python = started("print('said'); " + WAIT)
    note = until(lambda: noted(python), 10, "the head runs")
    assert (
        note["argv"] == ["-P", "-m", "mikoshi.launch.controller.head", str(run.folder.path)]
        and Path(note["argv"][-1]).is_absolute()
    )
    assert note["cwd"] == str(tmp_path)
    assert note["session"] == note["pid"] == int(attempt.job["pid"]) != os.getsid(0)
    assert attempt.job["kind"] == "local" and attempt.job["host"] == socket.gethostname()


def test_what_the_head_says_is_in_its_log_and_its_input_is_empty(started):
    _, _, attempt, _ = started("print(repr(sys.stdin.read())); sys.exit('enough')")
    until(lambda: "enough" in attempt.head_log.read_text(), 10, "both are written")
    assert set(attempt.head_log.read_text().split()) == {"''", "enough"}


def test_it_runs_until_it_has_ended_also_for_the_one_who_started_it(started):
    backend, _, attempt, _ = started()
    assert backend.query([attempt.job])[0].state == "running"
    os.kill(int(attempt.job["pid"]), signal.SIGKILL)
    until(lambda: backend.query([attempt.job])[0].state == "ended", 10, "it is told as ended")


def test_the_number_of_a_process_given_to_another_is_not_the_head(started):
    backend, _, attempt, _ = started()
    job = attempt.job
    later = {**job, "start_ticks": str(int(job["start_ticks"]) + 1)}
    rebooted = {**job, "boot": "0" * 8 + job["boot"][8:]}
    for other in (later, rebooted):
        assert backend.query([other])[0].state == "ended"
        attempt.write_job(other)
        backend.cancel(attempt, now=True)
        assert backend.query([job])[0].state == "running", "a stranger was killed"


def test_a_head_is_known_again_when_the_clock_was_set(started):
    backend, _, attempt, _ = started()
    for step in (-3600, 3600):
        moved = {**attempt.job, "began": repr(float(attempt.job["began"]) + step)}  # what a clock that is set does to it
        assert backend.query([moved])[0].state == "running"
    attempt.write_job(moved)
    backend.cancel(attempt, now=True)
    assert backend.query([moved])[0].state == "ended"


def test_where_the_kernel_tells_no_start_the_time_of_day_does(started):
    backend, _, attempt, _ = started()
    job = {key: value for key, value in attempt.job.items() if key not in ("start_ticks", "boot")}
    assert job.keys() == {"kind", "host", "pid", "began"}
    assert backend.query([job])[0].state == "running"
    assert backend.query([{**job, "began": repr(float(job["began"]) - 3600)}])[0].state == "ended"


def test_a_head_on_another_machine_is_unknown_here_and_cannot_be_cancelled_from_here(started):
    backend, _, attempt, _ = started()
    attempt.write_job({**attempt.job, "host": "elsewhere"})
    (state,) = backend.query([attempt.job])
    assert state.state == "unknown" and "elsewhere" in state.why
    with pytest.raises(LaunchError, match="elsewhere: ask there"):
        backend.cancel(attempt, now=False)


def test_a_submission_that_was_cut_off_is_unknown(started):
    backend, *_ = started()
    (state,) = backend.query([{}])
    assert state.state == "unknown" and "cut off" in state.why


def test_a_cancel_asks_the_head_which_may_take_its_time(started):
    backend, _, attempt, _ = started(
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75))); print('ready', flush=True); "
        + WAIT
    )
    until(lambda: "ready" in attempt.head_log.read_text(), 10, "the head listens")
    backend.cancel(attempt, now=False)
    until(lambda: backend.query([attempt.job])[0].state == "ended", 10, "it ends")
    assert "saved" in attempt.head_log.read_text()


def test_a_cancel_at_once_leaves_nothing_of_what_the_head_had_started(started):
    backend, _, attempt, _ = started(PARENT)
    until(lambda: attempt.head_log.read_text().strip(), 10, "it has children")
    everyone = [int(attempt.job["pid"]), *map(int, attempt.head_log.read_text().split())]
    backend.cancel(attempt, now=True)
    alive = [pid for pid in everyone if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not alive
    backend.cancel(attempt, now=True)  # once more: it is gone, and that is no error


SUBMITTER = """
import json, sys
from pathlib import Path
from mikoshi.launch.backends.local.local import LocalBackend
from mikoshi.launch.runs.record import open_submitted
run = open_submitted(Path(sys.argv[1]))
print(json.dumps(LocalBackend(run.spec.cluster).submit(run, run.attempts[-1])))
"""


def test_the_head_outlives_the_one_who_submitted(tmp_path):
    python = standin(tmp_path / "python", WAIT)
    run, attempt = submitted(tmp_path, LocalCluster(kind="local", python=str(python)))
    done = subprocess.run([sys.executable, "-c", SUBMITTER, run.folder.path], capture_output=True, text=True, check=True)
    attempt.write_job(json.loads(done.stdout))
    backend = LocalBackend(run.spec.cluster)
    assert backend.query([attempt.job])[0].state == "running"
    backend.cancel(attempt, now=True)
    assert backend.query([attempt.job])[0].state == "ended"


def test_setup_lines_see_nothing_of_the_head_and_the_head_has_what_they_export(started):
    setup = 'export SEEN="$#:$*"\nset -- other arguments\necho noise\nread -r line\nexport LINE="[$line]"\ncd /'
    _, run, attempt, python = started("print('word'); " + WAIT, setup=setup)
    note = until(lambda: noted(python), 10, "the head runs")
    assert note["argv"] == ["-P", "-m", "mikoshi.launch.controller.head", str(run.folder.path)]
    assert note["env"]["SEEN"] == "0:" and note["env"]["LINE"] == "[]"
    assert note["pid"] == int(attempt.job["pid"]), "a shell stands between"


def test_a_head_whose_setup_fails_is_not_run_and_its_log_says_why(started):
    backend, _, attempt, python = started(setup="module_of_yours load cuda")
    until(lambda: backend.query([attempt.job])[0].state == "ended", 10, "it ends")
    assert noted(python) is None and "module_of_yours" in attempt.head_log.read_text()


def test_secrets_and_variables_are_in_a_private_file_alone(started, monkeypatch):
    hostile = "quote\" ' $(touch canary)\nline two; ü"
    monkeypatch.setenv("TOKEN", "s3cret" + hostile)
    _, run, _, python = started(secrets=["TOKEN"], env={"NAME": hostile})
    file = run.folder.path / PRIVATE
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_private(file) == {"TOKEN": "s3cret" + hostile, "NAME": hostile}
    note = until(lambda: noted(python), 10, "the head runs")
    assert not any("s3cret" in argument for argument in note["argv"]) and "NAME" not in note["env"]
    others = [path for path in run.folder.path.rglob("*") if path.is_file() and path != file]
    assert not [path for path in others if "s3cret" in path.read_text()]


def test_a_secret_that_the_submitter_lacks_is_named_and_nothing_is_started(started, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKEN", raising=False)
    with pytest.raises(LaunchError, match="TOKEN"):
        started(secrets=["TOKEN"])
    assert noted(tmp_path / "python") is None


def check(folder, request, **fields):
    cluster = LocalCluster(kind="local", **fields)
    config = run_config(folder / "data", folder / "runs")
    spec = new_spec(config, cluster, Path(cluster.workdir or folder))
    LocalBackend(cluster).check(SubmittedRun(RunFolder(config.run.path), spec), request)


@pytest.mark.parametrize(
    ("fields", "asked", "told"),
    [
        ({}, {"nodes": 2}, "2 nodes asked for, and this machine is one"),
        ({}, {"exclude": [socket.gethostname()]}, "is to be avoided"),
        ({"workdir": "/no/such"}, {}, "workdir = '/no/such'"),
        ({"python": "/no/such/python"}, {}, "python = '/no/such/python'"),
        ({"python": "/bin/false"}, {}, "no Mikoshi there"),
    ],
)
def test_what_this_machine_cannot_run_is_refused_in_one_line(tmp_path, fields, asked, told):
    with pytest.raises(LaunchError) as refused:
        check(tmp_path, request(**asked), **fields)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_this_machine_as_it_is_serves(tmp_path):
    check(tmp_path, request(), python=sys.executable)


def test_the_head_for_hosts_is_run_by_the_interpreter_that_submits(tmp_path):
    cluster = SshCluster(kind="ssh", hosts=["n1", "n2", "n3"], python="/opt/there/python", setup="module load x")
    run, _ = submitted(tmp_path, cluster)
    lines = LocalBackend(cluster).preview(run, request(nodes=2)).splitlines()
    assert f"{sys.executable} -P -m mikoshi.launch.controller.head {run.folder.path}" in lines
    assert [line for line in lines if line.startswith("# by the head")] == [
        "# by the head, for n1", "# by the head, for n2", "# by the head, for n3 (a spare)",
    ]  # fmt: skip


def test_this_machine_is_the_one_node(tmp_path):
    cluster = LocalCluster(kind="local")
    run, attempt = submitted(tmp_path, cluster)
    site = LocalSite(cluster, run, attempt)
    assert site.nodes() == [socket.gethostname()]
    assert site.command(socket.gethostname()) == [sys.executable, "-P", "-m", "mikoshi.launch.agent.node"]
    avoided = run.add(request(exclude=[socket.gethostname()]))
    assert LocalSite(cluster, run, avoided).nodes() == []


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_head_whose_job_is_not_on_record_is_cancelled_by_its_own(started, damage):
    backend, _, attempt, _ = started()
    job, file = attempt.job, attempt.path / "job.json"
    file.write_text(damage) if damage else file.unlink()
    with pytest.raises(LaunchError, match="damaged" if damage else "cut off"):
        backend.cancel(attempt, now=True)
    host, pid, began = job["host"], int(job["pid"]), float(job["began"])
    attempt.write(Started(host=host, pid=pid, began=began, nodes=["n1"], ranks_per_node=1, time=1.0))
    backend.cancel(attempt, now=True)
    assert backend.query([job])[0].state == "ended"
