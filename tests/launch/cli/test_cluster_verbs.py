import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mikoshi.trainer.config.run import to_toml
from runs import run_config


@pytest.fixture
def place(dataset, tmp_path):
    """A folder with a run's TOML and a cluster of two ranks on this machine; whatever is started from it ends with the test."""
    config = run_config(dataset, Path("runs"), engine={"device": "cpu"}, checkpoint={"every": 2})
    (tmp_path / "test.toml").write_text(to_toml(config))
    (tmp_path / "here.toml").write_text('kind = "local"\nranks_per_node = 2\n')
    yield tmp_path
    for job in tmp_path.glob("runs/*/attempts/*/job.json"):
        head = int(json.loads(job.read_text())["pid"])
        if psutil.pid_exists(head) and "mikoshi.launch.controller.head" in psutil.Process(head).cmdline():
            os.kill(head, signal.SIGKILL)


def seen(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def until(mikoshi, run, wanted):
    """What status tells once it is as wanted."""
    deadline = time.monotonic() + 120
    while True:
        code, out, errors = mikoshi("status", run, "--json")
        assert code == 0, errors
        told = json.loads(out)
        if wanted(told):
            return told
        assert time.monotonic() < deadline and told["state"] not in ("lost", "failed"), told
        time.sleep(0.2)


def test_a_dry_run_shows_what_would_be_done_and_does_nothing(mikoshi, place):
    before = seen(place)
    code, out, _ = mikoshi("submit", "test.toml", "--on", "./here.toml", "--dry-run", "train.steps=7")
    assert code == 0 and "mikoshi.launch.controller.head" in out and "2 ranks, 2 a node" in out
    assert seen(place) == before


@pytest.mark.usefixtures("place")
def test_a_run_is_submitted_watched_and_done(mikoshi):
    code, out, _ = mikoshi("submit", "test.toml", "--on", "./here.toml")
    assert code == 0
    assert [line.strip() for line in out.splitlines()[1:]] == [
        "mikoshi status runs/test", "mikoshi logs runs/test -f", "mikoshi cancel runs/test"
    ]  # fmt: skip
    code, out, _ = mikoshi("logs", "test", "-f")
    assert code == 0 and "finished 5 steps" in out
    told = until(mikoshi, "test", lambda told: told["state"] == "done")
    assert (told["step"], told["steps"], told["checkpoint"], told["attempt"]) == (5, 5, 5, 1) and told["loss"] > 0
    code, out, _ = mikoshi("runs")
    assert code == 0 and out.splitlines()[1].split()[:3] == ["test", "done", "local"]
    assert json.loads(mikoshi("runs", "--json")[1])["runs"][0]["state"] == "done"
    assert mikoshi("status", "test")[1].count("5/5") == 1
    assert mikoshi("logs", "test", "-n", "1")[1].startswith("finished 5 steps")
    for verb in ("resume", "cancel"):
        code, out, _ = mikoshi(verb, "test")
        assert code == 0 and "already" in out and "done" in out
    code, _, errors = mikoshi("submit", "test.toml", "--on", "./here.toml")
    assert code == 2 and len(errors) == 1 and "a run of this name is there already" in errors[0]
    code, _, errors = mikoshi("logs", "test", "--rank", "9")
    assert code == 2 and "rank 9 has said nothing" in errors[0] and "--rank 0, 1" in errors[0]


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_run_is_cancelled_resumed_and_ended_at_once(mikoshi):
    assert mikoshi("submit", "test.toml", "--on", "./here.toml", "train.steps=100000")[0] == 0
    until(mikoshi, "test", lambda told: told["step"] > 3)
    code, _, errors = mikoshi("resume", "test")
    assert code == 2 and "`mikoshi cancel runs/test` ends it first" in errors[0]
    code, out, _ = mikoshi("cancel", "test")
    told = until(mikoshi, "test", lambda told: told["state"] == "cancelled")
    assert code == 0 and f"step {told['step']} is saved" in out
    assert mikoshi("resume", "test")[0] == 0
    going = until(mikoshi, "test", lambda now: now["step"] > told["step"] + 2)
    assert going["attempt"] == 2
    assert mikoshi("cancel", "test", "--now")[0] == 0
    ended = until(mikoshi, "test", lambda told: told["state"] not in ("running", "stopping"))
    assert ended["state"] == "cancelled" and ended["checkpoint"] >= told["checkpoint"]


@pytest.mark.slow
def test_a_run_whose_head_is_killed_is_lost_and_resumed(mikoshi, place):
    assert mikoshi("submit", "test.toml", "--on", "./here.toml", "train.steps=100000")[0] == 0
    until(mikoshi, "test", lambda told: told["checkpoint"])
    os.kill(json.loads((place / "runs/test/attempts/1/started.json").read_text())["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while json.loads(mikoshi("status", "test", "--json")[1])["state"] != "lost":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    code, out, _ = mikoshi("status", "test")
    assert code == 0 and "mikoshi resume runs/test" in out
    assert mikoshi("resume", "test")[0] == 0
    assert mikoshi("cancel", "test", "--now")[0] == 0


MISTAKES = [
    (["submit", "test.toml", "--on", "nowhere"], "no such cluster file"),
    (["submit", "none.toml", "--on", "./here.toml"], "none.toml"),
    (["submit", "test.toml", "--on", "./here.toml", "--set", "cluster.rank_per_node=2"], "did you mean"),
    (["submit", "test.toml", "--on", "./here.toml", "--nodes", "2"], "this machine is one"),
    (["submit", "test.toml", "--on", "./here.toml", "--nodes", "2", "--min-nodes", "3"], "--min-nodes 3"),
    (["submit", "test.toml", "--on", "./here.toml", "data.path=nowhere"], "nowhere"),
    (["submit", "test.toml", "--on", "./here.toml", "parallel.tp=3"], "parallel.tp"),
    (["submit", "test.toml", "--on", "./here.toml", "--sweep", "run.seed=1,2"], "has no queue"),
    (["submit", "test.toml", "--on", "./here.toml", "--sweep", "run.seed=1", "--follow"], "--follow"),
    (["submit", "test.toml", "--on", "./here.toml", f"run.name={'n' * 101}"], "at most 100 characters"),
    (["submit", "test.toml", "--on", "./here.toml", "--set", "cluster.workdir=typo"], "no such folder"),
    (["status", "nothing"], "mikoshi runs"),
    (["status", "x\ny"], "'x\\ny': not a run folder"),
    (["logs", "nothing"], "mikoshi runs"),
    (["cancel", "nothing"], "mikoshi runs"),
    (["resume", "nothing"], "mikoshi runs"),
    (["runs", "--folder", "nothing"], "--folder nothing"),
    (["logs", "plain"], "mikoshi train"),
    (["cancel", "plain"], "not a submitted run"),
    (["resume", "plain"], "not a submitted run"),
    (["status", "newer"], "update"),
    (["cancel", "newer"], "update"),
    (["logs", "newer", "-f"], "update"),
    (["export", "test.toml", "--on", "./here.toml", "--as", "slurm"], "--as slurm"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_line_and_leaves_nothing(mikoshi, place, arguments, words):
    for name, file, text in (
        ("plain", "config.toml", "[train]\nsteps = 5\n"),
        ("newer", "spec.json", '{"format": 99, "cluster": {}}'),
    ):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / file).write_text(text)
    before = seen(place)
    code, _, errors = mikoshi(*arguments)
    assert code == 2 and len(errors) == 1 and words in errors[0], errors
    assert seen(place) == before


def test_a_reader_that_has_had_enough_is_no_error(place):
    from mikoshi.launch.config.cluster import LocalCluster
    from mikoshi.launch.runs.record import Request, create_run, new_spec
    from mikoshi.trainer.config.run import load_config

    run = create_run(new_spec(load_config(place / "test.toml"), LocalCluster(kind="local"), place))
    run.add(Request(nodes=1, min_nodes=1, time=1.0)).rank_log(0).write_bytes(b"line\n" * 200_000)
    command = [sys.executable, "-P", "-m", "mikoshi", "logs", "test"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as logs:
        assert logs.stdout.readline() == b"line\n"
        logs.stdout.close()
        assert logs.stderr.read() == b""
    assert logs.returncode == 0


@pytest.mark.parametrize("verb", ["submit", "status", "logs", "cancel", "resume", "runs", "doctor", "export"])
def test_every_verb_has_examples(mikoshi, verb):
    code, out, _ = mikoshi(verb, "--help")
    assert code == 0 and "Example" in out and f"mikoshi {verb}" in " ".join(out.split())


def test_a_dry_run_that_is_refused_shows_what_would_be_done_all_the_same(mikoshi, place):
    before = seen(place)
    code, out, errors = mikoshi("submit", "test.toml", "--on", "./here.toml", "--dry-run", "--nodes", "2")
    assert code == 2 and "mikoshi.launch.controller.head" in out and len(errors) == 1 and "this machine is one" in errors[0]
    code, out, errors = mikoshi(
        "submit", "test.toml", "--on", "./here.toml", "--dry-run", "--set", 'cluster.secrets=["NO_SUCH"]'
    )
    assert code == 2 and "mikoshi.launch.controller.head" in out and "secrets: NO_SUCH" in errors[0]
    assert seen(place) == before


def test_a_run_whose_records_are_damaged_can_be_cancelled(mikoshi, place):
    from mikoshi.launch.config.cluster import LocalCluster
    from mikoshi.launch.runs.record import Request, create_run, new_spec
    from mikoshi.trainer.config.run import load_config

    run = create_run(new_spec(load_config(place / "test.toml"), LocalCluster(kind="local"), place))
    attempt = run.add(Request(nodes=1, min_nodes=1, time=1.0))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as head:
        job = {"kind": "local", "host": socket.gethostname(), "pid": str(head.pid)}
        attempt.write_job({**job, "began": repr(psutil.Process(head.pid).create_time())})
        (attempt.path / "request.json").write_text("{")
        code, out, _ = mikoshi("cancel", "test", "--now")
        assert code == 0 and "request.json: damaged" in out and not psutil.pid_exists(head.pid)
