"""What passes in a network is tried again, what does not is told by address, and neither leaves half a checkpoint."""

import os
import socket
import threading

import obstore
import pytest

from faulty import Fault, faulty_s3
from mikoshi.trainer.checkpoint.storage.bucket import open_remote_store
from mikoshi.trainer.errors import CheckpointError
from places import PART, A, B, bucket, saved, write


@pytest.fixture(scope="module")
def s3():
    with faulty_s3({}) as server:
        yield server


PASSING = {"500": Fault(status=500), "503": Fault(status=503), "429": Fault(status=429), "lost": Fault(lost=True)}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(s3, tmp_path, fault):
    store = bucket(s3, tmp_path)
    body = os.urandom(2 * PART + 7)
    s3.plan(fault)
    store.begin(1)
    s3.plan_changes(None, fault)
    write(store, 1, body=body)  # in parts, of which the first fails
    s3.plan_changes(fault)
    write(store, 1, B)  # at once
    s3.plan_changes(fault)
    store.commit(1, b"{}")
    assert sum(change == "PUT manifest.json" for change in s3.changes) <= 2
    for ask, answer in ((store.steps, [1]), (lambda: store.manifest(1), b"{}"), (lambda: store.sizes(1), {A: len(body), B: 6})):
        s3.plan(fault)
        assert ask() == answer
    s3.plan(fault)
    assert store.local(1, A).read_bytes() == body
    assert not s3.planned
    assert not s3.planned_changes


@pytest.mark.parametrize("fault", [Fault(send=100_000, cut=True), Fault(shorten=9)], ids=["cut", "shortened"])
def test_an_object_that_arrives_in_part_is_fetched_again(s3, tmp_path, fault):
    store = bucket(s3, tmp_path)
    body = os.urandom(1 << 20)
    saved(store, 1, **{A: body})
    s3.plan(fault, fault)
    path = store.local(1, A)
    assert path.read_bytes() == body
    assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == [A], "nothing half-fetched is left"


def test_what_does_not_pass_is_told_with_address_and_cause(s3, tmp_path):
    store = bucket(s3, tmp_path, retries=1)
    store.begin(1)
    s3.plan_changes(Fault(status=403))
    with pytest.raises(OSError, match=rf"{store.address}/step-00000001/{A}: access refused.*403"):
        write(store, 1)
    s3.plan_changes(Fault(status=400))
    with pytest.raises(OSError, match=rf"{store.address}/step-00000001/{A}: the store refuses the request.*400"):
        write(store, 1)
    s3.plan(Fault(status=403))
    with pytest.raises(OSError, match=rf"{store.address}.*: access refused; check the credentials"):
        store.steps()
    s3.plan_changes(*[Fault(status=503)] * 2)
    with pytest.raises(OSError, match=rf"{store.address}/step-00000001/{A}: failed 2 times, the last time with: .*503"):
        write(store, 1)
    s3.plan(*[Fault(status=503)] * 2)
    with pytest.raises(OSError, match=rf"{store.address}/.*: failed 2 times, the last time with: .*503"):
        store.steps()
    assert store.steps() == []
    gone = open_remote_store("s3://nowhere/x", tmp_path, s3.options, retries=1)
    with pytest.raises(OSError, match=r"s3://nowhere/x/: the store refuses the request; check address"):
        gone.steps()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        options = s3.options | {"endpoint": f"http://127.0.0.1:{nobody.getsockname()[1]}"}
        with pytest.raises(OSError, match=r"s3://nowhere/x.*: failed 2 times"):
            open_remote_store("s3://nowhere/x", tmp_path, options, retries=1).steps()


def test_of_two_attempts_one_commits(s3, tmp_path):
    first = bucket(s3, tmp_path)
    second = open_remote_store(first.address, tmp_path, s3.options, part=PART)
    first.begin(1)
    second.begin(1)
    write(first, 1)
    write(second, 1)
    second.commit(1, b"second")
    with pytest.raises(CheckpointError, match="step-00000001 was committed by another process"):
        first.commit(1, b"first")
    first.abandon(1)
    assert (first.manifest(1), first.sizes(1)) == (b"second", {A: 6})


def test_a_commit_in_doubt_is_taken_back(s3, tmp_path):
    """The manifest arrived, no answer ever did: who is told that the save failed must not find it later, in part or whole."""
    store = bucket(s3, tmp_path, retries=0)
    store.begin(1)
    write(store, 1)
    s3.plan_changes(Fault(lost=True))
    with pytest.raises(OSError, match=r"manifest\.json: failed 1 times"):
        store.commit(1, b"{}")
    assert store.steps() == [1]
    store.abandon(1)
    assert (store.steps(), store.leftovers()) == ([], [])


def test_what_was_damaged_on_its_way_is_not_held_against_the_store(s3, tmp_path):
    from hashlib import sha256

    store = bucket(s3, tmp_path)
    body = os.urandom(1 << 20)
    saved(store, 1, **{A: body})
    s3.plan(Fault(flip=70_000))
    assert store.local(1, A, sha256(body).hexdigest()).read_bytes() == body
    assert s3.requests.count(A) == 2
    s3.put(f"{store.address.rpartition('/')[2]}/step-00000001/{A}", body[:-1] + bytes([body[-1] ^ 1]))
    s3.forget()
    store.release()
    for requested in (1, 2):
        with pytest.raises(CheckpointError, match=rf"{store.address}/step-00000001/{A}: altered: .*SHA-256"):
            store.local(1, A, sha256(body).hexdigest())
        assert s3.requests.count(A) == 2 * requested
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"], "nobody finds it here"


def test_an_object_is_fetched_once_for_a_node(s3, tmp_path):
    store = bucket(s3, tmp_path)
    saved(store, 1, **{A: os.urandom(1 << 20)})
    saved(store, 2)
    s3.forget()
    ready, found = threading.Barrier(6), []

    def look():
        mine = open_remote_store(store.address, tmp_path, s3.options)  # what another process would have
        ready.wait()
        found.append(mine.local(1, A))

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert s3.requests.count(A) == 1
    store.local(2, A)
    assert not found[0].exists(), "of steps that nobody looks at any more nothing is kept"
    store.release()
    assert list(tmp_path.iterdir()) == []


def test_objects_that_are_none_of_ours_stay(s3, tmp_path):
    store = bucket(s3, tmp_path)
    prefix = store.address.rpartition("/")[2]
    for name in ("README", "step-1/x", "other/step-00000001/rank", "step-00000003/deep/er"):
        s3.put(f"{prefix}/{name}", b"x")
    saved(store, 2)
    left = {meta["path"] for batch in obstore.list(store._handle) for meta in batch}
    assert left == {"README", "step-1/x", "other/step-00000001/rank", f"step-00000002/{A}", "step-00000002/manifest.json"}
    s3.put(f"{prefix}/step-00000002/deep/er", b"x")
    assert store.sizes(2) == {A: 6, "deep": -1}
    store.remove(2)
    assert (store.steps(), store.leftovers()) == ([], [])


def test_a_listing_that_fails_while_removing_is_told_by_address(s3, tmp_path):
    store = bucket(s3, tmp_path, retries=0)
    saved(store, 2)
    s3.put(f"{store.address.rpartition('/')[2]}/step-00000001/deep/er", b"x")
    s3.plan(None, Fault(status=403))  # the first tells what is there
    with pytest.raises(OSError, match=rf"{store.address}/step-00000001/deep: access refused; check the credentials"):
        store.begin(3)
    store.begin(3)
    assert (store.steps(), store.leftovers()) == ([2], [])


@pytest.mark.slow
def test_many_objects_are_seen(s3, tmp_path):
    store = bucket(s3, tmp_path)
    prefix = store.address.rpartition("/")[2]
    for number in range(1_100):  # a page of a listing has a thousand
        s3.put(f"{prefix}/step-00000001/rank-{number:05d}.safetensors", b"")
    assert (store.steps(), store.leftovers()) == ([], ["step-00000001"])
    store.begin(1)
    assert store.leftovers() == []
