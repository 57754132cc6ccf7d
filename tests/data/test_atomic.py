"""What is written under a name is a file of its own: a link that someone left there is neither followed nor filled."""

import os

import pytest

from data.atomic import LOCK, alone_in, locked_folder, new_file, partial_path, write_file
from data.errors import StorageError
from data.store import CacheLimits, open_store


@pytest.mark.parametrize("durable", [True, False])
def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path, durable):
    victim, target = tmp_path / "victim", tmp_path / "record.json"
    victim.write_text("mine")
    partial_path(target).symlink_to(victim)
    write_file(target, b"new", durable)
    assert (victim.read_text(), target.read_bytes(), target.is_symlink()) == ("mine", b"new", False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "victim"]


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
    with alone_in(tmp_path):
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
