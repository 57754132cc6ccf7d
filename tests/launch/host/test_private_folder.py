"""A private folder is in memory where there is room, else on disk; what its owner cannot remove any more, the next one does."""

import os
import subprocess
import tempfile

import pytest

from disks import small_disk
from mikoshi.launch.controller.supervisor import Job, supervise
from mikoshi.launch.host import private_folder as private_folders
from mikoshi.launch.host.private_folder import private_folder


@pytest.fixture
def places(tmp_path, monkeypatch):
    found = tmp_path / "memory", tmp_path / "disk"
    for path in found:
        path.mkdir()
    monkeypatch.setattr(private_folders, "_MEMORY", found[0])
    monkeypatch.setattr(tempfile, "tempdir", str(found[1]))
    return found


def test_it_is_in_memory_ours_alone_and_gone_at_the_end(places):
    with private_folder() as folder:
        assert folder.parent == places[0]
        assert folder.name.startswith(f"mikoshi-ranks-{os.getpid()}-")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not any(list(place.iterdir()) for place in places)


def test_where_there_is_no_such_memory_it_is_on_disk(places):
    places[0].rmdir()
    with private_folder() as folder:
        assert folder.parent == places[1]


def test_where_memory_is_full_it_is_on_disk(places):
    with small_disk(places[0], 1 << 21) as memory:
        with private_folder() as folder:
            assert folder.parent == memory
        (memory / "of another").write_bytes(bytes((1 << 21) - 4096))
        with private_folder() as folder:
            assert folder.parent == places[1]


def test_what_a_killed_owner_left_is_removed_from_both_and_what_a_living_one_has_is_not(places):
    left = [place / "mikoshi-ranks-1-abcdefgh" for place in places]
    for path in left:
        path.mkdir(mode=0o700)
        os.utime(path, (0, 0))
    with private_folder() as mine:
        assert not any(path.exists() for path in left)
        os.utime(mine, (0, 0))
        with private_folder() as other:
            assert mine.exists()
            assert other != mine


def test_a_long_folder_for_temporary_files_is_no_place_for_sockets(places, monkeypatch):
    """As where /dev/shm cannot be used, and TMPDIR is a job's own."""
    places[0].rmdir()
    long = places[1] / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with private_folder() as folder:
        assert folder.parent == long
    assert supervise(Job(1, len, ((),))) == 0, "a rank was forked, and has ended with this code"
    assert not list(long.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a disk that is read-only")
def test_memory_that_cannot_be_written_is_none(places):
    with small_disk(places[0], 1 << 21) as memory:
        subprocess.run(["mount", "-o", "remount,ro", str(memory)], check=True)
        with private_folder() as folder:
            assert folder.parent == places[1]
