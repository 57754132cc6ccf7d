"""`mikoshi chaos`: what it says of each fault is what became of it; and whatever strikes, the run ends as a quiet one does."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mikoshi.launch.chaos.run import _has_reference
from mikoshi.launch.chaos.verdict import Launch, fault_rows
from mikoshi.trainer.chaos.plan import KINDS, Fault, FaultPlan, read_fault_plan, write_fault_plan
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import ConfigError
from mikoshi.trainer.exit_codes import DONE, PREEMPTED
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from runs import run_config

START = {"time": 103.0, "event": "start", "step": 10}


def fault_event(cause, rank=1, at=101.0):
    return {"time": at, "event": "fault", "cause": cause, "rank": rank, "step": 12, "phase": "data", "how": ""}


LIVED = Launch(90.0, 120.0, DONE, 0.1)
KILLED, WENT = Launch(90.0, 100.5, -9, 1.0), Launch(90.0, 101.5, PREEMPTED, 0.1)
STOP, RESUMED = {"time": 101.0, "event": "stop", "step": 13}, {"time": 102.0, "event": "resume", "step": 13}
OLDER = {**RESUMED, "step": 10}
SLOW = {"time": 102.0, "event": "straggler", "rank": 1, "ratio": 2.0}
DIVERGED = {"time": 101.0, "event": "diverged", "step": 15, "ranks": [1]}
FAILED, SAVED = {"time": 101.0, "event": "save-failed", "step": 12}, {"time": 102.0, "event": "save", "step": 13}


@pytest.mark.parametrize(
    ("kind", "events", "launch", "good", "said"),
    [
        ("kill", [fault_event("killed"), START], LIVED, True, "killed: rank 1 named"),
        ("kill", [fault_event("killed", at=102.5), START], LIVED, False, "killed: rank 1 named"),
        ("kill", [fault_event("killed", rank=2), START], LIVED, False, "rank 2 named"),
        ("kill", [fault_event("killed")], LIVED, False, "not started again"),
        ("kill", [START], LIVED, False, "nobody noticed"),
        ("raise", [fault_event("crash"), START], LIVED, True, "crash: rank 1 named"),
        ("raise", [fault_event("killed"), START], LIVED, False, "killed"),
        ("stop", [fault_event("hang"), START], LIVED, True, "hang: rank 1 named, stacks kept"),
        ("stop", [fault_event("lost"), START], LIVED, False, "lost"),
        ("corrupt", [fault_event("killed"), {**OLDER, "refused": ["x: digest"]}, START], LIVED, True, "refused: x: digest"),
        ("corrupt", [fault_event("killed"), {**OLDER, "refused": []}, START], LIVED, False, "from the damaged one"),
        ("corrupt", [fault_event("killed"), RESUMED, START], LIVED, True, "step 10 damaged, resumed after 13"),
        ("slow", [{**SLOW, "step": 32}], LIVED, True, "named 20 steps later, as 2.0 times"),
        ("slow", [{**SLOW, "step": 33}], LIVED, False, "named 21 steps later"),
        ("slow", [{**SLOW, "step": 20, "rank": 3}], LIVED, False, "not named"),
        ("nan", [{"time": 101.0, "event": "retry", "step": 12, "cured": True}], LIVED, True, "it was sound"),
        ("nan", [{"time": 101.0, "event": "retry", "step": 12, "cured": False}], LIVED, False, "nobody noticed"),
        ("nan", [{"time": 101.0, "event": "skip", "step": 12}], LIVED, True, "no rank applied"),
        ("flip", [DIVERGED, START], LIVED, True, "named in step 15: rank 1"),
        ("flip", [{**DIVERGED, "ranks": [0, 2]}, START], LIVED, False, "rank 0, 2"),
        ("flip", [{**SAVED, "time": 100.5}, DIVERGED, START], LIVED, False, "after step 13 was saved"),
        ("fill", [FAILED, SAVED], LIVED, True, "training went on, step 13 was saved"),
        ("fill", [FAILED], LIVED, False, "nothing was saved since"),
        ("fill", [FAILED, fault_event("crash"), SAVED], LIVED, False, "broke off"),
        ("fill", [SAVED], LIVED, False, "went through"),
        ("launcher", [START], KILLED, True, "every rank gone after 1.0 s"),
        ("node", [START], Launch(90.0, 100.5, -9, 5.5), False, "gone after 5.5 s"),
        ("launcher", [START], LIVED, False, "the launcher lives"),
        ("preempt", [STOP, RESUMED, START], WENT, True, "stopped and saved after step 13"),
        ("preempt", [{**STOP, "step": 14}, {**RESUMED, "step": 14}, START], WENT, False, "after step 14"),
        ("preempt", [STOP, {**RESUMED, "step": 10}, START], WENT, False, "resumed after 10"),
        ("preempt", [STOP, RESUMED, START], LIVED, False, "exit code 0"),
    ],
)  # fmt: skip
def test_the_verdict_on_a_fault_is_what_the_record_says(tmp_path, kind, events, launch, good, said):
    (tmp_path / "attempt-0-rank-0.txt").touch()
    later = {"time": 200.0, "event": "start"}  # of the next fault
    plan = FaultPlan((Fault(kind, 12, "data", 1), Fault("kill", 40, "data", 0), Fault("kill", 50, "data", 0)))
    struck = {0: {"time": 100.0, "step_damaged": 10}, 1: {"time": 150.0}}
    row, _, never = fault_rows(plan, struck, [*events, later], [launch], tmp_path)
    assert row.good is good, row
    assert said in row.happened
    assert row.back == (3.0 if START in events else None)
    assert not never.good
    assert "never there" in never.happened


@pytest.mark.parametrize(("older", "good"), [({}, True), ({"step_older": 5}, False)], ids=["the only one", "an older one"])
def test_from_the_beginning_only_where_there_was_no_other_checkpoint(tmp_path, older, good):
    struck = {0: {"time": 100.0, "step_damaged": 10, **older}}
    (row,) = fault_rows(
        FaultPlan((Fault("corrupt", 12, "data", 1),)), struck, [fault_event("killed"), START], [LIVED], tmp_path
    )
    assert row.good is good
    assert ("though step 5 was there" in row.happened) is not good


@pytest.mark.parametrize(("ranks", "known"), [([4], True), ([4, 4], True), ([2], False), ([2, 4], False)], ids=str)
def test_a_quiet_run_is_compared_with_only_if_it_had_as_many_ranks(dataset, tmp_path, ranks, known):
    quiet = run_config(dataset, tmp_path)
    folder = RunFolder(quiet.run.path)
    folder.make()
    folder.config.write_text(to_toml(quiet))
    for number in ranks:
        folder.event("start", step=0, ranks=number)
    folder.event("end", step=10, finished=True)
    if known:
        assert _has_reference(quiet, 4)
    else:
        with pytest.raises(ConfigError, match="was made on 2 ranks, not 4: remove it"):
            _has_reference(quiet, 4)


@pytest.fixture
def config(dataset, tmp_path):
    """Four data ranks which each hold all weights, so that every kind of fault can be."""

    def write(**sections):
        given = {
            "parallel": {"zero": 0}, "checkpoint": {"every": 5}, "recovery": {"silence": 4.0, "backoff": 0.1},
            "guard": {"compare": 5}, "log": {"tensorboard": False}, "eval": {"batches": 1},
        }  # fmt: skip
        sections = {name: {**given.get(name, {}), **sections.get(name, {})} for name in given | sections}
        (tmp_path / "run.toml").write_text(to_toml(run_config(dataset, tmp_path / "runs", **sections)))
        return tmp_path / "run.toml"

    return write


def chaos(config, *arguments, timeout):
    command = [
        sys.executable,
        "-P",
        "-m",
        "mikoshi",
        "chaos",
        str(config),
        "--ranks",
        "4",
        "--json",
        *arguments,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=config.parent, env=env)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def assert_as_promised(config, code, found, told):
    wrong = [(row["fault"], row["happened"], row["noticed"]) for row in found["faults"] if not row["good"]]
    assert not wrong, told
    assert found["code"] == 0
    assert found["left"] == {"processes": [], "files": []}
    assert found["weights_equal"] is True
    assert code == 0
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(config.parent) in " ".join(p.info["cmdline"] or [])]
    assert 0 < found["goodput"]["goodput"] < 1
    assert 0 < found["quiet"]["goodput"] < 1
    records = [r["step"] for r in read_jsonl(config.parent / "runs" / "test-chaos" / "metrics.jsonl") if "loss" in r]
    assert records == list(range(1, records[-1] + 1)), "every step is recorded once"


@pytest.mark.slow
def test_faults_of_eight_kinds_and_the_weights_of_a_quiet_run(config, tmp_path):
    faults = (
        Fault("nan", 4, "reduce", 2),
        Fault("kill", 7, "backward", 3),
        Fault("fill", 10, "save", 1),
        Fault("raise", 15, "update", 0),
        Fault("flip", 19, "data", 1),
        Fault("preempt", 23, "forward", 2, "SIGUSR1"),
        Fault("corrupt", 29, "agree", 1),
        Fault("stop", 34, "forward", 2),
    )
    (tmp_path / "plan.toml").write_text(write_fault_plan(FaultPlan(faults)))
    file = config(train={"steps": 38})
    code, found, told = chaos(file, "--plan", tmp_path / "plan.toml", timeout=200)
    assert_as_promised(file, code, found, told)
    assert len(found["launches"]) == 2
    assert told.count("fault ") >= len(faults)


@pytest.mark.slow
def test_a_rank_killed_in_every_phase(config, tmp_path):
    phases = ("data", "forward", "backward", "reduce", "update", "agree")
    faults = [Fault("kill", 4 + 6 * number, phases[number % 6], number % 4) for number in range(24)]
    faults += [Fault("kill", 150 + 10 * rank, "save", rank) for rank in range(4)]
    faults += [Fault("kill", 0, "load", 2), Fault("kill", 192, "evaluate", 1), Fault("kill", 192, "end", 3)]
    (tmp_path / "plan.toml").write_text(write_fault_plan(FaultPlan(tuple(faults))))
    file = config(train={"steps": 192}, eval={"every": 48, "batches": 1})
    code, found, told = chaos(file, "--plan", tmp_path / "plan.toml", timeout=900)
    assert_as_promised(file, code, found, told)
    assert max(row["noticed"] for row in found["faults"]) <= 2


@pytest.mark.slow
def test_a_slow_rank_is_named(config, tmp_path):
    (tmp_path / "plan.toml").write_text(write_fault_plan(FaultPlan((Fault("slow", 12, "data", 2),))))
    file = config(train={"steps": 50})
    code, found, told = chaos(file, "--plan", tmp_path / "plan.toml", timeout=300)
    assert_as_promised(file, code, found, told)


@pytest.mark.soak
def test_a_soak_of_two_hundred_faults_from_one_seed(config):
    file = config(train={"steps": 2000}, optim={"lr": 1e-3, "schedule": {"warmup": 20}})
    code, found, told = chaos(file, "--faults", "200", "--seed", "1", timeout=3000)
    assert len(found["faults"]) == 200
    assert {row["fault"]["kind"] for row in found["faults"]} == set(KINDS)
    assert_as_promised(file, code, found, told)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ended_half_way_it_leaves_no_process(config, number):
    file = config(train={"steps": 100_000})
    command = [sys.executable, "-P", "-m", "mikoshi", "chaos", str(file), "--kinds", "kill", "--faults", "1"]
    process = subprocess.Popen(
        command, cwd=file.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any("step_seconds" in r for r in read_jsonl(file.parent / "runs" / "test-chaos" / "metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine = {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    assert len(mine) > 5, "the launcher, what ranks are forked from, four ranks"
    process.send_signal(number)
    assert process.wait(30) != 0
    deadline = time.monotonic() + 5
    while left := [p for p in psutil.process_iter(["status"]) if p.pid in mine and p.info["status"] != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_plan_is_written_and_nothing_else_done(config, tmp_path, mikoshi):
    file = config(train={"steps": 300})
    for name in ("one.toml", "two.toml"):
        code, out, errors = mikoshi("chaos", file, "--faults", 12, "--seed", 5, "--write-plan", tmp_path / name)
        assert (code, errors) == (0, [])
    assert "12 faults; use it with --plan" in out
    plan = read_fault_plan(tmp_path / "one.toml", 4)
    assert {fault.kind for fault in plan.faults} == set(KINDS)
    assert plan == read_fault_plan(tmp_path / "two.toml", 4)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kinds", "kill,kil"], "'kil' is none of kill, stop"),
        (["--kinds", "flip", "parallel.zero=2"], '"flip": no two ranks hold the same weights: use parallel.zero=0'),
        (["--kinds", "flip", "guard.compare=0"], '"flip": ranks do not compare their weights: set guard.compare'),
        (["--kinds", "fill", "checkpoint.every=0"], '"fill": the run saves nothing on the way: set checkpoint.every'),
        (["--kinds", "slow", "--ranks", "1"], '"slow": a lone rank has no peers'),
        (["--faults", "100"], "train.steps = 60, checkpoint.every = 5: no room for 100 faults"),
        (["--plan", "no.toml"], "no.toml: cannot be read"),
        (["--plan", "no.toml", "--kinds", "kill"], "the plan has its kinds: leave one out"),
        (["--faults", "2", "--write-plan", "/nosuch/plan.toml"], "cannot be written: No such file or directory"),
        (["parallel.tp=3"], "parallel"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(config, tmp_path, mikoshi, arguments, said):
    code, _, errors = mikoshi("chaos", config(train={"steps": 60}), *arguments)
    assert code == 2
    assert said in errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_there_is_not_touched(config, tmp_path, mikoshi):
    file = config(train={"steps": 60})
    kept = tmp_path / "runs" / "test-chaos" / "mine"
    kept.parent.mkdir(parents=True)
    kept.touch()
    code, _, errors = mikoshi("chaos", file, "--faults", 2, "--kinds", "kill")
    assert code == 2
    assert "test-chaos: exists already: remove it, or give another run.name" in errors[0]
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["test-chaos", "mine"]
