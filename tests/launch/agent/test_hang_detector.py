"""Who holds up the others is told from their pages alone, and from which of them stand still by a signal."""

import os
import signal
import subprocess
import sys
import time

from mikoshi.launch.agent.hang_detector import HangDetector, dump_stacks, find_hang, is_stopped, keep_stacks
from mikoshi.parallel.process.heartbeat import Page
from mikoshi.trainer.record.run_folder import RunFolder

NOW, SILENCE = 1000.0, 5.0


def page(step, phase, silent, limit=5.0, beats=100):
    return Page(1, step, beats, NOW - silent, limit, phase)


def named(pages, stopped=(), since=0.0):
    hang = find_hang(dict(enumerate(pages)), set(stopped), NOW, since, SILENCE)
    return hang and (hang.rank, round(hang.seconds, 1), hang.stopped)


def test_nobody_hangs_as_long_as_all_beat():
    assert named([page(7, "forward", 4.9), page(7, "reduce", 4.0), page(6, "agree", 3.0)]) is None
    assert named([]) is None


def test_it_is_the_least_advanced_who_holds_up_the_others():
    assert named([page(7, "reduce", 6.0), page(7, "forward", 5.5), page(7, "reduce", 5.8)]) == (1, 5.5, False)
    assert named([page(7, "data", 6.0), page(6, "agree", 5.1), page(7, "data", 6.0)]) == (1, 5.1, False)
    assert named([page(7, "forward", 6, beats=71), page(7, "backward", 6, beats=70)]) == (1, 6, False)
    assert named([page(7, "reduce", 6.0), page(7, "reduce", 6.5)]) == (1, 6.5, False), "who came first, else alike"


def test_those_who_wait_for_one_that_may_take_its_time_do_not_hang():
    assert named([page(7, "save", 100, limit=900), page(8, "data", 99)]) is None
    assert named([page(7, "save", 901, limit=900), page(8, "data", 900)]) == (0, 901, False)
    assert named([page(0, "start", 30, limit=900), page(0, "load", 30, limit=900)]) is None
    assert named([page(7, "reduce", 60), page(7, "compile", 60, limit=900), page(7, "forward", 60)]) is None


def test_a_stopped_process_is_named_first_and_in_any_phase():
    assert named([page(7, "reduce", 6), page(7, "forward", 6), page(7, "reduce", 6)], stopped=[2]) == (2, 6, True)
    assert named([page(7, "save", 6, limit=900), page(7, "save", 1, limit=900)], stopped=[0]) == (0, 6, True)
    assert named([page(7, "save", 4, limit=900), page(7, "save", 1, limit=900)], stopped=[0]) is None


def test_silence_counts_from_where_the_watch_itself_went_on():
    assert named([page(7, "forward", 50)], since=NOW - 4) is None
    assert named([page(7, "forward", 50)], since=NOW - 5.5) == (0, 5.5, False)


def test_a_watch_that_was_stopped_itself_begins_to_count_anew(tmp_path):
    detector = HangDetector(silence=0.5, patience=0.5)
    detector.began = detector.last_check = time.monotonic() - 60
    ranks = {0: (os.getpid(), tmp_path / "no.page")}
    assert detector.check(ranks) is None
    assert detector.counted_from == detector.last_check
    detector.last_check -= 0.9
    detector.counted_from -= 0.9
    assert detector.check(ranks).rank == 0, "after that, as ever: a rank that has said nothing for longer than patience"


def test_a_stopped_process_is_seen_and_its_stack_too(tmp_path):
    program = (
        "import faulthandler, signal, sys, time\n"
        "faulthandler.register(signal.SIGRTMIN + 1, file=open(sys.argv[1], 'w'), all_threads=True)\n"
        "def standing_still():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "standing_still()\n"
    )
    file = tmp_path / "stacks"
    with subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
        dump_stacks({3: process.pid}, {3: file})
        process.kill()
    assert "standing_still" in file.read_text()
    assert not is_stopped(process.pid), "of a process that is gone nothing is known"

    folder = RunFolder(tmp_path / "run")
    for header in ("the first", "the second"):
        keep_stacks(folder, {3: file, 5: tmp_path / "none"}, 2, header)
    kept = (folder.stacks / "attempt-2-rank-3.txt").read_text()
    assert kept.count("standing_still") == 2
    assert kept.startswith("the first\n")
    assert "stuck in the kernel" in (folder.stacks / "attempt-2-rank-5.txt").read_text()
