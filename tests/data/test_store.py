"""Remote shards through a real S3 endpoint that fails in every way it can: what is handed out is whole, or it is an error."""

import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.shards import open_shard, write_shard
from data.store import CacheLimits, Wanted, open_store
from faulty import Fault, faulty_s3

ROOT = Path(__file__).parents[2]
SIZE = 200_064
BODIES = {f"{n}.shard": np.random.default_rng(n).bytes(SIZE) for n in range(8)}
BODIES["big.shard"] = np.random.default_rng(8).bytes(1_800_064)
HALF = 1_500_000  # of the big one: enough for some of it to be on disk

CLIENT = """
import hashlib, json, sys
from pathlib import Path
from data.store import CacheLimits, Wanted, open_store
told = json.loads(sys.argv[1])
with open_store(told["url"], CacheLimits(Path(told["folder"]), **told["limits"]), told["options"]) as store:
    for line in told["wanted"]:
        with store.fetch(Wanted(*line)) as path:
            print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
    if told["linger"]:
        sys.stdin.read()
"""

LEAVER = """
import json, sys
from pathlib import Path
from data.store import CacheLimits, Wanted, open_store
told = json.loads(sys.argv[1])
store = open_store(told["url"], CacheLimits(Path(told["folder"])), told["options"])
store.ahead([Wanted(*told["wanted"])])
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server():
    with faulty_s3({**BODIES, "dataset.json": b'{"format": 1}'}) as server:
        yield server


@pytest.fixture
def s3(server):
    server.forget()
    yield server
    server.forget()


def wanted(name, body=None, check=None):
    body = BODIES[name] if body is None else body
    return Wanted(name, len(body), hashlib.sha256(body[64:]).hexdigest(), check=check)


def opened(s3, folder, **limits):
    return open_store(s3.url, CacheLimits(folder, **{"timeout": 20, **limits}), s3.options)


def read(store, name, body=None):
    with store.fetch(wanted(name, body)) as path:
        return path.read_bytes()


def left(folder):
    """What is in the cache folder but locks and users."""
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".data", ".part"))


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.005)


@contextmanager
def client(s3, folder, names, linger=False, **limits):
    """A process that fetches `names`, each line of its output the digest of a whole file, and is killed in the end."""
    lines = [[w.name, w.size, w.sha256] for w in map(wanted, names)]
    told = {"url": s3.url, "folder": str(folder), "limits": {"timeout": 20, **limits}, "options": s3.options}
    command = [sys.executable, "-c", CLIENT, json.dumps({**told, "wanted": lines, "linger": linger})]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def digests(names):
    return [hashlib.sha256(BODIES[name]).hexdigest() for name in names]


PASSING = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429),
    "cut before the body": Fault(send=0, cut=True),
    "cut in the header": Fault(send=30, cut=True),
    "cut in the body": Fault(send=150_000, cut=True),
    "a bit flipped": Fault(flip=70_000),
    "truncated": Fault(shorten=8),
    "truncated to nothing": Fault(shorten=SIZE),
    "slow": Fault(delay=0.1),
}


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
        with pytest.raises(DataError, match=r"0\.shard: failed 2 times, .*body error"):
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
    want = Wanted("real.shard", len(body), info.sha256, check=lambda path: open_shard(path, info) and None)
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


def test_the_least_recently_used_goes_first_and_the_bound_holds(s3, tmp_path):
    with opened(s3, tmp_path, bytes=3 * SIZE) as store:
        for name in ("0.shard", "1.shard", "2.shard", "0.shard", "3.shard"):
            read(store, name)
            assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".user") <= 3 * SIZE
        assert left(tmp_path) == sorted(f"{wanted(f'{n}.shard').sha256}.data" for n in (0, 2, 3))
        assert store.stats().evictions == 1


def test_a_file_in_use_is_never_evicted_and_a_map_outlives_its_file(s3, tmp_path):
    with opened(s3, tmp_path, bytes=2 * SIZE) as store:
        with store.fetch(wanted("0.shard")) as path:
            for n in (1, 2, 3):
                assert read(store, f"{n}.shard") == BODIES[f"{n}.shard"]
            assert path.read_bytes() == BODIES["0.shard"]
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
        for n in (4, 5):
            read(store, f"{n}.shard")
        assert not path.exists() and mapped.tobytes() == BODIES["0.shard"]


def test_a_cache_too_small_is_told_with_its_key(s3, tmp_path):
    with (
        opened(s3, tmp_path, bytes=SIZE - 1) as store,
        pytest.raises(DataError, match=rf"^data\.cache_bytes: {SIZE - 1} .*0\.shard"),
    ):
        read(store, "0.shard")
    assert s3.requests == []
    with (
        opened(s3, tmp_path, bytes=2 * SIZE - 1, timeout=0.2) as store,
        store.fetch(wanted("0.shard")),
        pytest.raises(DataError, match=r"^data\.cache_bytes: .* no room for 1\.shard"),
    ):
        read(store, "1.shard")


def test_a_local_copy_of_another_size_is_fetched_again(s3, tmp_path):
    with opened(s3, tmp_path) as store:
        with store.fetch(wanted("0.shard")) as path:
            pass
        os.truncate(path, 1000)
        assert read(store, "0.shard") == BODIES["0.shard"]
        assert len(s3.requests) == 2


def test_threads_processes_and_stores_fetch_a_file_once(s3, tmp_path):
    with opened(s3, tmp_path) as one, opened(s3, tmp_path) as two, ThreadPoolExecutor(6) as pool, ExitStack() as stack:
        gate = threading.Event()
        s3.plan(Fault(send=1000, gate=gate))
        first = pool.submit(read, one, "0.shard")
        s3.wait_for(1)
        others = [pool.submit(read, store, "0.shard") for store in (one, two, one, two)]
        clients = [stack.enter_context(client(s3, tmp_path, ["0.shard"])) for _ in range(2)]
        for process in clients:
            until(lambda process=process: waits_for_lock(process, tmp_path))
        gate.set()
        assert {f.result() for f in (first, *others)} == {BODIES["0.shard"]}
        assert [process.communicate()[0].split() for process in clients] == [digests(["0.shard"])] * 2
    assert s3.requests == ["0.shard"]
    assert not list(tmp_path.glob("*.lock")) or left(tmp_path) == [f"{wanted('0.shard').sha256}.data"]


def waits_for_lock(process, folder):
    """The process has been at the lock of a file that another one fetches."""
    assert process.poll() is None
    names = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            names.add(link.readlink().name)
    return any(path.name in names for path in folder.glob("*.lock") if path.name != "folder.lock")


def test_the_other_takes_over_when_the_one_that_fetches_is_killed(s3, tmp_path):
    s3.plan(Fault(send=HALF, gate=threading.Event()))
    with client(s3, tmp_path, ["big.shard"]) as dying:
        s3.wait_for(1)
        until(lambda: any(p.stat().st_blocks for p in tmp_path.glob("*.part")))  # half of it is on disk
        with client(s3, tmp_path, ["big.shard", "1.shard"]) as other:
            until(lambda: waits_for_lock(other, tmp_path))
            assert s3.requests == ["big.shard"]
            dying.send_signal(signal.SIGKILL)
            assert dying.wait() == -signal.SIGKILL
            out, err = other.communicate(timeout=60)
            assert out.split() == digests(["big.shard", "1.shard"]), err
    assert s3.requests == ["big.shard", "big.shard", "1.shard"]
    assert left(tmp_path) == sorted(f"{wanted(n).sha256}.data" for n in ("big.shard", "1.shard"))


def test_a_process_that_hangs_with_the_lock_hangs_no_other(s3, tmp_path):
    gate = threading.Event()
    s3.plan(Fault(send=HALF, gate=gate))
    with client(s3, tmp_path, ["big.shard"]) as hung, opened(s3, tmp_path, timeout=0.3) as store:
        s3.wait_for(1)
        until(lambda: any(p.stat().st_blocks for p in tmp_path.glob("*.part")))
        hung.send_signal(signal.SIGSTOP)
        assert read(store, "big.shard") == BODIES["big.shard"]
        hung.send_signal(signal.SIGCONT)
        gate.set()
        out, err = hung.communicate(timeout=60)
        assert out.split() == digests(["big.shard"]), err
    assert left(tmp_path) == [f"{wanted('big.shard').sha256}.data"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 640 KiB: three files, and not a fourth."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_evicts_and_then_is_told_by_name(s3, small_disk):
    folder = small_disk / "cache"
    with opened(s3, folder) as store:  # its limit is far beyond the disk
        for n in range(5):
            assert read(store, f"{n}.shard") == BODIES[f"{n}.shard"]
        assert store.stats().evictions >= 2 and len(left(folder)) <= 3
        for path in folder.glob("*.data"):
            path.unlink()
        (small_disk / "of others").write_bytes(bytes(500_000))
        with pytest.raises(DataError, match=rf"^data\.cache: the disk of {folder} is full, .*7\.shard needs {SIZE} bytes"):
            read(store, "7.shard")
        assert left(folder) == []
        (small_disk / "of others").unlink()
        assert read(store, "7.shard") == BODIES["7.shard"]


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
        store.ahead(wanted(f"{n}.shard") for n in range(6))
        until(lambda: len(left(tmp_path)) == 3 and not list(tmp_path.glob("*.part")))
        assert sorted(s3.requests) == ["0.shard", "1.shard", "2.shard"]
        for n in range(3):
            assert read(store, f"{n}.shard") == BODIES[f"{n}.shard"]
        assert (store.stats().hits, store.stats().misses) == (3, 0)


def test_what_fails_ahead_is_told_by_the_fetch(s3, tmp_path):
    with opened(s3, tmp_path) as store:
        store.ahead([wanted("gone.shard", b"x" * SIZE), wanted("1.shard")])
        until(lambda: left(tmp_path) == [f"{wanted('1.shard').sha256}.data"])
        with pytest.raises(DataError, match=r"/gone\.shard: not there"):
            read(store, "gone.shard", b"x" * SIZE)


def test_a_newer_look_ahead_takes_the_place_of_the_last(s3, tmp_path):
    gate = threading.Event()
    s3.plan(Fault(send=1000, gate=gate))
    with opened(s3, tmp_path, parallel=1) as store:
        store.ahead([wanted("0.shard"), wanted("1.shard"), wanted("2.shard")])
        s3.wait_for(1)
        assert read(store, "3.shard") == BODIES["3.shard"]  # what is needed now does not queue
        store.ahead([wanted("4.shard")])
        gate.set()
        until(lambda: len(left(tmp_path)) == 3 and not list(tmp_path.glob("*.part")))
    assert s3.requests == ["0.shard", "3.shard", "4.shard"]


def test_runs_that_share_a_cache_know_of_each_other_by_name(s3, tmp_path):
    with opened(s3, tmp_path, user="mine") as store, opened(s3, tmp_path, user="mine"):
        assert store.others() == []
        with client(s3, tmp_path, ["0.shard"], linger=True, user="theirs", bytes=10 * SIZE) as process:
            process.stdout.readline()
            assert [f"theirs (pid {process.pid} on " in line and str(10 * SIZE) in line for line in store.others()] == [True]
        assert store.others() == []
        assert len(list(tmp_path.glob("*.user"))) == 2  # the killed one's is gone


def test_closing_and_leaving_half_way_is_clean(s3, tmp_path):
    gate = threading.Event()
    s3.always(lambda _: Fault(send=1000, gate=gate))
    store = opened(s3, tmp_path)
    store.ahead([wanted("0.shard"), wanted("1.shard")])
    s3.wait_for(2)
    store.close()
    store.close()
    assert left(tmp_path) == [] and not list(tmp_path.glob("*.user"))
    leave = CLIENT.replace("        with store.fetch(Wanted(*line)) as path:", "        if store.ahead([Wanted(*line)]):")
    leave = leave.replace("with open_store", "import time\nfor store in [open_store").replace(
        '["options"]) as store:', '["options"])]:'
    )
    told = {"url": s3.url, "folder": str(tmp_path), "limits": {}, "options": s3.options, "linger": True}
    told["wanted"] = [[w.name, w.size, w.sha256] for w in [wanted("0.shard")]]
    for count in range(3, 6):
        command = [sys.executable, "-c", leave, json.dumps(told)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
        pytest.raises(DataError, match=r"^http://127\.0\.0\.1:1/x/a: failed 1 times") as error,
        open_store("http://me:secret@127.0.0.1:1/x?sig=hidden", CacheLimits(tmp_path / "cache", retries=0)) as store,
    ):
        store.read("a")
    assert not {"me:", "secret", "hidden"} & set(str(error.value).replace("@", " ").split()) and "hidden" not in str(
        error.value
    )
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^data\.cache: cannot use .*file"):
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


@pytest.mark.slow
def test_nothing_wrong_is_ever_handed_out(s3, tmp_path):
    """Four processes in a cache that is too small for them, killed at random, behind a store that fails in every way."""
    chance = random.Random(7)
    kinds = [*PASSING.values(), Fault(send=100_000, cut=True), Fault(send=SIZE // 2, gate=threading.Event())]
    s3.always(lambda _: chance.choice(kinds) if chance.random() < 0.25 else None)
    right = {hashlib.sha256(BODIES[f"{n}.shard"]).hexdigest() for n in range(8)}
    limits = {"bytes": 4 * SIZE, "timeout": 2, "retries": 20}
    fetched = 0

    def one(seed, kill):
        own = random.Random(seed)
        names = [f"{own.randrange(8)}.shard" for _ in range(12)]
        with client(s3, tmp_path, names, **limits) as process:
            if kill:
                lines = [process.stdout.readline() for _ in range(own.randrange(6))]
                process.kill()
                return [line.strip() for line in lines], process.communicate()[0].split()
            out, err = process.communicate(timeout=300)
            told = out.split()
            assert told == digests(names)[: len(told)], err
            assert len(told) == 12 or "changed under us" in err, err  # spoilt twice in a row: told, not handed out
            return told, []

    with ThreadPoolExecutor(4) as pool:
        for lines, more in pool.map(one, range(24), [True, False, True, True] * 6):
            told = [line for line in (*lines, *more) if len(line) == 64]  # the last may have been cut by the kill
            assert set(told) <= right
            fetched += len(told)
    assert fetched > 60 and len(s3.requests) > 40
    with opened(s3, tmp_path, **limits) as store:
        s3.always(None)
        assert read(store, "0.shard") == BODIES["0.shard"]
        assert store.others() == []
        for path in tmp_path.glob("*.data"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in right
        assert sum(p.stat().st_size for p in (*tmp_path.glob("*.data"), *tmp_path.glob("*.part"))) <= 4 * SIZE
