"""A folder of checkpoints, whatever stands in it and whenever a process in it is killed: what is no file is not opened."""

import errno
import os
import resource
import shutil
import signal
import socket
import stat
import tempfile
from itertools import count
from pathlib import Path

import pytest

from mikoshi.trainer.checkpoint import restore
from mikoshi.trainer.checkpoint.restore import newest_valid
from mikoshi.trainer.checkpoint.storage import local as store_module
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.errors import CheckpointError
from places import A, B, saved, write


def local_with(tmp_path):
    store = LocalStore(tmp_path / "checkpoints")
    for step in (1, 2):
        saved(store, step)
    return store, tmp_path / "checkpoints" / "step-00000002"


def never_opened(tmp_path):
    """Something outside that whoever opens it waits for, for ever."""
    os.mkfifo(tmp_path / "outside")
    return tmp_path / "outside"


def replaced(path, what, outside):
    if path.is_dir() and what != "keep":
        shutil.rmtree(path)
    else:
        path.unlink()
    if what == "link":
        path.symlink_to(outside)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = Path.cwd()
            os.chdir(path.parent)  # an address has 108 characters
            server.bind(path.name)
            os.chdir(before)
    elif what == "folder":
        path.mkdir()
    elif what == "file":
        path.write_text("surprise")


@pytest.mark.parametrize("what", ["link", "fifo", "socket", "folder"])
def test_what_is_no_file_is_neither_opened_nor_followed(tmp_path, what):
    store, path = local_with(tmp_path)
    outside = never_opened(tmp_path)
    replaced(path / A, what, outside)
    assert store.sizes(2) == {A: -1}
    with pytest.raises(CheckpointError, match=rf"step-00000002/{A}: not a regular file"):
        store.local(2, A)
    replaced(path / "manifest.json", what, outside)
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest.json: not a regular file"):
        store.manifest(2)
    assert store.set_aside(2) == "damaged-step-00000002"
    assert store.steps() == [1]
    assert outside.exists()


@pytest.mark.parametrize("what", ["link", "file"])
def test_a_step_that_is_no_folder(tmp_path, what):
    store, path = local_with(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(path, elsewhere)
    replaced(path, what, elsewhere)
    assert store.steps() == [2, 1]
    for ask in (store.manifest, store.written_at, store.sizes, lambda step: store.local(step, A)):
        with pytest.raises(CheckpointError, match=rf"step-00000002: damaged: a {what}, not a folder"):
            ask(2)
    with pytest.raises(CheckpointError, match="exists already"):
        store.begin(2)
    store.remove(2)
    assert (store.steps(), store.leftovers()) == ([1], [])
    assert sorted(p.name for p in elsewhere.iterdir()) == ["manifest.json", A]


def test_a_partial_that_was_planted(tmp_path):
    store, _ = local_with(tmp_path)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    (tmp_path / "checkpoints" / ".step-00000003.partial").symlink_to(victim)
    store.begin(3)
    (tmp_path / "checkpoints" / ".step-00000003.partial" / A).symlink_to(victim / "precious")
    with pytest.raises(FileExistsError):
        write(store, 3)
    store.abandon(3)
    assert (victim / "precious").read_text() == "x"


def test_ten_thousand_entries(tmp_path):
    store, path = local_with(tmp_path)
    for number in range(10_000):
        os.mknod(path / f"rank-{number:05d}.bin")
        os.mknod(tmp_path / "checkpoints" / f"damaged-step-00000002.{number}")
    assert store.steps() == [2, 1]
    assert len(store.sizes(2)) == 10_001
    assert store.set_aside(2) == "damaged-step-00000002"
    saved(store, 2)
    assert store.set_aside(2) == "damaged-step-00000002.10000"


def test_a_checkpoint_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints: not a folder"):
        LocalStore(tmp_path / "checkpoints").steps()


def in_child(action):
    """Run `action` in a forked process; the signal that ended it, 0 if it ended well."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become someone who may not read everything")
def test_what_may_not_be_read_is_told_by_name_and_not_taken_for_damaged(monkeypatch):
    monkeypatch.setattr(restore, "_PAUSES", (0.0,))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        store, path = local_with(Path(folder))
        path.parent.chmod(0o777)  # where a rename would be possible

        def refused(ask):
            with pytest.raises(PermissionError, match=r"step-00000002"):
                ask()
            with pytest.raises(OSError, match=r"step-00000002: cannot be verified: Permission denied"):
                newest_valid(store)
            assert store.steps() == [2, 1]

        def as_nobody():
            os.setuid(65534)
            refused(lambda: store.manifest(2))
            refused(lambda: store.local(2, A))
            assert store.manifest(1) == b"{}"

        for name in ("manifest.json", A):
            (path / name).chmod(0)
        assert in_child(as_nobody) == 0

        def as_nobody_inside():
            os.setuid(65534)
            refused(lambda: store.manifest(2))
            refused(lambda: store.sizes(2))

        path.chmod(0)
        assert in_child(as_nobody_inside) == 0


@pytest.mark.parametrize("at", range(1, 10))
def test_a_kill_while_committing(tmp_path, monkeypatch, at):
    """At each call that changes what is on disk or makes it last: before it there is nothing, after it all."""
    store, _ = local_with(tmp_path)
    calls = count(1)

    def killed_at(module, name):
        real = getattr(module, name)

        def call(*arguments, **more):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, call)

    def commit():
        store.begin(3)
        write(store, 3)
        for module, name in ((os, "open"), (os, "fsync"), (store_module, "fsync_path"), (Path, "rename")):
            killed_at(module, name)
        store.commit(3, b"{}")

    assert in_child(commit) == signal.SIGKILL
    monkeypatch.undo()
    if 3 in store.steps():
        assert at > 6, "the rename was made"
        assert (store.manifest(3), store.sizes(3)) == (b"{}", {A: 6})
    else:
        assert at <= 6
        saved(store, 3)
        assert (store.steps(), store.leftovers()) == ([3, 2, 1], [])


def test_a_kill_while_removing(tmp_path, monkeypatch):
    store, _ = local_with(tmp_path)

    def remove():
        monkeypatch.setattr(os, "unlink", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        store.remove(2)

    assert in_child(remove) == signal.SIGKILL
    assert store.steps() == [1]
    assert len(store.leftovers()) == 1
    saved(store, 3)
    assert (store.steps(), store.leftovers()) == ([3, 1], [])


def test_a_commit_that_fails_is_taken_back(tmp_path, monkeypatch):
    store, _ = local_with(tmp_path)
    store.begin(3)
    write(store, 3)
    real = store_module.fsync_path

    def flush(path):
        if path == tmp_path / "checkpoints":
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(store_module, "fsync_path", flush)
    with pytest.raises(OSError, match="Input/output"):
        store.commit(3, b"{}")
    assert store.steps() == [2, 1]
    monkeypatch.undo()
    store.abandon(3)
    saved(store, 3)
    assert store.steps() == [3, 2, 1]


def test_no_room_for_a_file(tmp_path):
    store, _ = local_with(tmp_path)

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        store.begin(3)
        with pytest.raises(OSError) as caught:
            write(store, 3, body=bytes(1 << 20))
        assert caught.value.errno == errno.EFBIG
        write(store, 3, B)
        store.commit(3, b"{}")

    assert in_child(full) == 0
    assert store.sizes(3) == {B: 6}


def test_files_are_as_readable_as_the_rest_of_a_run(tmp_path):
    before = os.umask(0o027)
    try:
        _, path = local_with(tmp_path)
        assert {stat.S_IMODE((path / name).stat().st_mode) for name in (A, "manifest.json")} == {0o640}
    finally:
        os.umask(before)
