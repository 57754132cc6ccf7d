"""Ranks that are killed, stopped, broken, hung and asked to stop, for real: what becomes of the run; nothing is left."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

import rankwork
from mikoshi.launch.controller.supervisor import Job, running_fork_server, supervise
from mikoshi.launch.host import private_folder as private_folders
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.exit_codes import DONE, FAULT, HANG, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import RunFolder, read_jsonl
from mikoshi.trainer.signals import STOP_SIGNALS


@pytest.fixture(scope="module", autouse=True)
def _one_forkserver():
    with running_fork_server(4):
        yield


@pytest.fixture(autouse=True)
def _in_the_foreground():
    """However the tests are run: under nohup, and with & in a script, some signals are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory() as temporary:  # not in tmp_path: a socket's path is short
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        monkeypatch.setattr(private_folders, "_MEMORY", Path(temporary))
        yield RunFolder(tmp_path)
        assert not list(Path(temporary).iterdir()), "no file is left behind"
    assert not [note["pid"] for note in notes(RunFolder(tmp_path)) if running(note["pid"])], "no rank is left behind"


def train(folder, steps, faults=(), silence=5.0, every=0, pace=0.0, ranks=4, **policy):
    policy = RecoverySection(silence=silence, **policy)
    return supervise(Job(ranks, rankwork.train, (str(folder.path), steps, faults, silence, every, pace), folder, policy))


def notes(folder):
    return read_jsonl(folder.path / "notes.jsonl")


def events(folder, kind):
    return [event for event in read_jsonl(folder.events) if event["event"] == kind]


def running(pid):
    try:
        return psutil.Process(pid).name().startswith("mikoshi-rank")
    except psutil.NoSuchProcess:
        return False


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


class Meanwhile(threading.Thread):
    """Does something beside a run that goes on; what it finds wrong is raised at the end."""

    def __init__(self, do):
        super().__init__()
        self.do, self.wrong, self.result = do, None, None

    def run(self):
        try:
            self.result = self.do()
        except BaseException as error:
            self.wrong = error
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.join()
        if self.wrong:
            raise self.wrong


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ((0, 0), DONE), ((75, 75), PREEMPTED), ((75, -15), PREEMPTED), ((-15, -15), PREEMPTED), ((-10, -12), PREEMPTED),
        ((2, 2), USER_ERROR), ((2, -15), USER_ERROR), ((1, -15), FAULT), ((0, 1), FAULT), ((-9, 75), FAULT), ((130, -2), FAULT),
        ((76, 76), FAULT), ((78, 78), FAULT), ((-11, 76), FAULT), ((75, 76), PREEMPTED), ((76, -15), PREEMPTED),
    ],
)  # fmt: skip
def test_the_runs_exit_code(codes, outcome):
    assert supervise(Job(2, rankwork.returns, (codes,))) == outcome


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ((0, 0), ""), ((2, 2), ""), ((0, 2), "error: rank 1 says\n"),
        ((76, -9), "error: rank 1 was killed (SIGKILL) before its first step, in start; the other ranks were ended\n"),
        ((1, 0), "error: rank 0 ended with exit code 1 before its first step, in start; the other ranks were ended\n"),
    ],
)  # fmt: skip
def test_who_ended_it_is_said_once(codes, said, capsys):
    supervise(Job(2, rankwork.returns, (codes,)))
    assert capsys.readouterr().err == said


def test_killed_ranks_are_back_at_once_whichever_and_wherever(folder, capsys):
    struck_at = [(5, "forward", 0), (9, "reduce", 1), (13, "save", 2), (17, "agree", 3), (19, "data", 0)]
    faults = [(attempt, *where, 9) for attempt, where in enumerate(struck_at)]
    assert train(folder, 20, faults, every=1) == DONE
    struck, told = [note for note in notes(folder) if "fault" in note], events(folder, "fault")
    assert [(e["cause"], e["rank"], e["step"], e["phase"]) for e in told] == [("killed", f[2], f[0], f[1]) for f in struck_at]
    assert all(event["time"] - note["time"] < 2 for event, note in zip(told, struck, strict=True)), "noticed in 2 s"
    assert [event["number"] for event in events(folder, "restart")] == [1, 2, 3, 4, 5]
    back = [note for note in notes(folder) if "start" in note and note["rank"] == 0]
    starts = [note["start"] for note in back]
    assert starts[3] in (12, 13), "rank 0 may or may not have saved when rank 2 dies"
    assert [*starts[:3], *starts[4:]] == [0, 4, 8, 16, 18], "each goes on from the newest save"
    took = [new["time"] - note["time"] for new, note in zip(back[1:], struck, strict=True)]
    assert max(took) < 5, took
    assert "rank 0 was killed (SIGKILL) at step 5, in forward; restart 1 of 8 now" in capsys.readouterr().err


def test_the_same_error_at_the_same_step_ends_the_run_as_a_bug(folder, capfd):
    assert train(folder, 20, [(None, 7, "reduce", 2, "the fault of rank two")], backoff=0) == FAULT
    err = capfd.readouterr().err
    assert "error: rank 2 ended with exit code 1 (RuntimeError: the fault of rank two) at step 7, in reduce" in err
    assert err.endswith(
        "step 7 failed twice with RuntimeError: the fault of rank two: this is a bug, not a fault of a machine\n"
    )
    assert [event["cause"] for event in events(folder, "fault")] == ["crash", "crash"]
    assert len(events(folder, "restart")) == 1


def test_restarts_come_to_an_end_without_progress(folder, capsys):
    assert train(folder, 20, [(None, 7, "reduce", 1, 9)], restarts=2, backoff=0.2) == FAULT
    assert [event["pause"] for event in events(folder, "restart")] == [0, 0.2]
    assert "recovery.restarts = 2: used up for this cause" in capsys.readouterr().err


def test_a_stopped_rank_is_named_its_stack_kept_and_all_start_again(folder, capsys):
    assert train(folder, 40, [(0, 20, "forward", 2, signal.SIGSTOP)], silence=1.5, every=5) == DONE
    (fault,) = events(folder, "fault")
    assert (fault["cause"], fault["rank"], fault["step"], fault["phase"]) == ("hang", 2, 20, "forward")
    stacks = {path.name: path.read_text() for path in folder.stacks.iterdir()}
    assert sorted(stacks) == [f"attempt-0-rank-{rank}.txt" for rank in range(4)]
    assert "_strike" in stacks["attempt-0-rank-2.txt"]
    assert all("in train" in text for text in stacks.values())
    err = capsys.readouterr().err
    assert "rank 2 is stopped (SIGSTOP, or a debugger): no sign of life for" in err
    assert str(folder.stacks) in err


def test_a_rank_that_sleeps_is_told_from_those_that_wait_for_it(folder):
    (folder.path / "hang-1").write_text("20")
    assert train(folder, 40, silence=1.5, every=5) == DONE
    (fault,) = events(folder, "fault")
    assert (fault["cause"], fault["rank"], fault["step"], fault["phase"]) == ("hang", 1, 20, "forward")
    assert "held_up_here" in (folder.stacks / "attempt-0-rank-1.txt").read_text()
    assert "held_up_here" not in (folder.stacks / "attempt-0-rank-0.txt").read_text()


def test_a_run_that_hangs_for_good_has_its_own_exit_code(folder):
    assert train(folder, 40, [(None, 5, "forward", 0, signal.SIGSTOP)], silence=1.0, restarts=0, ranks=2) == HANG


def test_steps_slower_than_the_silence_from_the_first_one_on_raise_no_alarm(folder):
    assert train(folder, 12, silence=0.05, pace=0.25, ranks=2) == DONE
    assert not events(folder, "fault")


def test_a_thousand_steps_raise_no_alarm(folder):
    assert train(folder, 1000, ranks=2) == DONE
    assert not events(folder, "fault")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_reaches_every_rank_and_the_run_stops_saved(folder, number):
    with Meanwhile(lambda: (until(lambda: len(notes(folder)) == 4), os.kill(os.getpid(), number))):
        assert train(folder, 10**6) == PREEMPTED
    stopped = [note for note in notes(folder) if "stopped" in note]
    assert sorted(note["rank"] for note in stopped) == [0, 1, 2, 3]
    assert any(number in note["asked"] for note in stopped)
    assert {note["stopped"] for note in stopped} == {int((folder.path / "saved").read_text())}


def test_a_terminal_that_goes_is_nothing_to_a_run_under_nohup(folder):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def stop():
        until(lambda: len(notes(folder)) == 2)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    with Meanwhile(stop):
        assert train(folder, 10**6, ranks=2) == PREEMPTED
    asked = {number for note in notes(folder) for number in note.get("asked", [])}
    assert asked == {signal.SIGTERM}
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_rank_that_is_stopped_at_its_start_keeps_nobody_waiting():
    begun = time.monotonic()
    assert supervise(Job(2, rankwork.waits_for_the_other)) == PREEMPTED
    assert time.monotonic() - begun < 120, "not the ten minutes that it would have waited"


@pytest.mark.parametrize("late", [0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_a_stop_that_comes_while_ranks_start_is_not_lost(folder, late):
    before = signal.getsignal(signal.SIGUSR1)

    def stop():
        until(lambda: signal.getsignal(signal.SIGUSR1) is not before)
        time.sleep(late)  # not to wait for anything: to hit another moment each time
        os.kill(os.getpid(), signal.SIGUSR1)

    with Meanwhile(stop):
        assert train(folder, 10**6) == PREEMPTED


def test_the_second_ctrl_c_ends_at_once(folder, capsys):
    def stop():
        until(lambda: len(notes(folder)) == 2)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # else the two become one

    with Meanwhile(stop):
        assert supervise(Job(2, rankwork.deaf, (str(folder.path),), folder)) == FAULT
    assert "second Ctrl-C" in capsys.readouterr().err


def test_a_rank_that_does_not_stop_is_killed_at_the_end_of_the_grace(folder, capsys):
    policy = RecoverySection(grace=0.5)
    with Meanwhile(lambda: (until(lambda: len(notes(folder)) == 2), os.kill(os.getpid(), signal.SIGTERM))):
        assert supervise(Job(2, rankwork.deaf, (str(folder.path),), folder, policy)) == FAULT
    assert "error: rank 0, 1: not ended 0.5 s after a signal to stop (recovery.grace): killed" in capsys.readouterr().err


def test_a_stop_in_a_pause_ends_the_run_which_is_on_disk(folder):
    with Meanwhile(lambda: (until(lambda: len(events(folder, "restart")) == 2), os.kill(os.getpid(), signal.SIGTERM))):
        assert train(folder, 20, [(None, 7, "reduce", 1, 9)], backoff=60, ranks=2) == PREEMPTED
    assert [event["pause"] for event in events(folder, "restart")] == [0, 60]


@pytest.mark.parametrize(
    ("phase", "what", "code", "said"),
    [
        ("save", 9, FAULT, "the newest checkpoint is what there is"),
        ("end", 9, PREEMPTED, " is saved\n"),
        ("end", "a fault at the end", PREEMPTED, " is saved\n"),
    ],
)
def test_a_fault_while_stopping_starts_nothing_again_and_only_what_is_saved_is_called_so(
    folder, capfd, phase, what, code, said
):  # fmt: skip
    for kind in ("save", "stop"):
        folder.event(kind, step=7)  # of an earlier command
    with Meanwhile(lambda: (until(lambda: len(notes(folder)) == 2), os.kill(os.getpid(), signal.SIGTERM))):
        assert train(folder, 10**6, [(None, "any", phase, 1, what)], silence=1.0, ranks=2) == code
    assert not events(folder, "restart")
    assert len(events(folder, "fault")) == 1
    (told,) = [line for line in capfd.readouterr().err.splitlines(True) if "after a signal to stop" in line]
    assert said in told


@pytest.mark.parametrize(("step", "code"), [(0, PREEMPTED), (1, FAULT)])
def test_a_rank_killed_while_a_run_stops_loses_nothing_before_its_first_step(folder, capsys, step, code):
    assert supervise(Job(1, rankwork.asks_then_dies, (step,), folder, RecoverySection())) == code
    assert "was killed (SIGKILL)" in capsys.readouterr().err
    assert not events(folder, "restart")


def test_saves_after_a_run_has_gone_back_are_progress(folder):
    folder.event("save", step=1000)  # of a history that is left, or of a checkpoint that was found damaged
    faults = [(attempt, 5 * attempt + 7, "forward", 1, 9) for attempt in range(4)]
    assert train(folder, 30, faults, every=5, restarts=1, backoff=0, ranks=2) == DONE
    assert [event["pause"] for event in events(folder, "restart")] == [0] * 4


def test_an_outage_that_a_restart_meets_is_waited_for(folder, capfd):
    policy = RecoverySection(restarts=3, backoff=0.1)
    assert supervise(Job(2, rankwork.dies_then_is_refused, (str(folder.path), 2), folder, policy)) == DONE
    assert [(e["cause"], e["rank"]) for e in events(folder, "fault")[1:]] == [("crash", 1)] * 2
    assert [event["pause"] for event in events(folder, "restart")] == [0, 0.1, 0.2]
    assert "rank 1 ended with exit code 2 (disk: No space left on device)" in capfd.readouterr().err


def test_an_outage_that_does_not_end_is_the_users_to_mend(folder, capfd):
    policy = RecoverySection(restarts=2, backoff=0)
    assert supervise(Job(2, rankwork.dies_then_is_refused, (str(folder.path), 99), folder, policy)) == USER_ERROR
    assert len(events(folder, "fault")) == 4
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: rank 1 ended with exit code 2 (disk: No space left on device)")
    assert "recovery.restarts = 2: used up" in last


def test_ranks_listen_on_the_loopback_interface_alone(folder):
    def listening():
        pids = [note["pid"] for note in until(lambda: len(notes(folder)) == 4 and notes(folder))]
        found = [
            c.laddr.ip for pid in [*pids, os.getpid()] for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"
        ]
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    with Meanwhile(listening) as seen:
        assert train(folder, 10**6) == PREEMPTED
    assert len(seen.result) >= 5, "the store and a port of gloo for each rank"
    assert {ip.removeprefix("::ffff:") for ip in seen.result} == {"127.0.0.1"}


def test_where_a_rank_finds_itself(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    monkeypatch.setenv("MIKOSHI_TEST", "here")
    assert supervise(Job(2, rankwork.place, (str(folder.path),))) == DONE
    for note in notes(folder):
        env, rank = note["env"], str(note["rank"])
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (rank, rank, "2", "2")
        assert (env["MASTER_ADDR"], env["TORCHELASTIC_USE_AGENT_STORE"]) == ("127.0.0.1", "True")
        assert (env["MIKOSHI_TEST"], env["MIKOSHI_SUPERVISOR"], note["cwd"]) == ("here", str(os.getpid()), str(folder.path))
        assert "PYTHONSAFEPATH" not in env or "PYTHONSAFEPATH" in os.environ
        assert note["comm"] == f"mikoshi-rank{rank}"
        assert note["session"] == note["parent"] != os.getsid(0), "a terminal's Ctrl-C goes to the supervisor alone"
        assert (note["cuda"], note["main"], note["blocked"], note["handlers"]) == (False, False, [], [True] * len(STOP_SIGNALS))


def test_the_ranks_outlive_what_they_are_forked_from_by_no_second_and_come_back(folder):
    def kill():
        pids = [note["pid"] for note in until(lambda: len(notes(folder)) == 2 and notes(folder))]
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        until(lambda: not any(running(pid) for pid in pids), 5)
        until(lambda: len(notes(folder)) == 4)
        os.kill(os.getpid(), signal.SIGTERM)

    with Meanwhile(kill):
        assert train(folder, 10**6, ranks=2) == PREEMPTED
    assert [event["cause"] for event in events(folder, "fault")] == ["killed"]


SHADOW = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\nraise SystemExit('not ours')\n"
PROGRAM = """
import os, sys
from pathlib import Path
sys.path.append({support!r})
from mikoshi.launch.host import private_folder as private_folders
private_folders._MEMORY = Path({temporary!r})  # where no other run looks for what a killed one has left
from mikoshi.launch.controller.supervisor import Job, supervise
from mikoshi.trainer.record.run_folder import RunFolder
import rankwork
rerun = print("ran as", __name__, flush=True)
sys.exit(supervise(Job(2, rankwork.train, ({folder!r}, 10**6), RunFolder(Path({folder!r})))))
"""


def test_no_rank_outlives_its_supervisor_and_the_users_folder_is_not_ours(folder):
    here = folder.path / "cwd"
    for name in ("data", "trainer", "parallel", "launch", "mikoshi"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text(SHADOW)
    program = folder.path / "program.py"
    names = {"support": str(Path(rankwork.__file__).parent), "folder": str(folder.path), "temporary": tempfile.gettempdir()}
    program.write_text(PROGRAM.format(**names))
    command, env = [sys.executable, str(program)], os.environ | {"TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True, env=env) as process:
        pids = [note["pid"] for note in until(lambda: len(notes(folder)) == 2 and notes(folder), 120)]
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert set(pids) < set(family)
        process.kill()
        until(lambda: not any(psutil.pid_exists(pid) for pid in family), 5)
        assert process.stdout.read() == "ran as __main__\n", "the program is not run once more in each rank"
    left = list(Path(tempfile.gettempdir()).iterdir())
    assert len(left) == 2
    assert all(path.name.startswith(f"mikoshi-ranks-{process.pid}-") for path in left)
    assert not list(here.glob("*/imported"))
    for path in left:
        os.utime(path, (0, 0))  # younger ones may just be made
    assert supervise(Job(1, rankwork.returns, ((0,),))) == DONE
    assert not any(path.exists() for path in left), "which removes what a killed one has left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_before_the_first_step_loses_nothing_and_says_so(number):
    program = (
        "import os, sys, time, mikoshi.trainer.config.run as c\n"
        f"c.load_config = lambda *_: (os.kill(os.getpid(), {int(number)}), time.sleep(20))\n"
        "import mikoshi.launch.cli.main as cli\n"
        "sys.argv = ['mikoshi', 'train', 'x.toml']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == PREEMPTED
    assert done.stderr == "stopped outside of a step: nothing is lost, the same command goes on\n"
