"""What a store lists is committed whole, in a folder and in a bucket alike; a name that is none of a checkpoint is refused."""

import os
import time

import pytest

from faulty import faulty_s3
from mikoshi.trainer.checkpoint.storage.base import step_of
from mikoshi.trainer.checkpoint.storage.open import open_store
from mikoshi.trainer.errors import CheckpointError
from places import PART, A, B, bucket, saved, write


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
    assert (store.steps(), store.leftovers()) == ([], [])
    large = os.urandom(2 * PART + 12_345)
    store.begin(30)
    with store.create(30, A) as file:
        for start in range(0, len(large), 1 << 20):
            file.write(memoryview(large)[start : start + (1 << 20)])
    write(store, 30, B, b"")
    assert store.steps() == []
    assert len(store.leftovers()) == 1
    assert "step-00000030" in store.leftovers()[0]
    store.commit(30, b'{"a": 1}')
    assert (store.steps(), store.leftovers()) == ([30], [])
    assert store.manifest(30) == b'{"a": 1}'
    assert store.sizes(30) == {A: len(large), B: 0}
    assert store.local(30, A).read_bytes() == large
    assert store.local(30, B).read_bytes() == b""
    assert abs(store.written_at(30) - time.time()) < 120
    assert store.describe(30) == f"{store.address}/step-00000030"
    saved(store, 7)
    saved(store, 123_456_789)
    assert store.steps() == [123_456_789, 30, 7]


def test_what_is_not_there_is_told(store):
    for ask in (store.manifest, store.written_at, store.sizes):
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
    assert (store.steps(), store.leftovers()) == ([4, 1], [])
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
    assert (store.steps(), store.leftovers()) == ([], [])
    saved(store, 8)
    assert store.steps() == [8]


def test_removed_and_set_aside(store):
    for step in (1, 2, 3):
        saved(store, step)
    store.remove(2)
    store.remove(2)
    assert (store.steps(), store.leftovers()) == ([3, 1], [])
    name = store.set_aside(3)
    assert "damaged-" in name
    assert (store.steps(), store.leftovers()) == ([1], [name])
    saved(store, 4)
    assert store.leftovers() == [name], "kept for inspection"
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
    ("place", "message"),
    [
        ("ftp://host/x", "s3://"), ("http://host/x", "s3://"), ("file://host/x", "file:///path"), ("file://", "file:///path"),
        ("file:///x?y", "file:///path"), ("s3://", "cannot be opened"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be(tmp_path, place, message):
    with pytest.raises(CheckpointError, match=rf"checkpoint\.folder.*{message}"):
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
