"""A storage that does not answer now is told apart from data that cannot be used, and a read that hangs ends nobody's wait."""

import errno
import threading
import time
from pathlib import Path

import obstore
import pyarrow as pa
import pytest
from obstore.store import S3Store

from faulty import Fault
from handles import no_handles, read_without
from mikoshi.data.dataset.dataset import open_dataset
from mikoshi.data.dataset.shards import TRAIN, open_shard, read_index, verify_shard
from mikoshi.data.dataset.split import open_corpus
from mikoshi.data.errors import DataError, StorageError, storage_error
from mikoshi.data.io.cache import Cache
from mikoshi.data.io.fetch import CacheLimits
from mikoshi.data.io.files import list_files, source_errors_named
from mikoshi.data.loader import prefetch
from mikoshi.data.loader.loader import Loader
from mikoshi.data.loader.prefetch import prefetched
from mikoshi.data.prepare.pool import run_jobs
from mikoshi.data.prepare.workspace import write_errors_named
from mikoshi.data.sampling.curriculum import MixtureRequest, new_history
from mikoshi.data.sampling.sampler import make_sampler
from mikoshi.data.sources.chat import load_chat_template
from mikoshi.data.sources.columns import _is_disk_error
from mikoshi.data.sources.sources import SourceSpec, documents, open_source, pieces
from mikoshi.data.tokenizer.tokenizer import load_tokenizer
from stores import BODIES, opened, read


def loader(folder):
    corpus = open_corpus(open_dataset(str(folder), CacheLimits(Path(folder))), TRAIN, 32, "cut")
    made = Loader(make_sampler((corpus,), new_history(MixtureRequest(((0, {"": 1.0}),), {"": None})), 1), 24, 0, 1, True)
    made.resume_at(0, "")
    return made


def test_it_is_no_mistake_of_the_user():
    assert not issubclass(StorageError, (DataError, ValueError))


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENOMEM", "EMFILE", "EAGAIN", "EHOSTDOWN", "ENOTCONN"])
def test_what_may_pass(name):
    error = storage_error(OSError(getattr(errno, name), "why"), "x: cannot be read: why", "prepare the data again")
    assert (type(error), str(error)) == (StorageError, "x: cannot be read: why; try again when the storage answers")


@pytest.mark.parametrize("name", ["ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ELOOP", "EROFS", "ENOSPC", "EDQUOT"])
def test_what_lasts(name):
    error = storage_error(OSError(getattr(errno, name), "why"), "x: cannot be read: why", "prepare the data again")
    assert (type(error), str(error)) == (DataError, "x: cannot be read: why; prepare the data again")


READS = {
    "the dataset": lambda folder: open_dataset(str(folder), CacheLimits(folder)),
    "the index": read_index,
    "a shard": lambda folder: open_shard(folder / "train-00000.shard"),
    "all of a shard": lambda folder: verify_shard(folder / "train-00000.shard"),
    "the tokenizer": lambda folder: load_tokenizer(folder / "tokenizer.json"),
    "a chat template": lambda folder: load_chat_template(str(folder / "dataset.json")),
    "a folder of text": lambda folder: list_files(str(folder)),
}


@pytest.mark.parametrize("what", READS)
def test_a_local_read_that_fails_in_passing_is_no_data_error(dataset, what):
    with no_handles(), pytest.raises(StorageError, match=r"Too many open files; try again when the storage answers$") as caught:
        READS[what](Path(dataset))
    assert "\n" not in str(caught.value)


def test_small_files_and_raw_text_too(dataset, tmp_path):
    opened_one = open_dataset(str(dataset), CacheLimits(tmp_path))
    (tmp_path / "a.txt").write_text("some text")
    source = open_source(SourceSpec(str(tmp_path / "a.txt")))
    (piece,) = pieces(source, 1 << 20)
    for failing in (
        lambda: opened_one.read("tokenizer.json"),
        lambda: opened_one.mapped("tokenizer.json", 1, ""),
        lambda: opened_one.shard(opened_one.shards(TRAIN)[0]),
        lambda: list(documents(source, piece)),
    ):
        with no_handles(), pytest.raises(StorageError, match="Too many open files"):
            failing()
    assert [d.text for d in documents(source, piece)] == ["some text"]


def test_a_disk_that_fails_while_preparing_is_no_data_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*: Input/output error"), write_errors_named(tmp_path / "data"):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("workers", [1, 2])
def test_it_comes_out_of_a_worker_as_it_was(workers):
    with pytest.raises(StorageError, match=f"^{__file__}: cannot be read: Too many open files"):
        list(run_jobs(read_without, None, [__file__, __file__], workers, lambda *_: None))


@pytest.mark.parametrize(
    ("fault", "kind"), [(Fault(status=503), StorageError), (Fault(status=429), StorageError), (Fault(status=403), DataError),
                        (Fault(status=404), DataError), (Fault(status=400), DataError), (Fault(send=9, cut=True), StorageError)]
)  # fmt: skip
def test_a_bucket_of_text_that_does_not_answer(s3, fault, kind):
    options = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
    store = S3Store("bucket", config=s3.options, **options)
    s3.plan(fault)
    with pytest.raises(kind, match=r"^data\.source: a cannot be read: "), source_errors_named("a"):
        obstore.get(store, "sets/web/0.shard").bytes()


def test_a_reader_of_columns_tells_a_store_from_a_broken_file():
    class StoreError(OSError):  # as the Hub's client has them: without a number
        pass

    assert _is_disk_error(StoreError("503")) and _is_disk_error(TimeoutError()) and _is_disk_error(OSError(errno.EIO, "why"))
    with pytest.raises((pa.ArrowException, OSError)) as caught:
        pa.ipc.open_file(pa.py_buffer(b"ARROW1\0\0" + b"x" * 64 + b"ARROW1"))
    assert not _is_disk_error(caught.value)


def test_a_store_that_is_gone_for_long_and_a_cache_folder_that_fails(s3, tmp_path):
    with opened(s3, tmp_path, retries=0) as store:
        assert read(store, "0.shard") == BODIES["0.shard"]
        with no_handles(), pytest.raises(StorageError, match=r"^data\.cache\.folder: cannot use .*: Too many open files"):
            read(store, "0.shard")
        assert read(store, "0.shard") == BODIES["0.shard"]
        s3.plan(Fault(status=503))
        with pytest.raises(StorageError, match=r"1\.shard: failed 1 times"):
            read(store, "1.shard")
        s3.plan(Fault(status=503))
        with pytest.raises(StorageError, match=r"dataset\.json: failed 1 times"):
            store.read("dataset.json")
        assert read(store, "1.shard") == BODIES["1.shard"]
    with no_handles(), pytest.raises(StorageError, match=r"cannot use .* \(Too many open files\)"):
        Cache(tmp_path, 1 << 20, "", 1.0)


def test_a_cache_that_another_keeps_locked(tmp_path):
    cache = Cache(tmp_path, 1 << 20, "", 0.05)
    with cache._exclusive(), pytest.raises(StorageError, match=r"data\.cache\.folder: .* has been locked by another process"):
        cache.other_users()
    assert cache.other_users() == []
    cache.close()


def test_it_is_raised_at_the_step_where_the_batch_was_due(dataset, monkeypatch):
    """Steps are read together; that one of them cannot be read is no matter of those before it, which are read once more."""
    calls, right = [], loader(dataset)
    real = Loader._batches

    def failing(self, step, count):
        calls.append((step, count))
        if step <= 6 < step + count:
            raise StorageError("the disk of step 6 does not answer")
        return real(self, step, count)

    monkeypatch.setattr(Loader, "_batches", failing)
    seen = []
    with pytest.raises(StorageError, match="step 6"):
        for batch in loader(dataset).stream(3, 12):
            seen.append(batch)  # noqa: PERF402 - those before the error are looked at
    assert [(b.tokens == right.batch(3 + n).tokens).all() for n, b in enumerate(seen)] == [True] * 3
    assert calls == [(3, 1), (4, 8), (5, 1), (6, 1)]


def test_a_read_that_hangs_keeps_nobody_from_ending(monkeypatch):
    monkeypatch.setattr(prefetch, "_PATIENCE", 0.05)
    gate, stuck = threading.Event(), threading.Event()

    def make(number):
        if number == 1:
            stuck.set()
            gate.wait(60)
        return number

    numbers = prefetched(make, 0, 5, 2)
    assert next(numbers) == 0
    assert stuck.wait(30)
    began = time.monotonic()
    numbers.close()
    assert time.monotonic() - began < 20
    (thread,) = [t for t in threading.enumerate() if t.name == "prefetch"]
    assert thread.daemon
    gate.set()
    thread.join(30)
    assert not thread.is_alive()


def test_what_was_left_behind_reading_does_not_meddle_with_a_loader_that_goes_on(dataset, monkeypatch):
    monkeypatch.setattr(prefetch, "_PATIENCE", 0.05)
    one, gate, stuck = loader(dataset), threading.Event(), threading.Event()

    def slow(_, step, _stop):
        if step == 1:
            stuck.set()
            gate.wait(60)

    monkeypatch.setattr(Loader, "_prefetch_shards", slow)
    batches = one.stream(0, 9)
    next(batches)
    assert stuck.wait(30)
    batches.close()
    going = threading.Thread(target=one.resume_at, args=(4, "from here"))
    going.start()
    going.join(0.1)
    assert going.is_alive()  # it waits for the read
    gate.set()
    going.join(30)
    assert not going.is_alive()
    for thread in [t for t in threading.enumerate() if t.name == "prefetch"]:
        thread.join(30)
    assert one._digests == {4: "from here"}
