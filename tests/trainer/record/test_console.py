"""The console: plain lines in a pipe, a live line in a terminal, nothing from ranks that are silent."""

import os
import pty
import subprocess
import sys

from mikoshi.trainer.record.console import TrainConsole
from mikoshi.trainer.record.durations import clock

VALUES = {"loss": 3.25, "tokens": 4096, "step_seconds": 0.5, "memory_bytes": 3 << 29}


def test_a_pipe_gets_whole_lines_every_so_many_steps(capsys):
    with TrainConsole(25, every=10) as console:
        for done in range(1, 26):
            console.step(done, {**VALUES, "mfu": 0.41})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == "step 10/25  loss 3.2500  8,192 tok/s  MFU 41.0%  500 ms/step  1.50 GiB  ETA 00:08"


def test_a_line_names_the_step_that_was_clipped_far(capsys):
    norms = {3: 24.7, 7: 6.0, 14: 4.9, 20: 12.0}
    with TrainConsole(30, every=10, clip=1.0) as console:
        for done in range(1, 31):
            values = {**VALUES, "grad_norm": norms.get(done, 0.9), "applied": True}
            console.step(done, {**values, "grad_norm": 1e9, "applied": False} if done == 15 else values)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("ETA ")[2].partition("  ")[2] for line in lines] == ["clipped 25x at step 3", "clipped 12x", ""]


def test_without_a_clip_nothing_was_clipped(capsys):
    with TrainConsole(1, every=1) as console:
        console.step(1, {**VALUES, "grad_norm": 50.0, "applied": True})
    assert "clipped" not in capsys.readouterr().out


def test_a_silent_rank_says_nothing(capsys):
    with TrainConsole(5, every=1, silent=True) as console:
        console.step(1, VALUES)
        console.print("hello")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_line_that_moves():
    program = (
        "from mikoshi.trainer.record.console import TrainConsole\n"
        f"values = {VALUES}\n"
        "with TrainConsole(3, every=1) as console:\n"
        "    for done in (1, 2, 3): console.step(done, values)\n"
        "    console.print('held-out loss 1.0')\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait(30) == 0
    text = seen.decode()
    assert "step 3/3" in text
    assert "8,192 tok/s" in text
    assert "held-out loss 1.0" in text
    assert "\x1b[" in text, "moved, not printed again"


def test_a_clock_for_seconds_hours_and_days():
    assert [clock(s) for s in (5, 65, 3700, 2 * 86400 + 61)] == ["00:05", "01:05", "01:01:40", "2d 00:01:01"]
