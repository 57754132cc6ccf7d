"""What a store lists is committed whole, in a folder and in a bucket alike; what is no file of a checkpoint is refused."""

import errno
import os
import resource
import shutil
import signal
import socket
import stat
import tempfile
import time
from itertools import count
from pathlib import Path

import pytest

from faulty import faulty_s3
from places import PART, A, B, bucket, saved, write
from trainer.checkpoint import store as store_module
from trainer.checkpoint.store import LocalStore, open_store, step_of
from trainer.errors import CheckpointError


@pytest.fixture(scope="module")
def s3():
    with faulty_s3({}) as server:
        yield server


@pytest.fixture(params=["folder", "file", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        return bucket(request.getfixturevalue("s3"), tmp_path / "scratch")
    place = tmp_path / "runs" / "a b"
    return open_store(place if request.param == "folder" else f"file://{str(place).replace(' ', '%20')}", tmp_path / "scratch")


def test_a_committed_step_is_there_whole(store):
    assert (store.steps(), store.others()) == ([], [])
    large = os.urandom(2 * PART + 12_345)
    store.begin(30)
    with store.create(30, A) as file:
        for start in range(0, len(large), 1 << 20):
            file.write(memoryview(large)[start : start + (1 << 20)])
    write(store, 30, B, b"")
    assert store.steps() == []
    assert len(store.others()) == 1
    assert "step-00000030" in store.others()[0]
    store.commit(30, b'{"a": 1}')
    assert (store.steps(), store.others()) == ([30], [])
    assert store.manifest(30) == b'{"a": 1}'
    assert store.sizes(30) == {A: len(large), B: 0}
    assert store.local(30, A).read_bytes() == large
    assert store.local(30, B).read_bytes() == b""
    assert abs(store.written(30) - time.time()) < 120
    assert store.describe(30) == f"{store.place}/step-00000030"
    saved(store, 7)
    saved(store, 123_456_789)
    assert store.steps() == [123_456_789, 30, 7]


def test_what_is_not_there_is_told(store):
    for ask in (store.manifest, store.written, store.sizes):
        with pytest.raises(FileNotFoundError, match="step-00000009"):
            ask(9)
    saved(store, 3)
    with pytest.raises(CheckpointError, match=r"step-00000003/gone\.safetensors: missing"):
        store.local(3, "gone.safetensors")


def test_a_file_whose_writing_failed_is_not_there(store):
    store.begin(1)
    with pytest.raises(RuntimeError, match="died"), store.create(1, A) as file:
        file.write(os.urandom(PART + 1))
        raise RuntimeError("died")
    write(store, 1, B)
    store.commit(1, b"{}")
    assert store.sizes(1) == {B: 6}


def test_the_next_save_clears_what_killed_ones_left(store):
    saved(store, 1)
    for step in (2, 3):
        store.begin(step)
        write(store, step)  # and the process is gone
    store.begin(4)
    write(store, 4, B)
    assert store.steps() == [1]
    store.commit(4, b"{}")
    assert (store.steps(), store.others()) == ([4, 1], [])
    assert store.sizes(4) == {B: 6}


def test_a_checkpoint_is_never_written_over_another(store):
    saved(store, 5, b"first")
    with pytest.raises(CheckpointError, match="step-00000005 exists already"):
        store.begin(5)
    store.abandon(5)  # as the save that began so does
    assert store.manifest(5) == b"first"
    assert store.sizes(5) == {A: 6}


def test_an_abandoned_save_leaves_nothing(store):
    store.abandon(8)
    store.begin(8)
    write(store, 8)
    store.abandon(8)
    store.abandon(8)
    assert (store.steps(), store.others()) == ([], [])
    saved(store, 8)
    assert store.steps() == [8]


def test_removed_and_set_aside(store):
    for step in (1, 2, 3):
        saved(store, step)
    store.remove(2)
    store.remove(2)
    assert (store.steps(), store.others()) == ([3, 1], [])
    name = store.set_aside(3)
    assert "damaged-" in name
    assert (store.steps(), store.others()) == ([1], [name])
    saved(store, 4)
    assert store.others() == [name], "kept for inspection"
    saved(store, 3, b"again", **{B: b"more"})
    assert store.steps() == [4, 3, 1]
    assert (store.manifest(3), store.sizes(3)) == (b"again", {A: 6, B: 4})


@pytest.mark.parametrize(
    "name", ["../other", "/etc/passwd", "a/b", "", ".", "..", ".hidden", "manifest.json", "a\0b", "a\nb", "-rf", "é", "a" * 300]
)
def test_a_name_that_is_no_file_of_a_checkpoint(store, name):
    store.begin(1)
    with pytest.raises(CheckpointError, match=r"step-00000001.*is not the name of a file in the checkpoint"):
        write(store, 1, name)
    write(store, 1)
    store.commit(1, b"{}")
    with pytest.raises(CheckpointError, match=r"step-00000001.*is not the name of a file in the checkpoint"):
        store.local(1, name)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("ftp://host/x", "s3://"), ("http://host/x", "s3://"), ("file://host/x", "file:///path"), ("file://", "file:///path"),
        ("file:///x?y", "file:///path"), ("s3://", "cannot be opened"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be(tmp_path, place, told):
    with pytest.raises(CheckpointError, match=rf"checkpoint\.folder.*{told}"):
        open_store(place, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_of_steps():
    assert (step_of("step-00000030"), step_of("step-123456789")) == (30, 123_456_789)
    for name in (
        "step-30",
        "step-000000030",
        "step-0000003٣",
        "step-00000030.partial",
        "damaged-step-00000030",
        "step-00000030\n",
    ):
        assert step_of(name) is None


# A folder, and what may stand in it.


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
    for ask in (store.manifest, store.written, store.sizes, lambda step: store.local(step, A)):
        with pytest.raises(CheckpointError, match=rf"step-00000002: damaged: a {what}, not a folder"):
            ask(2)
    with pytest.raises(CheckpointError, match="exists already"):
        store.begin(2)
    store.remove(2)
    assert (store.steps(), store.others()) == ([1], [])
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
def test_what_may_not_be_read_is_refused_by_name():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        store, path = local_with(Path(folder))

        def refused(ask):
            with pytest.raises(CheckpointError, match=r"step-00000002.*cannot be read: Permission denied"):
                ask()

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
        for module, name in ((os, "open"), (os, "fsync"), (store_module, "flush"), (Path, "rename")):
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
        assert (store.steps(), store.others()) == ([3, 2, 1], [])


def test_a_kill_while_removing(tmp_path, monkeypatch):
    store, _ = local_with(tmp_path)

    def remove():
        monkeypatch.setattr(os, "unlink", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        store.remove(2)

    assert in_child(remove) == signal.SIGKILL
    assert store.steps() == [1]
    assert len(store.others()) == 1
    saved(store, 3)
    assert (store.steps(), store.others()) == ([3, 1], [])


def test_a_commit_that_fails_is_taken_back(tmp_path, monkeypatch):
    store, _ = local_with(tmp_path)
    store.begin(3)
    write(store, 3)
    real = store_module.flush

    def flush(path):
        if path == tmp_path / "checkpoints":
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(store_module, "flush", flush)
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
        with pytest.raises(OSError) as told:
            write(store, 3, body=bytes(1 << 20))
        assert told.value.errno == errno.EFBIG
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
