"""kill -9 at any line of a save: what is there afterwards is whole, the newest is the last that was committed, and the next
save clears what is left."""

import os
import signal
import sys
import threading

import pytest
import torch

from forked import forked
from mikoshi.trainer.checkpoint.restore import load, newest_valid, problem_of
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver, save
from mikoshi.trainer.checkpoint.storage.local import LocalStore

WATCHED = ("/trainer/checkpoint/", "/data/atomic.py")


def tensors(step):
    return {"model.w": torch.full((40, 3), float(step)), "model.b": torch.full((5,), step).bfloat16()}


def saving(folder, steps, background, deadly=None):
    """Save steps one after another; the process kills itself at line number `deadly` of the code that saves, in whatever
    thread it runs. Returns the number of lines, and which step was begun at which of them."""
    lines, begun = 0, []

    def trace(frame, *_):
        if not any(part in frame.f_code.co_filename for part in WATCHED):
            return None
        return line

    def line(_, event, *__):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    torch.set_num_threads(1)
    saver = Saver(LocalStore(folder), Keep(2), background)
    threading.settrace(trace)
    for step in steps:
        state = tensors(step)
        begun.append(lines)
        sys.settrace(trace)
        saver.begin(step, state, {"config": ""})
        outcome = saver.conclude()
        sys.settrace(None)
        assert outcome.error is None
    return lines, begun


def assert_nothing_torn(folder, at):
    """Returns the newest step; 0 if there is none."""
    found = newest_valid(folder)
    for step in LocalStore(folder).steps():
        assert problem_of(folder, step) is None, at
    if found is None:
        return 0
    saved, manifest, rejected = found
    assert not rejected, at
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    load(saved, manifest, state)
    for name, tensor in tensors(manifest.step).items():
        assert torch.equal(state[name], tensor), at
    return manifest.step


def killed_everywhere(tmp_path, background, points):
    (lines, begun), _ = forked(saving, tmp_path / "quiet", [1, 2, 3], background)
    assert LocalStore(tmp_path / "quiet").steps() == [3, 2]
    assert lines > 200
    seen = set()
    for point in sorted({1 + number * (lines - 1) // (points - 1) for number in range(points)}):
        folder = tmp_path / f"{point}"
        _, killed_by = forked(saving, folder, [1, 2, 3], background, point)
        assert killed_by == signal.SIGKILL or point > lines - 50  # threads do not count to the same line each time
        newest = assert_nothing_torn(folder, point)
        under_way = max(number for number, line in enumerate(begun, 1) if line < point)
        assert newest in (under_way - 1, under_way), point
        save(folder, 9, tensors(9), {"config": ""}, keep=2)
        assert assert_nothing_torn(folder, point) == 9
        left = sorted(path.name for path in folder.iterdir())
        assert left == sorted(f"step-{step:08d}" for step in LocalStore(folder).steps()), point
        assert len(left) == (2 if newest else 1)
        seen.add(newest)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_at_points_all_over_three_saves(tmp_path, background):
    killed_everywhere(tmp_path, background, 40)


@pytest.mark.soak
@pytest.mark.parametrize("background", [True, False])
def test_killed_at_a_third_of_the_lines_of_three_saves(tmp_path, background):
    killed_everywhere(tmp_path, background, 300)
