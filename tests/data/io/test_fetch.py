"""Remote shards through a real S3 endpoint that fails in every way it can: whole files or errors, soon."""

import functools
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from faulty import Fault
from mikoshi.data.dataset.shards import open_shard, write_shard
from mikoshi.data.errors import DataError, StorageError
from mikoshi.data.io.fetch import CacheLimits, IndexedFile, open_store
from stores import BODIES, PASSING, ROOT, SIZE, left, opened, read, until, wanted

LEAVER = """
import json, sys
from pathlib import Path
from mikoshi.data.io.fetch import CacheLimits, IndexedFile, open_store
told = json.loads(sys.argv[1])
store = open_store(told["url"], CacheLimits(Path(told["folder"])), told["options"])
store.prefetch([IndexedFile(*told["wanted"])])
sys.stdin.read()
"""


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(s3, tmp_path, fault):
    with opened(s3, tmp_path) as store:
        s3.plan(fault)
        assert read(store, "0.shard") == BODIES["0.shard"]
        again = 0 if fault.delay else 1
        assert (store.stats().retries, len(s3.requests)) == (again, 1 + again)
        assert read(store, "0.shard") == BODIES["0.shard"]
        assert (store.stats().hits, store.stats().misses, len(s3.requests)) == (1, 1, 1 + again)
    assert left(tmp_path) == [f"{wanted('0.shard').sha256}.data"]


def test_a_silent_connection_is_given_up(s3, tmp_path):
    with opened(s3, tmp_path, timeout=0.3, hedge=0) as store:
        s3.plan(Fault(send=1000, gate=threading.Event()))
        assert read(store, "0.shard") == BODIES["0.shard"]
        s3.wait_abandoned(1)
        assert store.stats().retries == 1


def test_small_files_are_read_through_faults(s3, tmp_path):
    with opened(s3, tmp_path) as store:
        s3.plan(Fault(status=503), Fault(send=3, cut=True))
        assert store.read("dataset.json") == b'{"format": 1}'
        with pytest.raises(DataError, match=f"{s3.url}/nothing.json: not there"):
            store.read("nothing.json")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "said"), [(401, "credentials"), (403, "credentials"), (404, "not there"), (400, "refuses"), (301, "region")]
)
def test_what_does_not_pass_is_told_at_once(s3, tmp_path, status, said):
    with opened(s3, tmp_path) as store:
        s3.plan(Fault(status=status))
        with pytest.raises(DataError, match=f"(?s)^{s3.url}/0.shard: [^\n]*{said}[^\n]*$"):
            read(store, "0.shard")
        assert len(s3.requests) == 1
    assert left(tmp_path) == []


def test_attempts_come_to_an_end(s3, tmp_path):
    with opened(s3, tmp_path, retries=1) as store:
        s3.plan(Fault(status=500), Fault(send=10, cut=True))
        with pytest.raises(StorageError, match=r"0\.shard: failed 2 times, .*body error"):
            read(store, "0.shard")
        assert left(tmp_path) == []
        assert read(store, "0.shard") == BODIES["0.shard"]  # the next fetch begins anew


@pytest.mark.parametrize("new", [np.random.default_rng(99).bytes(SIZE), b"short", bytes(SIZE + 1)])
def test_an_object_that_changed_is_refused_by_name(s3, tmp_path, new):
    old = np.random.default_rng(98).bytes(SIZE)
    s3.put("changing.shard", new)
    listed, has = wanted("", old).sha256, wanted("", new).sha256
    with opened(s3, tmp_path) as store:
        with pytest.raises(DataError, match=r"/changing\.shard: changed under us: .*twice") as error:
            read(store, "changing.shard", old)
        assert (
            (listed in str(error.value) and has in str(error.value))
            if len(new) == SIZE
            else f"{len(new)} bytes" in str(error.value)
        )
        assert left(tmp_path) == [] and len(s3.requests) == 2
        s3.put("changing.shard", old)
        assert read(store, "changing.shard", old) == old


def test_a_header_that_no_digest_covers_is_checked_too(s3, tmp_path):
    info = write_shard(tmp_path / "real.shard", [np.arange(50) for _ in range(40)], 2)
    body = (tmp_path / "real.shard").read_bytes()
    s3.put("real.shard", body)
    want = IndexedFile("real.shard", len(body), info.sha256, check=lambda path: open_shard(path, info) and None)
    with opened(s3, tmp_path / "cache") as store:
        s3.plan(Fault(flip=20), None)  # the count of tokens, in the header
        with store.fetch(want) as path:
            shard = open_shard(path, info)
        assert store.stats().retries == 1 and np.array_equal(shard.tokens, np.tile(np.arange(50), 40))
        path.unlink()
        s3.plan(Fault(flip=0), Fault(flip=0))
        with pytest.raises(DataError, match=r"real\.shard: changed under us: .*not a token shard"), store.fetch(want):
            pass
    assert left(tmp_path / "cache") == []


def test_a_late_request_is_raced_by_a_second(s3, tmp_path):
    with opened(s3, tmp_path, bytes=2 * SIZE, timeout=600) as store, ThreadPoolExecutor(1) as pool:
        for n in range(24):
            read(store, f"{n % 8}.shard")
        before = store.stats()
        s3.plan(Fault(send=50_000, gate=threading.Event()))  # would never end
        asked = len(s3.requests)
        assert pool.submit(read, store, "0.shard").result(timeout=60) == BODIES["0.shard"]
        after = store.stats()
        assert (after.hedges - before.hedges, after.hedges_won - before.hedges_won, after.retries) == (1, 1, 0)
        s3.wait_abandoned(1)  # the late one was dropped, not left to run
        assert s3.requests[asked:] == ["0.shard"] * 2
    assert [name for name in left(tmp_path) if name.endswith(".part")] == []


def test_second_requests_keep_to_their_budget(s3, tmp_path):
    with opened(s3, tmp_path, bytes=2 * SIZE) as store:
        for n in range(20):
            read(store, f"{n % 8}.shard")
        s3.always(lambda n: Fault(delay=0.05 + 0.01 * (n % 7)))  # everything is late at once
        for n in range(30):
            read(store, f"{n % 8}.shard")
        stats = store.stats()
        assert 1 <= stats.hedges <= 1 + 0.1 * stats.requests
    with opened(s3, tmp_path, bytes=2 * SIZE, hedge=0) as store:
        s3.always(None)
        for n in range(24):
            read(store, f"{n % 8}.shard")
        s3.always(lambda _: Fault(delay=0.3))
        read(store, "0.shard")
        assert store.stats().hedges == 0


def test_files_come_ahead_as_many_as_half_the_cache_holds(s3, tmp_path):
    with opened(s3, tmp_path, bytes=6 * SIZE, parallel=2) as store:
        store.prefetch(wanted(f"{n}.shard") for n in range(6))
        until(lambda: len(left(tmp_path)) == 3 and not list(tmp_path.glob("*.part")))
        assert sorted(s3.requests) == ["0.shard", "1.shard", "2.shard"]
        for n in range(3):
            assert read(store, f"{n}.shard") == BODIES[f"{n}.shard"]
        assert (store.stats().hits, store.stats().misses) == (3, 0)


def test_what_fails_ahead_is_told_by_the_fetch(s3, tmp_path):
    with opened(s3, tmp_path) as store:
        store.prefetch([wanted("gone.shard", b"x" * SIZE), wanted("1.shard")])
        until(lambda: left(tmp_path) == [f"{wanted('1.shard').sha256}.data"])
        with pytest.raises(DataError, match=r"/gone\.shard: not there"):
            read(store, "gone.shard", b"x" * SIZE)


def test_a_newer_look_ahead_takes_the_place_of_the_last(s3, tmp_path):
    gate = threading.Event()
    s3.plan(Fault(send=1000, gate=gate))
    with opened(s3, tmp_path, parallel=1) as store:
        store.prefetch([wanted("0.shard"), wanted("1.shard"), wanted("2.shard")])
        s3.wait_for(1)
        assert read(store, "3.shard") == BODIES["3.shard"]  # what is needed now does not queue
        store.prefetch([wanted("4.shard")])
        gate.set()
        until(lambda: len(left(tmp_path)) == 3 and not list(tmp_path.glob("*.part")))
    assert s3.requests == ["0.shard", "3.shard", "4.shard"]


def test_closing_and_leaving_half_way_is_clean(s3, tmp_path):
    gate = threading.Event()
    s3.always(lambda _: Fault(send=1000, gate=gate))
    store = opened(s3, tmp_path)
    store.prefetch([wanted("0.shard"), wanted("1.shard")])
    s3.wait_for(2)
    store.close()
    store.close()
    assert left(tmp_path) == [] and not list(tmp_path.glob("*.user"))
    one = wanted("0.shard")
    told = {"url": s3.url, "folder": str(tmp_path), "options": s3.options, "wanted": [one.name, one.size, one.sha256]}
    for count in range(3, 8):
        command = [sys.executable, "-c", LEAVER, json.dumps(told)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            s3.wait_for(count)
            assert (process.communicate("", timeout=60)[1], process.returncode) == ("", 0)
        assert left(tmp_path) == []


def test_addresses(s3, tmp_path):
    limits = CacheLimits(tmp_path / "cache")
    for url, said in [("ftp://host/x", "s3://"), ("s3://", "cannot be opened"), ("file:///not/there", "cannot be opened")]:
        with pytest.raises(DataError, match=f"^{url}.*{said}"):
            open_store(url, limits)
    with pytest.raises(DataError, match=r"s3://bucket.*cannot be opened: .*no_such_option"):
        open_store("s3://bucket", limits, {"no_such_option": "1"})
    with (
        pytest.raises(StorageError, match=r"^http://127\.0\.0\.1:1/x/a: failed 1 times") as error,
        open_store("http://me:secret@127.0.0.1:1/x?sig=hidden", CacheLimits(tmp_path / "cache", retries=0)) as store,
    ):
        store.read("a")
    assert not any(word in str(error.value) for word in ("me:", "secret", "hidden"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^data\.cache\.folder: cannot use .*file"):
        open_store(s3.url, CacheLimits(tmp_path / "file"), s3.options)


@pytest.fixture
def served(tmp_path):
    """The address of a plain web server of the folder `there`."""
    (tmp_path / "there").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "there")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()
        thread.join()


def test_other_kinds_of_store(served, tmp_path):
    (tmp_path / "there" / "0.shard").write_bytes(BODIES["0.shard"])
    for url in (f"file://{tmp_path}/there", served):
        with open_store(url, CacheLimits(tmp_path / "cache")) as store:
            assert read(store, "0.shard") == BODIES["0.shard"]
            assert store.stats().misses == 1
            with pytest.raises(DataError, match=f"^{url}/none: not there"):
                store.read("none")
        for path in (tmp_path / "cache").glob("*.data"):
            path.unlink()
