"""What a process prints never decides how its work ends: the reader goes away, the disk is full, a stream was never open."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.exit_codes import DONE, PREEMPTED, USER_ERROR
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import run_config

QUIET = {"log": {"tensorboard": False, "every": 1}, "eval": {"batches": 1}}
PROGRAM = """
import sys, typer, mikoshi.launch.cli.main
from rich.console import Console
from mikoshi.trainer.streams import go_on_unread

def verb(path: str = ""):
    if {unread}: go_on_unread()
    for number in range(3_000):
        {say}
    open({done!r}, "w").close()

mikoshi.launch.cli.main.app = typer.Typer()
mikoshi.launch.cli.main.app.command()(verb)
sys.argv = ["mikoshi"]
mikoshi.launch.cli.main.main()
"""


def mikoshi(tmp_path, unread=False, say="print(number, 'lines of output')", shell="exec {}", **more):
    program = PROGRAM.format(unread=unread, say=say, done=str(tmp_path / "done"))
    command = shell.format('"$0" -c "$1"')
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, program], capture_output=True, timeout=60, cwd=Path(__file__).parents[3], **more
    )
    return done.returncode, done.stdout, done.stderr, (tmp_path / "done").exists()


@pytest.mark.parametrize("say", ["print(number, 'lines')", "Console().print(number, 'lines')", "typer.echo(f'{number} lines')",
                                 "sys.stdout.buffer.write(b'lines\\n')"])  # fmt: skip
@pytest.mark.parametrize("unread", [False, True])
def test_a_reader_that_goes_away_ends_a_verb_quietly_or_not_at_all(tmp_path, unread, say):
    """One that works goes on to its end; one that only tells ends at once, and neither says a word about it."""
    say = f"{say}; number % 100 or sys.stdout.flush()"
    code, out, err, ended = mikoshi(tmp_path, unread, say, "set -o pipefail; {} | head -n 1")
    assert (code, err, ended) == (DONE, b"", unread)
    assert out.count(b"lines") == 1


def test_output_for_which_there_is_no_room_is_told_in_one_line(tmp_path):
    code, _, err, ended = mikoshi(tmp_path, shell="{} > /dev/full")
    assert (code, ended) == (USER_ERROR, False)
    assert err == b"error: standard output: No space left on device: what was to be printed there is lost\n"
    code, _, err, ended = mikoshi(tmp_path, say="print(1) if not number else 0", shell="{} > /dev/full")  # found at the end
    assert (code, err.count(b"\n"), b"No space left" in err) == (USER_ERROR, 1, True)
    code, _, err, ended = mikoshi(tmp_path, unread=True, shell="{} > /dev/full")
    assert (code, ended) == (DONE, True)
    assert err == b"warning: standard output: No space left on device: what is printed there may be lost\n"
    assert mikoshi(tmp_path, shell="{} > /dev/full 2> /dev/full")[0] == USER_ERROR
    assert mikoshi(tmp_path, shell="{} 1< /dev/null")[0] == USER_ERROR, "opened for reading alone"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_never_open_is_no_place_for_another_file(tmp_path, closed):
    say = (
        "assert sys.stdin.read() == ''; print(1); print(2, file=sys.stderr); sys.stdout.isatty(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2, file.fileno(); number == 9 and sys.exit(7)"
    )
    code, _, _, _ = mikoshi(tmp_path, unread=True, say=say, shell=f"{{}} {closed}", stdin=subprocess.DEVNULL)
    assert code == 7
    assert (tmp_path / "file").read_bytes() == b""


def test_what_an_encoding_lacks_is_escaped_and_bytes_that_are_no_text_stay(tmp_path):
    say = r"number or print('caf\xe9 \u5b57 \udce9 \u2502')"
    assert (
        mikoshi(tmp_path, say=say, env=os.environ | {"PYTHONUTF8": "1"})[1] == "café 字 ".encode() + b"\xe9" + " │\n".encode()
    )
    for more in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        code, out, err, _ = mikoshi(tmp_path, say=say, env=os.environ | more)
        assert (code, err) == (DONE, b"")
        assert out == rb"caf\xe9 \u5b57 " + b"\xe9" + rb" \u2502" + b"\n"


def test_a_terminal_that_nobody_waits_for_is_waited_for(tmp_path):
    """A pipe that another process has set not to block."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    program = PROGRAM.format(unread=False, say="print('x' * 70)", done=str(tmp_path / "done"))
    child = subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    with os.fdopen(reading, "rb") as out:
        assert len(out.read()) == 3_000 * 71
    assert child.communicate(timeout=30)[1] == b""
    assert child.returncode == DONE


def launched(dataset, tmp_path, ranks, restarts, steps, torchrun=False):
    """A run as a shell pipes it, `2>&1 | ...`, and the end that a reader has of it."""
    run = run_config(dataset, tmp_path / "runs", train={"steps": steps}, recovery={"restarts": restarts}, **QUIET)
    (tmp_path / "run.toml").write_text(to_toml(run))
    verb = ["mikoshi", "train", str(tmp_path / "run.toml")]
    command = [sys.executable, "-P", "-m", *verb, "--ranks", str(ranks)]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", *verb]
    reading, writing = os.pipe()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    child = subprocess.Popen(command, stdout=writing, stderr=writing, env=env, start_new_session=True)
    os.close(writing)
    return run.run.path, child, reading


def step_of(folder):
    return max((record.get("step", 0) for record in read_jsonl(folder / "metrics.jsonl")), default=0)


def await_step(folder, child, step):
    deadline = time.monotonic() + 120
    while step_of(folder) < step:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


WAYS = [(1, 0), *(pytest.param(*way, marks=pytest.mark.slow) for way in ((1, 3), (2, 3), (2, 0)))]


@pytest.mark.parametrize(("ranks", "restarts"), WAYS)
def test_a_run_whose_reader_goes_away_trains_to_its_end(dataset, tmp_path, ranks, restarts):
    folder, child, reading = launched(dataset, tmp_path, ranks, restarts, 8)
    assert os.read(reading, 1)
    os.close(reading)
    assert child.wait(120) == DONE
    events = [event["event"] for event in read_jsonl(folder / "events.jsonl")]
    assert step_of(folder) == 8
    assert "fault" not in events and "restart" not in events and events[-1] == "end"


@pytest.mark.parametrize(("ranks", "restarts"), WAYS)
def test_ctrl_c_that_ends_the_reader_first_saves_and_says_so(dataset, tmp_path, ranks, restarts):
    """`mikoshi train ... 2>&1 | tee log`, then Ctrl-C: the signal is for both, and tee is gone before a word is said."""
    folder, child, reading = launched(dataset, tmp_path, ranks, restarts, 100_000)
    assert os.read(reading, 1)
    os.close(reading)
    await_step(folder, child, 5)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(60) == PREEMPTED
    events = read_jsonl(folder / "events.jsonl")
    (stop,) = [event for event in events if event["event"] == "stop"]
    assert stop["step"] in [event["step"] for event in events if event["event"] == "save"]


@pytest.mark.slow
def test_ranks_of_torchrun_save_when_nobody_reads_them(dataset, tmp_path):
    folder, child, reading = launched(dataset, tmp_path, 2, 0, 100_000, torchrun=True)
    assert os.read(reading, 1)
    os.close(reading)
    await_step(folder, child, 5)
    os.killpg(child.pid, signal.SIGINT)
    child.wait(60)  # torchrun's own code
    events = read_jsonl(folder / "events.jsonl")
    assert {event["step"] for event in events if event["event"] == "stop"} & {
        event["step"] for event in events if event["event"] == "save"
    }


def test_ctrl_c_before_the_first_step_with_no_reader_is_a_stop():
    reading, writing = os.pipe()
    os.close(reading)
    program = "import os, signal\nfrom mikoshi.trainer.signals import exit_on_stop_signal\n" \
              "with exit_on_stop_signal(): os.kill(os.getpid(), signal.SIGINT)"  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=writing)
    os.close(writing)
    assert child.wait(60) == PREEMPTED
