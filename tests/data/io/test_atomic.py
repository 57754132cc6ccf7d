"""What is written under a name is a file of its own: a link that someone left there is neither followed nor filled."""

import errno
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from mikoshi.data.errors import DataError, StorageError
from mikoshi.data.io import atomic
from mikoshi.data.io.atomic import (
    LOCK,
    create_file,
    folder_lock,
    locked_folder,
    new_file,
    new_folder_committed,
    partial_path,
    temporary_path,
    write_file,
)
from mikoshi.data.io.fetch import CacheLimits, open_store


@pytest.mark.parametrize("durable", [True, False])
def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path, durable):
    victim, target = tmp_path / "victim", tmp_path / "record.json"
    victim.write_text("mine")
    partial_path(target).symlink_to(victim)
    write_file(target, b"new", durable)
    assert (victim.read_text(), target.read_bytes(), target.is_symlink()) == ("mine", b"new", False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".record.json.partial", "record.json", "victim"]


def test_nor_does_a_part_of_several_names_lend_its_bytes(tmp_path):
    victim, target = tmp_path / "victim", tmp_path / "record.json"
    victim.write_text("mine")
    os.link(victim, partial_path(target))
    write_file(target, b"new")
    assert (victim.read_text(), target.read_bytes()) == ("mine", b"new")


def test_a_pipe_in_its_place_keeps_nobody_waiting(tmp_path):
    os.mkfifo(partial_path(tmp_path / "a"))
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_new_file_replaces_one_left_half_written(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    with new_file(tmp_path / "a") as out:
        out.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_locks_are_no_links(tmp_path):
    victim = tmp_path / "victim"
    built = partial_path(tmp_path / "data")
    built.mkdir()
    (built / LOCK).symlink_to(victim)
    with pytest.raises(OSError), locked_folder(tmp_path / "data", 0):
        pass
    (tmp_path / LOCK).symlink_to(victim)
    with folder_lock(tmp_path):
        assert not victim.exists()
    assert not victim.exists()


def test_a_working_folder_is_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    partial_path(tmp_path / "data").symlink_to(victim)
    with pytest.raises(OSError), locked_folder(tmp_path / "data", 0):
        pass
    assert list(victim.iterdir()) == []


def test_the_locks_of_a_cache_neither(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "folder.lock").symlink_to(tmp_path / "victim")
    with pytest.raises((ValueError, StorageError), match=r"data\.cache\.folder: cannot use"):
        open_store(f"file://{tmp_path}", CacheLimits(tmp_path / "cache"))
    assert not (tmp_path / "victim").exists()


def _hammer(target, number):
    """Write the file over and over, and read it: how often it was not whole."""
    torn = 0
    for turn in range(150):
        write_file(target, f"{number}:{turn};".encode() * 500, durable=False)
        content = target.read_bytes()
        torn += content != content[: content.index(b";") + 1] * 500
    return torn


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a name of its own for what it builds: whoever is last has written the file, whole."""
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_hammer, [tmp_path / "a"] * 4, range(4))) == [0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_dead_writers_left_is_swept_and_what_lives_is_not(tmp_path):
    here, elsewhere = temporary_path(tmp_path / "a").name, ".a.00000000-0123456789ab.partial"

    def left(name, seconds):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (1e9, (tmp_path / name).stat().st_mtime - seconds))
        return name

    for name, seconds in ((here, 0), (elsewhere, 4000), (".of-before.partial", 4000)):
        left(name, seconds)
    kept = {left("b" + elsewhere, 9000), left(".b" + elsewhere, 100)}  # no draft; young
    living = new_file(tmp_path / (".d" + here))
    kept.add(left(".d" + here, 9000))
    (tmp_path / ".folder.partial").mkdir()
    atomic._swept.discard(tmp_path)
    with living:
        write_file(tmp_path / "a", b"new")
        assert {p.name for p in tmp_path.iterdir()} == {"a", ".folder.partial", *kept}


def test_a_long_name_has_a_draft_too(tmp_path):
    name = "日" * 85
    write_file(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"


def test_one_process_at_a_time_builds_a_folder(tmp_path):
    with new_folder_committed(tmp_path / "out") as built:
        (built / "a").write_text("first")
        with pytest.raises(DataError, match="out: is being written by another process"), new_folder_committed(tmp_path / "out"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "first"
    with pytest.raises(DataError, match="out: is being written"), new_folder_committed(tmp_path / "out"):
        pass
    with pytest.raises(KeyError), new_folder_committed(tmp_path / "other"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def refuse(number):
    def refused(*_args, **_named):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("number", [None, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_file_is_created_once_also_where_there_are_no_links(tmp_path, monkeypatch, number):
    if number is not None:
        monkeypatch.setattr(os, "link", refuse(number))

    def create(who):
        try:
            create_file(tmp_path / "spec.json", who)
        except FileExistsError:
            return None
        return who

    names = [b"%d" % number * 100 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        made = [who for who in pool.map(create, names) if who is not None]
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]
    assert made == [(tmp_path / "spec.json").read_bytes()]


def test_no_room_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        create_file(tmp_path / "spec.json", b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age", "made"), [(0, False), (120, True)])
def test_what_a_killed_maker_left_without_links_is_taken_after_a_while(tmp_path, monkeypatch, age, made):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    (tmp_path / "spec.json").touch()
    now = (tmp_path / "spec.json").stat().st_mtime - age
    os.utime(tmp_path / "spec.json", (now, now))
    if made:
        create_file(tmp_path / "spec.json", b"x")
    else:
        with pytest.raises(FileExistsError):
            create_file(tmp_path / "spec.json", b"x")
    assert (tmp_path / "spec.json").read_bytes() == b"x" * made


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, number):
    monkeypatch.setattr(atomic.fcntl, "flock", refuse(number))
    with locked_folder(tmp_path / "data", 0) as (built, _):
        assert built.is_dir()
    with folder_lock(tmp_path):
        pass


def test_a_file_system_that_flushes_no_folders_is_used_all_the_same(tmp_path, monkeypatch):
    def fsync(handle, flush=os.fsync):
        return refuse(errno.EINVAL)() if Path(f"/proc/self/fd/{handle}").is_dir() else flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "a", b"x")
    create_file(tmp_path / "b", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
