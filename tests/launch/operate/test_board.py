import fcntl
import itertools
import json
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.config.cluster import LocalCluster, SlurmCluster
from mikoshi.launch.config.paths import printable, shell_quoted
from mikoshi.launch.operate import board
from mikoshi.launch.operate.board import all_runs, folder_of, survey_run, survey_runs
from mikoshi.launch.operate.board_text import advice, aligned, as_json, describe_event, elapsed, run_page, runs_table
from mikoshi.launch.operate.status import FINAL, LIVENESS_TIMEOUT, Records, is_locked, state_of, state_of_plain
from mikoshi.launch.runs.record import Request, Result, Started, Status, Stop, create_run, new_spec
from mikoshi.launch.runs.tails import last_records, start_of_last
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import LaunchError
from runs import TINY_MODEL

NOW = 1_000_000.0
REQUEST = Request(nodes=2, min_nodes=1, time=NOW - 500)


def config(folder, name="test", steps=100):
    return RunConfig.model_validate(
        {"run": {"name": name, "folder": folder}, "model": TINY_MODEL, "data": {"path": "x"},
         "train": {"steps": steps, "global_batch": 8, "context": 64}}
    )  # fmt: skip


def submitted(folder, name="test", cluster=None, job=None):
    run = create_run(new_spec(config(folder, name), cluster or LocalCluster(kind="local"), folder))
    attempt = run.add(REQUEST)
    if job:
        attempt.write_job(job)
    return run, attempt


def started(age=100.0):
    return Started(host="h", pid=1, began=1.0, nodes=["n1", "n2"], ranks_per_node=2, time=NOW - age)


def status(age=1.0, phase="running"):
    return Status(time=NOW - age, phase=phase, nodes=["n1", "n2"])


def result(state="done", **more):
    return Result(state=state, code=0, why="because", time=NOW, **more)


STOP, STOP_NOW = Stop(time=NOW, by="me", now=False), Stop(time=NOW, by="me", now=True)
AFTER = {"started": started(), "status": status()}
QUEUED, RUNNING, ENDED, UNKNOWN = (JobState(state) for state in ("queued", "running", "ended", "unknown"))

TABLE = [
    # what the folder has, what the scheduler says, the state
    ({}, None, "queued"),
    ({}, UNKNOWN, "queued"),
    ({}, QUEUED, "queued"),
    ({}, RUNNING, "starting"),
    ({}, ENDED, "lost"),
    ({"stop": STOP}, ENDED, "cancelled"),
    ({"stop": STOP}, RUNNING, "stopping"),
    ({"started": started(5)}, None, "starting"),
    ({"started": started(LIVENESS_TIMEOUT + 5)}, None, "lost"),
    ({"started": started(LIVENESS_TIMEOUT + 5)}, RUNNING, "starting"),
    ({"started": started()}, QUEUED, "requeued"),
    ({"started": started()}, ENDED, "lost"),
    ({"started": started(), "status": status(phase="starting")}, RUNNING, "starting"),
    ({"started": started(), "status": status(phase="starting")}, None, "starting"),
    (AFTER, None, "running"),
    (AFTER, UNKNOWN, "running"),
    (AFTER, RUNNING, "running"),
    (AFTER, QUEUED, "requeued"),
    (AFTER, ENDED, "lost"),
    ({"started": started(), "status": status(LIVENESS_TIMEOUT + 1)}, None, "lost"),
    ({"started": started(), "status": status(LIVENESS_TIMEOUT + 1)}, UNKNOWN, "lost"),
    ({"started": started(), "status": status(LIVENESS_TIMEOUT + 1)}, RUNNING, "running"),
    ({"started": started(), "status": status(phase="stopping")}, RUNNING, "stopping"),
    ({**AFTER, "stop": STOP}, RUNNING, "stopping"),
    ({**AFTER, "stop": STOP}, None, "stopping"),
    ({**AFTER, "stop": STOP}, ENDED, "cancelled"),
    ({**AFTER, "stop": STOP_NOW}, ENDED, "cancelled"),
    ({**AFTER, "result": result("stopped", next="requeued")}, QUEUED, "requeued"),
    ({**AFTER, "result": result("stopped", next="requeued")}, RUNNING, "requeued"),
    ({**AFTER, "result": result("stopped", next="requeued")}, None, "requeued"),
    ({**AFTER, "result": result("stopped", next="requeued")}, ENDED, "stopped"),
    ({**AFTER, "result": result("failed", next="requeued")}, ENDED, "failed"),
    ({**AFTER, "result": result("stopped", next="requeued"), "stop": STOP}, ENDED, "cancelled"),
]


@pytest.mark.parametrize(("left", "said", "state"), TABLE)
def test_a_state_follows_from_the_folder_and_the_scheduler(left, said, state):
    assert state_of(Records(1, REQUEST, {"id": "7"}, **left), said, NOW)[0] == state


@pytest.mark.parametrize("said", [None, QUEUED, RUNNING, ENDED, UNKNOWN])
@pytest.mark.parametrize(
    ("ended", "state"),
    [("done", "done"), ("cancelled", "cancelled"), ("stopped", "stopped"), ("failed", "failed"), ("refused", "failed")],
)
def test_a_result_is_the_last_word_whatever_the_scheduler_says(ended, state, said):
    for stop, alive in itertools.product((None, STOP), ({}, AFTER)):
        records = Records(1, REQUEST, {}, stop=stop, result=result(ended), **alive)
        assert state_of(records, said, NOW) == (state, "because")


def test_every_combination_has_a_state():
    for begun, seen, stop, end, said in itertools.product(
        (None, started()), (None, status(), status(LIVENESS_TIMEOUT + 9)), (None, STOP, STOP_NOW),
        (None, result(), result("stopped", next="requeued")), (None, QUEUED, RUNNING, ENDED, UNKNOWN),
    ):  # fmt: skip
        state, why = state_of(Records(1, REQUEST, {}, begun, seen, stop, end), said, NOW)
        assert state and isinstance(why, str)
    assert state_of(None, None, NOW)[0] == "lost"


def test_the_schedulers_own_words_are_told():
    assert state_of(Records(1, REQUEST, {}), JobState("queued", "Resources"), NOW) == ("queued", "Resources")
    assert "OOMKilled" in state_of(Records(1, REQUEST, {}, **AFTER), JobState("ended", "OOMKilled"), NOW)[1]


def test_of_pods_with_a_disk_of_their_own_no_progress_is_known():
    state, why = state_of(Records(1, REQUEST, {"kind": "kubernetes"}), RUNNING, NOW)
    assert state == "running" and "on the cluster's disk" in why
    assert state_of(Records(1, REQUEST, {"kind": "kubernetes"}, stop=STOP), RUNNING, NOW)[0] == "stopping"


@pytest.mark.parametrize(("why", "state"), [("Completed", "done"), ("OOMKilled", "failed"), ("its JobSet is deleted", "lost")])
def test_of_pods_with_a_disk_of_their_own_kubernetes_alone_can_tell(why, state):
    assert state_of(Records(1, REQUEST, {"kind": "kubernetes"}), JobState("ended", why), NOW)[0] == state


@pytest.mark.parametrize(
    ("events", "lock", "state"),
    [
        (["start"], True, "running"), (["start", "stop"], True, "stopping"), (["start", "restart"], True, "starting"),
        (["start", "restart"], False, "starting"), (["start", "fault"], False, "failed"), (["start", "save"], False, "lost"),
        ([], False, "lost"),
    ],
)  # fmt: skip
def test_a_run_that_train_started_has_its_state_from_its_lock_and_events(events, lock, state):
    assert state_of_plain(lock, [{"event": kind, "time": NOW - 1} for kind in events], NOW)[0] == state
    for finished, ended in ((True, "done"), (False, "stopped")):
        assert state_of_plain(False, [{"event": "end", "finished": finished}], NOW)[0] == ended


def write_logs(run, step, steps_each=1.0):
    lines = [
        {"step": n, "time": NOW - step + n, "loss": 5.0 - n / 100, "tokens": 512, "step_seconds": steps_each}
        for n in range(1, step + 1)
    ]
    run.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo')
    run.folder.event("save", step=step - 1, path="x")


def here(pid):
    import psutil

    return {"kind": "local", "host": socket.gethostname(), "pid": str(pid), "began": repr(psutil.Process(pid).create_time())}


def test_a_row_tells_how_far_a_run_is_and_how_fast(tmp_path):
    run, attempt = submitted(tmp_path, job=here(os.getpid()))
    attempt.write(started())
    attempt.write(Status(time=NOW, phase="running", nodes=["n1"], lost=["n2"], restarts=3))
    write_logs(run, step=40, steps_each=0.5)
    row, notes = survey_run(run.folder.path, NOW + 10)
    assert (row.state, row.step, row.steps, row.checkpoint, row.restarts) == ("running", 40, 100, 39, 3)
    assert (
        row.loss == pytest.approx(4.6)
        and row.tokens_per_second == pytest.approx(1024)
        and row.seconds_left == pytest.approx(30)
    )
    assert (row.nodes, row.lost, row.asked, notes) == (("n1",), ("n2",), 2, ())
    told = {name: text for name, text in run_page(row, [], NOW + 10) if name}
    assert "lost: n2" in told["nodes"] and "40/100" in told["step"] and told["checkpoint"] == "step 39"


@pytest.mark.parametrize("finished", [False, True])
def test_the_loss_of_a_row_is_that_of_the_last_step_that_predicted_a_token(tmp_path, finished):
    run, _ = submitted(tmp_path)
    steps = [{"step": n, "time": NOW, "loss": None if n > 5 else 9.0 - n, "tokens": 64 * (n < 6), "computed_tokens": 64,
              "step_seconds": 1.0} for n in range(1, 21)]  # fmt: skip
    run.folder.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    if finished:
        run.folder.event("end", step=20, finished=True)
    row, _ = survey_run(run.folder.path, NOW + 10)
    assert (row.step, row.loss) == (20, 4.0)


class Counting:
    """A scheduler that counts the questions."""

    def __init__(self, state="running", error=None):
        self.questions, self.state, self.error = [], state, error

    def query(self, jobs):
        self.questions.append(len(jobs))
        if self.error:
            raise LaunchError(self.error)
        return [JobState(self.state, "Priority") for _ in jobs]


def test_a_scheduler_is_asked_one_question_for_all_runs_that_are_not_over(tmp_path, monkeypatch):
    one, other = SlurmCluster(kind="slurm", partition="a"), SlurmCluster(kind="slurm", partition="b", time="1:00:00")
    for n in range(20):
        _, attempt = submitted(tmp_path, f"run-{n}", other if n % 2 else one, {"id": str(n)})
        if n >= 15:
            attempt.write(result())
    scheduler = Counting("queued")
    monkeypatch.setattr(board, "open_backend", lambda _: scheduler)
    found = survey_runs(all_runs(tmp_path), NOW)
    assert scheduler.questions == [15]
    assert sorted(row.state for row in found.rows) == ["done"] * 5 + ["queued"] * 15
    assert [row.created for row in found.rows] == sorted((row.created for row in found.rows), reverse=True)


def test_without_the_scheduler_the_folder_tells_what_it_knows(tmp_path, monkeypatch):
    run, attempt = submitted(tmp_path, cluster=SlurmCluster(kind="slurm"), job={"id": "7"})
    attempt.write(started())
    attempt.write(status(3))
    monkeypatch.setattr(board, "open_backend", lambda _: Counting(error="squeue: no controller answers"))
    row, notes = survey_run(run.folder.path, NOW)
    assert row.state == "running" and len(notes) == 1
    assert "no controller answers" in notes[0] and "folder knows" in notes[0]


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path):
    submitted(tmp_path, "good")[1].write(result())
    newer, _ = submitted(tmp_path, "newer")
    spec = newer.folder.path / "spec.json"
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "format": 99, "mikoshi": "9.9"}))
    submitted(tmp_path, "bad")[1].path.joinpath("result.json").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "spec.json").write_bytes(b"\xff\x00")
    (tmp_path / "no-run").mkdir()
    found = survey_runs(all_runs(tmp_path), NOW)
    assert [row.name for row in found.rows] == ["good"]
    assert len(found.notes) == 3 and all("\n" not in note for note in found.notes)
    assert any("format 99 of Mikoshi 9.9" in note for note in found.notes)
    with pytest.raises(LaunchError, match="format 99"):
        survey_run(newer.folder.path, NOW)


def test_a_plain_run_is_on_the_board_too(tmp_path):
    from mikoshi.trainer.config.run import to_toml

    path = tmp_path / "plain"
    path.mkdir()
    (path / "config.toml").write_text(to_toml(config(tmp_path, "plain", steps=37)))
    assert survey_run(path, NOW)[0].steps == 37
    with (path / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_locked(path)
        assert survey_run(path, NOW)[0].state == "running"
    assert not is_locked(path)
    (path / "events.jsonl").write_text('{"time": 1, "event": "end", "step": 37, "finished": true}\n')
    row, _ = survey_run(path, NOW)
    assert (row.state, row.cluster, row.step) == ("done", "", 37)


def test_a_run_is_found_by_its_folder_or_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    submitted(tmp_path / "runs", "mine")
    assert folder_of(tmp_path / "runs" / "mine") == tmp_path / "runs" / "mine"
    assert str(folder_of(type(tmp_path)("mine"))) == "runs/mine"
    with pytest.raises(LaunchError, match="mikoshi runs"):
        folder_of(type(tmp_path)("other"))


def test_tables_and_pages_hold_nothing_that_moves_the_cursor(tmp_path):
    run, attempt = submitted(tmp_path, "a", job={"id": "7"})
    (run.folder.path / "sweep.json").write_text(json.dumps({"x": "1\x1b[2J\n2"}))
    attempt.write(Result(state="failed", code=1, why="line\r\nline\x1b[0m", time=NOW))
    row, _ = survey_run(run.folder.path, NOW)
    lines = [*aligned(runs_table([row], NOW)), *(text for _, text in run_page(row, [{"event": "fault\x1b", "how": "\n"}], NOW))]
    assert all(sign.isprintable() for line in lines for sign in line)
    assert json.loads(json.dumps(as_json(row, (), []), allow_nan=False))["state"] == "failed"


def test_every_state_comes_with_a_way_on(tmp_path):
    row, _ = survey_run(submitted(tmp_path, "a")[0].folder.path, NOW)
    for state in (*FINAL, "queued", "starting", "running", "stopping", "requeued"):
        lines = advice(type(row)(**{**row.__dict__, "state": state, "cluster": "local"}))
        assert lines and all("mikoshi" in line for line in lines)


def test_a_run_begun_with_weights_has_a_checkpoint_and_a_command_that_goes_on(tmp_path):
    folder = submitted(tmp_path, "a")[0].folder
    folder.event("import", step=0, source="weights")
    row, _ = survey_run(folder.path, NOW)
    assert row.checkpoint == 0
    alone = advice(type(row)(**{**row.__dict__, "state": "stopped", "cluster": ""}))
    assert alone == [f"mikoshi train {row.path}   # goes on from step 0, with the --ranks you like"]


def test_events_are_told_in_words():
    assert describe_event({"time": 1, "event": "save", "step": 30, "path": "x"}) == "saved step 30"
    assert describe_event({"event": "fault", "rank": 2, "how": "was killed", "step": 5}) == "rank 2 was killed at step 5"
    assert describe_event({"time": 1, "event": "node-lost", "node": "n3"}) == "node-lost node=n3"
    assert describe_event({"event": "nodes", "nodes": ["n1"], "lost": {"n2": "no word"}, "attempt": 1}) == "nodes: n1; lost: n2"
    assert describe_event({"event": "save"}) == "save"
    assert describe_event({"event": "empty", "step": 4, "positions": [3, 4]}) == "step 4 changed nothing: no token is predicted"
    why = "nothing is predicted, or it is not finite"
    assert describe_event({"event": "eval", "step": 4, "loss": None}) == f"no held-out loss at step 4: {why}"
    assert describe_event({"event": "eval", "step": 4, "loss": 2.5}) == "held-out loss 2.5000 at step 4"
    assert (elapsed(NOW - 5, NOW), elapsed(NOW - 600, NOW), elapsed(NOW - 7200, NOW), elapsed(None, NOW)) == (
        "5 s",
        "10 min",
        "2 h",
        "",
    )


def bytes_read():
    """By this process so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_the_end_of_a_long_log_is_read_without_the_rest(tmp_path):
    log = tmp_path / "log.jsonl"
    with log.open("w") as out:
        out.writelines(json.dumps({"step": n, "pad": "x" * 200}) + "\n" for n in range(200_000))
    before = bytes_read()
    assert [record["step"] for record in last_records(log, 3)] == [199_997, 199_998, 199_999]
    assert bytes_read() - before < log.stat().st_size / 20
    assert last_records(tmp_path / "none", 3) == []


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.binary(max_size=40), max_size=30).map(b"\n".join), lines=st.integers(0, 12))
def test_the_last_lines_begin_where_they_do(tmp_path_factory, text, lines):
    file = tmp_path_factory.mktemp("tail") / "log"
    file.write_bytes(text)
    plain = text.split(b"\n")
    whole = [line + b"\n" for line in plain[:-1]] + ([plain[-1]] if plain[-1] else [])
    assert text[start_of_last(file, lines) :] == b"".join(whole[max(0, len(whole) - lines) :])


def test_a_damaged_sign_of_life_hides_nothing(tmp_path):
    run, attempt = submitted(tmp_path, job=here(os.getpid()))
    attempt.write(started())
    (attempt.path / "status.json").write_text("{")
    row, notes = survey_run(run.folder.path, NOW)
    assert (row.state, notes) == ("starting", ())
    (attempt.path / "result.json").write_text("[]")
    with pytest.raises(LaunchError, match=r"result.json: damaged: Input should be an object; remove it$"):
        survey_run(run.folder.path, NOW)


def test_a_job_whose_name_is_damaged_is_told(tmp_path):
    run, attempt = submitted(tmp_path, cluster=SlurmCluster(kind="slurm"))
    (attempt.path / "job.json").write_text("{")
    row, notes = survey_run(run.folder.path, NOW)
    assert row.state == "queued" and len(notes) == 1 and "job.json: damaged" in notes[0]


def test_a_head_on_this_machine_is_found_by_its_own_record_too(tmp_path):
    run, attempt = submitted(tmp_path)
    job = here(os.getpid())
    own = {"host": job["host"], "pid": int(job["pid"]), "began": float(job["began"])}
    attempt.write(started().model_copy(update=own))
    for text in (None, "{"):
        if text:
            (attempt.path / "job.json").write_text(text)
        row, notes = survey_run(run.folder.path, NOW + 1000)
        assert (row.state, row.job, notes) == ("starting", f"process {os.getpid()} on {job['host']}", ())


def test_a_job_that_never_came_to_start_is_told_with_its_last_words(tmp_path, monkeypatch):
    run, _ = submitted(tmp_path, cluster=SlurmCluster(kind="slurm"), job={"id": "7"})
    (run.folder.path / "slurm-7.out").write_text("starting\n/no/python: not found\n\n")
    monkeypatch.setattr(board, "open_backend", lambda _: Counting("ended"))
    row, _ = survey_run(run.folder.path, NOW)
    assert row.state == "lost" and row.why.endswith("its last words: /no/python: not found")


@pytest.mark.parametrize("name", ["plain", "d $(touch PWN)", "it's", "-x", "a\nb", "a\\'\n7", "ü\udcff\x1b"])
def test_a_printed_command_names_its_folder_and_does_no_more(name):
    import subprocess

    command = f"printf %s {shell_quoted(name)}"
    done = subprocess.run(["bash", "-c", command.encode("utf-8", "surrogateescape")], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape").removeprefix("./") == name
    assert command.isprintable() and printable(name).isprintable()
