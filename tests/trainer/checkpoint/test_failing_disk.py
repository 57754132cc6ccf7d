"""A disk that fails is no damage: it is asked again, and then told, on all ranks; nothing is set aside or taken instead."""

import errno
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from forked import forked
from mikoshi.trainer.checkpoint import restore
from mikoshi.trainer.checkpoint.pieces import piece_file
from mikoshi.trainer.checkpoint.restore import load, newest_valid
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.checkpoint.storage.base import NO_FILE
from mikoshi.trainer.checkpoint.storage.files import opened, read_through
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.errors import CheckpointError

NAME = "rank-00000.safetensors"
FAILING = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ETIMEDOUT]


class Failing(LocalStore):
    """Which fails with `number` so many times where it is asked for `what` of step 2."""

    def __init__(self, folder, what, number, times):
        super().__init__(folder)
        self.what, self.number, self.times = what, number, times

    def _step_folder(self, step):
        if step == 2 and self.what == "folder":
            self._fail()
        return super()._step_folder(step)

    def local(self, step, name, sha256=None):
        if step == 2 and self.what == "file":
            self._fail()
        return super().local(step, name, sha256)

    def _names(self):
        if self.what == "list":
            self._fail()
        return super()._names()

    def _fail(self):
        if self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number), str(self.folder))


def checkpoints(folder):
    for step in (1, 2):
        save(folder, step, {"w": torch.full((100,), float(step))}, {"config": ""}, keep=5)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", FAILING, ids=errno.errorcode.get)
@pytest.mark.parametrize("what", ["folder", "file", "list"])
def test_what_passes_is_asked_again_and_what_stays_is_raised(tmp_path, monkeypatch, what, number):
    monkeypatch.setattr(restore, "_PAUSES", (0.0, 0.0))
    folder = checkpoints(tmp_path / "c")
    saved, manifest, refused = newest_valid(Failing(folder, what, number, 2))
    assert (saved.step, manifest.step, refused) == (2, 2, [])
    store = Failing(folder, what, number, 99)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        newest_valid(store)
    assert not isinstance(caught.value, CheckpointError)
    assert store.times == 96
    assert names(folder) == ["step-00000001", "step-00000002"]


def resumed_where_one_rank_fails(folder, times):
    import torch.distributed as dist

    restore._PAUSES = (0.0, 0.0)
    try:
        store = Failing(folder, "folder", errno.EIO, times) if dist.get_rank() == 1 else LocalStore(folder)
        return newest_valid(store)[1].step
    except OSError as error:
        return str(error)
    finally:
        restore._PAUSES = (0.2, 1.0, 3.0)


def test_on_one_rank_it_is_told_to_all(ranks, tmp_path):
    folder = checkpoints(tmp_path / "c")
    assert ranks.run(resumed_where_one_rank_fails, folder, 2, world=3) == [2] * 3
    results = ranks.run(resumed_where_one_rank_fails, folder, 99, world=3)
    assert results == [f"{folder}/step-00000002: cannot be verified: Input/output error"] * 3
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_a_read_that_fails_is_an_error_of_the_disk():
    """Nobody maps the first page of memory: reading it is an I/O error."""
    with pytest.raises(OSError, match="/proc/self/mem") as caught:
        read_through(Path("/proc/self/mem"), lambda _: None)
    assert caught.value.errno == errno.EIO


def with_no_handle_left(folder):
    """The errors of a process that may open no more files."""
    store, results = LocalStore(folder), []
    file = store.local(2, NAME)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    for look in (
        lambda: opened(file).__enter__(),
        lambda: piece_file(file).__enter__(),
        lambda: read_through(file, lambda _: None),
        lambda: store.manifest(2),
        lambda: store.sizes(2),
        lambda: store.local(2, NAME),
    ):
        try:
            look()
        except OSError as error:
            results.append(error.errno)
    return results


def test_a_process_without_a_handle_left_takes_nothing_for_damaged(tmp_path):
    results, _ = forked(with_no_handle_left, checkpoints(tmp_path / "c"))
    assert results == [errno.EMFILE] * 6


def test_what_cannot_be_read_while_loading_is_no_mistake_of_the_users(tmp_path):
    folder = checkpoints(tmp_path / "c")
    store = Failing(folder, "file", errno.EIO, 99)
    state = {"w": torch.zeros(100)}
    with pytest.raises(OSError, match=r"step-00000002: cannot be read: .*Input/output error"):
        load(store, read_manifest(folder, 2), state)
    (folder / "step-00000002" / NAME).unlink()
    with pytest.raises(CheckpointError, match=rf"step-00000002: cannot be loaded: .*{NAME}: missing"):
        load(LocalStore(folder), read_manifest(folder, 2), state)


def test_damage_is_still_damage(tmp_path):
    assert not set(FAILING) & set(NO_FILE)
    folder = checkpoints(tmp_path / "c")
    shutil.rmtree(folder / "step-00000002")
    (folder / "step-00000002").symlink_to(folder / "step-00000001")
    _, manifest, refused = newest_valid(folder)
    assert manifest.step == 1
    assert "a link, not a folder" in refused[0]
