"""A run in a terminal that goes, as an ssh session that drops: it saves, and its exit code says so."""

import os
import pty
import signal
import sys
import time

from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.exit_codes import PREEMPTED
from mikoshi.trainer.record.run_folder import read_jsonl
from runs import run_config


def test_a_run_whose_terminal_goes_is_saved(dataset, tmp_path):
    quiet = {"log": {"tensorboard": False}, "eval": {"batches": 1}}
    run = run_config(dataset, tmp_path / "runs", train={"steps": 100_000}, **quiet)
    (tmp_path / "run.toml").write_text(to_toml(run))
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        command = [sys.executable, "-P", "-m", "mikoshi", "train", str(tmp_path / "run.toml"), "--ranks", "2"]
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    os.set_blocking(terminal, False)
    folder, deadline, said = run.run.path, time.monotonic() + 120, b""
    while not any(r.get("step", 0) >= 5 for r in read_jsonl(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline, said
        try:
            said += os.read(terminal, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    events = read_jsonl(folder / "events.jsonl")
    (stop,) = [event for event in events if event["event"] == "stop"]
    assert stop["asked"] == "SIGHUP"
    assert stop["step"] in [event["step"] for event in events if event["event"] == "save"]
    assert os.waitstatus_to_exitcode(status) == PREEMPTED
