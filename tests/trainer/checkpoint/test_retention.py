"""Which checkpoints stay: the newest, every so many, what going back needs, and always the last valid one."""

import pytest
import torch

from mikoshi.trainer.checkpoint.of_run import retention_of
from mikoshi.trainer.checkpoint.retention import Keep, kept_steps, prune, removable
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import step_folder
from mikoshi.trainer.errors import CheckpointError
from runs import run_config


def kept_after(folder, steps, keep):
    for step in steps:
        save(folder, step, {"w": torch.full((10,), float(step))}, {"config": ""}, keep=keep)
    return LocalStore(folder).steps()


def test_the_newest_and_every_so_many_are_kept(tmp_path):
    assert kept_after(tmp_path / "a", range(1, 8), Keep(2)) == [7, 6]
    assert kept_after(tmp_path / "b", range(1, 8), Keep(2, 3)) == [7, 6, 3]
    assert kept_after(tmp_path / "c", [10, 20, 5], Keep(2)) == [20, 10, 5]  # never the one just saved
    for last, every in [(0, 0), (1, -1)]:
        with pytest.raises(CheckpointError, match="at least 1"):
            Keep(last, every)


def test_the_last_valid_one_stays_whatever_is_asked(tmp_path):
    kept_after(tmp_path, [1, 2, 3, 4, 5], Keep(9))
    for step in (4, 5):
        (step_folder(tmp_path, step) / "rank-00000.safetensors").write_bytes(b"torn")
    store = LocalStore(tmp_path)
    assert removable(store, Keep(2)) == [2, 1]
    assert removable(store, Keep(2), valid={5}) == [3, 2, 1]
    assert prune(store, Keep(1)) == [4, 2, 1]
    assert store.steps() == [5, 3]


def test_what_going_back_needs_stays(tmp_path):
    keep = Keep(1, rewind=10, rewind_every=4)
    assert kept_after(tmp_path / "a", range(4, 41, 4), keep) == [40, 36, 32, 28]
    assert kept_after(tmp_path / "b", [4, 8, 11, 12, 16, 17, 20, 22, 23], keep) == [23, 20, 16, 12]
    steps = [43, 41, 40, 36, 33, 32, 30, 28, 24]
    assert kept_steps(steps, keep) == {43: "the newest", 40: "for going back", 36: "for going back", 32: "for going back"}
    assert kept_steps(steps, Keep(2, 20, 10, 4))[41] == "one of the newest 2"
    assert kept_steps(steps, Keep(2, 20, 10, 4))[40] == "a multiple of 20"
    assert kept_steps([8, 4], Keep(1, rewind=100, rewind_every=4)) == {8: "the newest", 4: "for going back"}
    for keep in (Keep(1, rewind=10), Keep(1, rewind_every=4)):
        assert kept_steps(steps, keep) == {43: "the newest"}
    assert kept_steps([], Keep(1, 2, 3, 4)) == {}
    for back, of in [(-1, 0), (0, -1)]:
        with pytest.raises(CheckpointError, match="at least 0"):
            Keep(1, 0, back, of)


@pytest.mark.parametrize("every", [3, 10])
@pytest.mark.parametrize("back", [1, 7, 10, 25])
def test_at_every_step_there_is_a_checkpoint_that_lies_back_far_enough(every, back):
    keep, there = Keep(1, rewind=back, rewind_every=every), []
    for step in range(1, 200):
        wanted = [multiple for multiple in range(every, step, every) if multiple <= step - back]
        assert not wanted or wanted[-1] in there
        if step % every == 0:
            there = sorted(kept_steps([step, *there], keep), reverse=True)
        assert len(there) <= back // every + 2


def test_the_config_says_what_stays(dataset, tmp_path):
    section = {"keep": 3, "keep_every": 50, "every": 10}
    config = run_config(dataset, tmp_path, checkpoint=section)
    assert retention_of(config) == Keep(3, 50)
    config = run_config(dataset, tmp_path, checkpoint=section, guard={"spike": "rewind", "rewind": 25})
    assert retention_of(config) == Keep(3, 50, 25, 10)
