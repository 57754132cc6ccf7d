"""Which attempt a head leads: its own, another like it when it is started once more, never one that is another's."""

import json
import time

import pytest

from mikoshi.launch.config.cluster import SlurmCluster
from mikoshi.launch.controller.claim import claim_attempt, current_job, folder_from_arguments
from mikoshi.launch.runs.record import Request, Result, Started, Stop, create_run, new_spec
from mikoshi.trainer.errors import LaunchError
from runs import run_config


@pytest.fixture
def run(tmp_path):
    config = run_config(tmp_path / "data", tmp_path / "runs")
    made = create_run(new_spec(config, SlurmCluster(kind="slurm"), tmp_path))
    made.add(Request(nodes=2, min_nodes=2, time=1.0)).write_job({"id": "12"})
    return made


def end(attempt, **fields):
    attempt.write(Started(host="n1", pid=1, began=1.0, nodes=["n1", "n2"], ranks_per_node=1, time=1.0))
    attempt.write(Result(**{"state": "stopped", "code": 75, "why": "a signal", "time": 2.0, **fields}))


def test_an_attempt_that_nobody_has_started_is_led(run):
    assert claim_attempt(run, "12") == run.attempts[0]
    assert len(run.attempts) == 1


def test_a_job_that_is_started_once_more_leads_another_like_it_without_bad_nodes(run):
    end(run.attempts[0], state="failed", bad_nodes=["n2"])
    again = claim_attempt(run, "12")
    assert (again.number, again.request.cause, again.request.bad, again.job) == (2, "requeue", ["n2"], {"id": "12"})
    end(again)  # n2 was used all the same, and was sound
    assert claim_attempt(run, "12").request.bad == []


def test_a_job_of_which_nobody_knows_leads_nothing(run):
    for started in (False, True):
        if started:
            end(run.attempts[0])
        with pytest.raises(LaunchError, match="it is job 12 that leads it: job 7 ends"):
            claim_attempt(run, "7")
    assert len(run.attempts) == 1


def test_what_was_cancelled_stays_so(run):
    run.attempts[0].write(Stop(time=time.time(), by="someone", now=False))
    for started in (False, True):
        if started:
            end(run.attempts[0])
        with pytest.raises(LaunchError, match="someone has cancelled it: `mikoshi resume` goes on"):
            claim_attempt(run, "12")
        assert run.attempts[0].result.state == ("stopped" if started else "cancelled")


def test_a_task_of_a_sweep_finds_its_run_and_the_job_its_name(run, tmp_path, monkeypatch):
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(["/a", str(run.folder.path)]))
    for name, value in {"JOB_ID": "12", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert folder_from_arguments(["--list", str(listed)]) == run.folder.path
    assert current_job(run) == "12_1"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    for content in ("[]", "{", "7"):
        listed.write_text(content)
        with pytest.raises(LaunchError, match="which run this task of a sweep is"):
            folder_from_arguments(["--list", str(listed)])
