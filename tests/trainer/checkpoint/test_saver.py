"""A save in the background holds the state as it was when it began; what fails on one rank fails on all and leaves nothing."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from disks import small_disk
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.retention import Keep
from mikoshi.trainer.checkpoint.saver import Saver, save
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.checkpoint.waiting import Task
from mikoshi.trainer.errors import CheckpointError

RECORD = {"config": "x = 1"}


def tensors(seed=0, rows=40):
    torch.manual_seed(seed)
    return {"model.w": torch.randn(rows, 300), "model.b": torch.randn(5).bfloat16(), "optim.w.step": torch.tensor(7.0)}


def restored(place, state):
    saved, manifest, rejected = newest_valid(place)
    assert not rejected
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(saved, manifest, found)
    return manifest, found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Gated(LocalStore):
    """A folder whose files are not begun before `gate` is opened, and `opened` says that one waits for it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.gate, self.opened = threading.Event(), threading.Event()

    def create(self, step, name):
        self.opened.set()
        assert self.gate.wait(30)
        return super().create(step, name)


def test_the_state_is_saved_as_it_was_however_it_changes_meanwhile(tmp_path):
    store = Gated(tmp_path)
    saver, state = Saver(store, Keep(2)), tensors()
    before = {name: tensor.clone() for name, tensor in state.items()}
    saver.begin(1, state, RECORD)
    assert store.opened.wait(30)
    for tensor in state.values():
        tensor.add_(1)
    assert saver.busy
    assert saver.flags() == (False, True)
    assert saver.advance(False, True) is None
    with pytest.raises(RuntimeError, match="step 1 is under way"):
        saver.begin(2, state, RECORD)
    store.gate.set()
    outcome = saver.conclude()
    assert (outcome.step, outcome.error, outcome.path) == (1, None, str(tmp_path / "step-00000001"))
    assert 0 < outcome.stall_seconds < outcome.seconds
    assert not saver.busy
    assert (saver.flags(), saver.advance(False, False), saver.conclude()) == ((False, False), None, None)
    manifest, found = restored(tmp_path, state)
    assert same(found, before)
    assert manifest.record == {"config": "x = 1", "step": 1}
    assert manifest.made["versions"]["torch"] == torch.__version__
    assert manifest.made["ranks"] == 1
    assert set(manifest.made["sha256"]) == {"config"}


def test_in_the_background_or_not_the_bytes_are_the_same_and_the_memory_is_used_again(tmp_path):
    saver, rooms = Saver(LocalStore(tmp_path / "a"), Keep(9)), set()
    for step in (1, 2, 3):
        saver.begin(step, tensors(step), RECORD)
        assert saver.conclude().error is None
        rooms.add(tuple(staged.bytes.data_ptr() for staged in saver._staged))
        save(tmp_path / "b", step, tensors(step), RECORD, keep=9)
        here, there = (read_manifest(tmp_path / name, step) for name in "ab")
        assert (here.files, here.tensors) == (there.files, there.tensors)
    assert len(rooms) == 1


def test_a_state_of_strides_and_empty_tensors_is_saved_either_way(tmp_path):
    state = {"a": torch.arange(24.0).view(4, 6).t(), "b": torch.zeros(0, 3), "c": torch.arange(10)[::2]}
    for background in (False, True):
        saver = Saver(LocalStore(tmp_path / str(background)), Keep(1), background)
        saver.begin(1, state, RECORD)
        assert saver.conclude().error is None
        assert same(restored(tmp_path / str(background), state)[1], state)


def steps_beside_a_save(folder):
    """As a run does: agree at every step's end, and go on meanwhile."""
    import torch.distributed as dist

    store = Gated(folder)
    saver, state = Saver(store, Keep(2)), tensors()
    steps, outcome = 0, None
    saver.begin(1, state, RECORD)
    while outcome is None:
        steps += 1
        state["model.w"].add_(1)
        if steps == 20 + dist.get_rank():  # the ranks' threads are done at different steps
            store.gate.set()
        flags = torch.tensor(saver.flags(), dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        outcome = saver.advance(*map(bool, flags.tolist()))
    return steps, outcome.error


def test_steps_go_on_beside_a_save_and_all_ranks_learn_of_its_end_at_one(ranks, tmp_path):
    results = ranks.run(steps_beside_a_save, tmp_path, world=2)
    assert results[0] == results[1]
    assert results[0][0] > 20
    assert results[0][1] is None
    assert same(restored(tmp_path, tensors())[1], tensors())
    assert names(tmp_path) == ["step-00000001"]


def failing_then_working(folder, failing_rank, background):
    import resource

    import torch.distributed as dist

    state = {**tensors(), f"model.{dist.get_rank()}": torch.ones(400)}
    saver = Saver(LocalStore(folder), Keep(2), background)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        saver.begin(1, state, RECORD)
        failed = saver.conclude()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = names(folder)
    dist.barrier()
    saver.begin(1, state, RECORD)
    return failed.error, left, saver.conclude().error


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_write_that_fails_on_one_rank_is_given_up_by_all_and_the_next_works(ranks, tmp_path, failing_rank, background):
    for failed, left, again in ranks.run(failing_then_working, tmp_path / "c", failing_rank, background, world=2):
        assert failed == f"rank {failing_rank}: File too large"
        assert not left
        assert again is None
    assert newest_valid(tmp_path / "c")[1].step == 1


def test_a_full_disk_is_told_leaves_nothing_and_the_next_save_works_once_there_is_room(tmp_path):
    with small_disk(tmp_path / "small", 1 << 20) as disk:
        place, state = disk / "checkpoints", tensors(rows=400)  # about half of it
        saver = Saver(LocalStore(place), Keep(1))
        saver.begin(1, state, RECORD)
        assert saver.conclude().error is None
        (disk / "other").write_bytes(bytes(300_000))
        saver.begin(2, state, RECORD)
        outcome = saver.conclude()
        assert outcome.error == "rank 0: No space left on device"
        assert names(place) == ["step-00000001"]
        assert same(restored(place, state)[1], state)
        (disk / "other").unlink()
        shutil.rmtree(place / "step-00000001")
        saver.begin(2, state, RECORD)
        assert saver.conclude().error is None
        assert restored(place, state)[0].step == 2


def test_where_no_folder_can_be_made_the_save_fails_and_nothing_is_raised():
    saver = Saver(LocalStore(Path("/proc/mikoshi")), Keep(1))
    saver.begin(1, tensors(), RECORD)
    assert saver.flags() == (True, False)
    assert saver.conclude().error == "rank 0: No such file or directory"
    assert not saver.busy


def test_a_partial_that_vanishes_before_the_commit_is_a_failed_save(tmp_path):
    saver = Saver(LocalStore(tmp_path), Keep(1), background=False)
    saver.begin(1, tensors(), RECORD)
    shutil.rmtree(tmp_path / ".step-00000001.partial")
    assert saver.conclude().error == "rank 0: No such file or directory"
    assert names(tmp_path) == []
    saver.begin(1, tensors(), RECORD)
    assert saver.conclude().error is None


class Broken(LocalStore):
    """A store with a fault of its own."""

    def __init__(self, folder, fault):
        super().__init__(folder)
        self.fault = fault

    def create(self, step, name):
        raise self.fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (MemoryError(), "MemoryError"),
        (SystemExit(3), "SystemExit: 3"),
        (CheckpointError("the bucket is gone"), "the bucket is gone"),
    ],
)
def test_whatever_ends_the_thread_is_told_and_never_lost(tmp_path, fault, message):
    saver = Saver(Broken(tmp_path, fault), Keep(1))
    saver.begin(1, tensors(), RECORD)
    assert saver.conclude().error == f"rank 0: {message}"
    assert names(tmp_path) == []
    saver.store = LocalStore(tmp_path)
    saver.begin(1, tensors(), RECORD)
    assert saver.conclude().error is None


def test_what_no_checkpoint_can_hold_is_refused_by_name_and_leaves_nothing(tmp_path):
    for state, message in [({"z": torch.zeros(2, dtype=torch.complex64)}, "complex64"), ({"z": 3}, "only tensors")]:
        with pytest.raises(CheckpointError, match=rf"z: {message}"):
            Saver(LocalStore(tmp_path), Keep(1)).begin(1, state, RECORD)
        assert names(tmp_path) == []


def test_a_layout_that_changes_is_a_failed_save_and_no_wrong_one(tmp_path):
    saver = Saver(LocalStore(tmp_path), Keep(2))
    saver.begin(1, tensors(), RECORD)
    assert saver.conclude().error is None
    saver.begin(2, tensors(rows=1), RECORD)
    assert "the layout must not change" in saver.conclude().error
    assert names(tmp_path) == ["step-00000001"]


def test_a_step_that_is_there_is_refused_and_stays(tmp_path):
    saver = Saver(LocalStore(tmp_path), Keep(2))
    saver.begin(1, tensors(), RECORD)
    saver.conclude()
    with pytest.raises(CheckpointError, match="exists already"):
        saver.begin(1, tensors(1), RECORD)
    assert not saver.busy
    assert same(restored(tmp_path, tensors())[1], tensors())


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_is_not_to_prune_removes_nothing(tmp_path, background):
    saver = Saver(LocalStore(tmp_path), Keep(1), background)
    for step, prune, left in [(1, True, [1]), (2, False, [2, 1]), (3, False, [3, 2, 1]), (4, True, [4])]:
        saver.begin(step, tensors(step), RECORD, prune=prune)
        assert saver.conclude().error is None
        assert saver.store.steps() == left


def test_an_error_that_comes_while_the_flags_are_looked_at_is_not_missed():
    class JustNow(Task):
        @property
        def done(self):
            self.error = OSError("at the last moment")
            return True

    assert JustNow(None).flags == (True, False)
