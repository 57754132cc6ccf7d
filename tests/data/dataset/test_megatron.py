"""Megatron's .bin/.idx: what its own IndexedDataset writes we read, what we write it reads, and nothing else passes."""

import importlib.util
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mikoshi.data.dataset.megatron import open_megatron, rewrite_in_order, sampled_digest, verify_megatron, write_megatron
from mikoshi.data.dataset.shards import Shard, open_shard, write_shard
from mikoshi.data.errors import DataError

CODES = {"uint16": 8, "int32": 4, "int64": 5, "int16": 3}


def documents_of(shard):
    return [d.tolist() for d in np.split(shard.tokens, shard.ends.astype(np.int64)[:-1])]


def as_shard(documents, dtype=np.uint32):
    ends = np.cumsum([len(d) for d in documents], dtype=np.uint64)
    return Shard(Path("memory"), np.concatenate(documents).astype(dtype), ends)


def by_the_layout(prefix, sequences, documents, dtype="int32", modes=None, gap=0, order=None):
    """A corpus written from the published layout alone. `documents`: the first sequence of each and the number of all.
    `order` is in which order the sequences lie in the .bin, `gap` the bytes between them."""
    order = order or range(len(sequences))
    raw, pointers = b"", [0] * len(sequences)
    for number in order:
        pointers[number] = len(raw)
        raw += np.array(sequences[number], dtype=dtype).tobytes() + b"\0" * gap
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(documents)}q", *documents)
    index += struct.pack(f"<{len(modes)}b", *modes) if modes else b""
    prefix.with_name(prefix.name + ".bin").write_bytes(raw)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


SEQUENCES = [[1, 2, 3], [4], [], [5, 6, 7, 8], [9, 10]]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("modes", [None, [0] * 5])
def test_documents_are_those_of_the_index_whatever_sequences_they_are_made_of(tmp_path, dtype, modes):
    prefix = by_the_layout(tmp_path / "c.v1_text", SEQUENCES, [0, 2, 3, 3, 4, 5], dtype, modes)
    shard = open_megatron(prefix)
    assert documents_of(shard) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]  # and no empty ones
    assert shard.tokens.dtype == (np.uint16 if "16" in dtype else np.uint32)
    assert shard.ends.flags.aligned and shard.ends.flags.c_contiguous, "searching would copy it every time"
    for suffix in (".bin", ".idx"):
        assert documents_of(open_megatron(f"{prefix}{suffix}")) == documents_of(shard)


def test_ids_of_every_size_that_the_types_hold(tmp_path):
    for dtype, ids in (("uint16", [0, 65_535]), ("int16", [32_767]), ("int32", [2**31 - 1]), ("int64", [70_000, 2**31 - 1])):
        prefix = by_the_layout(tmp_path / dtype, [ids], [0, 1], dtype)
        assert open_megatron(prefix).tokens.tolist() == ids
        verify_megatron(prefix)


# The reference: megatron-core in a process of its own, so that none of its imports or finalizers are in ours.
THEIRS = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

folder, count = sys.argv[1], int(sys.argv[2])

def documents(prefix):
    them = IndexedDataset(prefix)
    ends = them.document_indices
    read = [[np.array(them[i]) for i in range(a, b)] for a, b in zip(ends[:-1], ends[1:])]
    return {f"d{n:05}": np.concatenate([np.zeros(0, np.int64), *parts]) for n, parts in enumerate(read)}

for number in range(count):
    np.savez(f"{folder}/ours{number}.npz", **documents(f"{folder}/ours{number}"))
    draw = np.random.default_rng(number)
    dtype = [np.uint16, np.int32, np.int64][number % 3]
    high = 65536 if dtype == np.uint16 else 2**31
    builder = IndexedDatasetBuilder(f"{folder}/theirs{number}.bin", dtype=dtype)
    for _ in range(draw.integers(1, 60)):
        lengths = draw.integers(0, 300, draw.integers(1, 5)).tolist()
        ids = torch.from_numpy(draw.integers(0, high, sum(lengths)))
        if draw.random() < 0.5:
            builder.add_document(ids, lengths)
        else:
            for part in torch.split(ids, lengths):
                builder.add_item(part)
            builder.end_document()
    builder.add_document(torch.tensor([7]), [1])
    builder.finalize(f"{folder}/theirs{number}.idx")
    np.savez(f"{folder}/theirs{number}.npz", **documents(f"{folder}/theirs{number}"))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_core_reads_what_we_write_and_we_what_it_writes(tmp_path):
    count, draw, ours = 12, np.random.default_rng(5), {}
    for number in range(count):
        width = 2 if number % 2 else 4
        ids = [draw.integers(0, 1 << (16 if width == 2 else 31), n) for n in draw.integers(1, 900, draw.integers(1, 80))]
        half = len(ids) // 2
        shards = []
        for part, documents in enumerate(filter(len, (ids[:half], ids[half:]))):
            write_shard(tmp_path / f"{number}.{part}.shard", documents, width)
            shards.append(open_shard(tmp_path / f"{number}.{part}.shard"))
        write_megatron(tmp_path / f"ours{number}", shards, width)
        ours[number] = [i.tolist() for i in ids]
    command = [sys.executable, "-P", "-c", THEIRS, str(tmp_path), str(count)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for number in range(count):
        with np.load(tmp_path / f"ours{number}.npz") as read:
            assert [read[name].tolist() for name in sorted(read)] == ours[number]
        assert documents_of(open_megatron(tmp_path / f"ours{number}")) == ours[number]
        with np.load(tmp_path / f"theirs{number}.npz") as read:
            expected = [read[name].tolist() for name in sorted(read) if len(read[name])]
        assert documents_of(open_megatron(tmp_path / f"theirs{number}")) == expected
        verify_megatron(tmp_path / f"theirs{number}")


def patched(path, at, raw):
    path.write_bytes(path.read_bytes()[:at] + raw + path.read_bytes()[at + len(raw) :])


# In the corpus of these tests the lengths begin at byte 34, the pointers at 54, the documents at 94, and the .idx ends
# at 126; the .bin has 40 bytes.
@pytest.mark.parametrize(
    ("suffix", "harm", "told"),
    [
        ("idx", lambda p: p.unlink(), r"c\.idx: cannot read .*No such file"),
        ("bin", lambda p: p.unlink(), r"c\.bin: cannot read .*No such file"),
        ("idx", lambda p: p.write_bytes(b""), "not a Megatron index"),
        ("idx", lambda p: patched(p, 0, b"TNTIDX"), "not a Megatron index"),
        ("idx", lambda p: patched(p, 9, b"\2"), "version 2 "),
        ("idx", lambda p: patched(p, 17, b"\7"), r"type 7 \(float32\)"),
        ("idx", lambda p: patched(p, 17, b"\x63"), r"type 99 \(unknown\)"),
        ("idx", lambda p: patched(p, 18, struct.pack("<Q", 2**60)), "126 bytes, its header says .*truncated"),
        ("idx", lambda p: p.write_bytes(p.read_bytes()[:-1]), "125 bytes, its header says 126: truncated"),
        ("idx", lambda p: p.write_bytes(p.read_bytes() + b"\0\0\1\0\0"), "sequence 2 has mode 1"),
        ("idx", lambda p: patched(p, 34, struct.pack("<i", -3)), "sequence 0 is -3 ids"),
        ("idx", lambda p: patched(p, 46, struct.pack("<i", 3)), "sequence 4 is at byte 32.* ends at 28"),
        ("idx", lambda p: patched(p, 50, struct.pack("<i", 1)), "has 40 bytes, but .* add up to 36"),
        ("idx", lambda p: patched(p, 54, struct.pack("<q", 4)), "sequence 0 is at byte 4, .* ends at 0: .*in-order"),
        ("idx", lambda p: patched(p, 62, struct.pack("<q", -4)), "sequence 1 .* at byte -4: truncated"),
        ("idx", lambda p: patched(p, 94, struct.pack("<q", 1)), "documents go from 1 to 5"),
        ("idx", lambda p: patched(p, 118, struct.pack("<q", 4)), "documents go from 0 to 4, its sequences from 0 to 5"),
        ("idx", lambda p: patched(p, 102, struct.pack("<q", 4)), "document 1 goes from sequence 4 to 3"),
        ("bin", lambda p: p.write_bytes(b""), "the corpus is empty"),
        ("bin", lambda p: p.write_bytes(p.read_bytes()[:-4]), "has 36 bytes, but sequence 4 is 2 ids .*truncated"),
        ("bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), "has 39 bytes, but sequence 4 .*truncated"),
        ("bin", lambda p: p.write_bytes(p.read_bytes() + b"\0" * 4), "has 44 bytes, but .* add up to 40"),
        ("bin", lambda p: patched(p, 8, struct.pack("<i", -5)), "token 2 is -5, which is negative"),
        ("bin", lambda p: patched(p, 8, struct.pack("<i", 99)), "token 2 is 99, which is outside the vocabulary of 64"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(tmp_path, suffix, harm, told):
    prefix = by_the_layout(tmp_path / "c", SEQUENCES, [0, 2, 3, 5])
    assert len(open_megatron(prefix, vocab=64).ends) == 2
    harm(tmp_path / f"c.{suffix}")
    with pytest.raises(DataError, match=told) as caught:
        open_megatron(prefix, vocab=64)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_int64_id_that_is_too_large_is_not_cut_to_its_lower_half(tmp_path):
    with pytest.raises(DataError, match=r"token 1 is 4294967297, which does not fit 31 bits"):
        open_megatron(by_the_layout(tmp_path / "c", [[3, 2**32 + 1]], [0, 1], "int64"))


def test_digests_know_the_corpus_again_and_the_whole_one_every_bit(tmp_path):
    ids = np.arange(3_000_000, dtype=np.uint32) % 50_000
    info = write_megatron(tmp_path / "c", [as_shard(np.split(ids, 3000))], 4)
    sampled, whole = sampled_digest(tmp_path / "c"), verify_megatron(tmp_path / "c")
    assert info.digest == whole
    open_megatron(tmp_path / "c", vocab=50_000, expected=sampled)
    write_megatron(tmp_path / "d", [as_shard(np.split((ids + 1) % 50_000, 3000))], 4)
    with pytest.raises(DataError, match="not the corpus that this run began with"):
        open_megatron(tmp_path / "d", expected=sampled)
    for at, raw, told in (
        (6_000_004, b"\7", "does not match its digest"),
        (6_000_003, b"\x80", "token 1500000 is -.*negative"),
        (6_000_002, b"\7", "token 1500000 is .* outside the vocabulary of 50000"),
    ):
        before = (tmp_path / "c.bin").read_bytes()
        patched(tmp_path / "c.bin", at, raw)
        open_megatron(tmp_path / "c")  # a sample sees no single bit, and its documentation says so
        with pytest.raises(DataError, match=told):
            verify_megatron(tmp_path / "c", vocab=50_000, expected=whole)
        (tmp_path / "c.bin").write_bytes(before)
    assert verify_megatron(tmp_path / "c", vocab=50_000, expected=whole) == whole


@pytest.mark.parametrize("dtype", CODES)
def test_a_corpus_shuffled_in_its_index_is_refused_in_place_and_copied_in_order(tmp_path, dtype):
    prefix = by_the_layout(tmp_path / "c", SEQUENCES, [0, 2, 3, 5], dtype, gap=8, order=[3, 0, 4, 2, 1])
    with pytest.raises(DataError, match=r"not in the order of the \.bin"):
        open_megatron(prefix)
    rewrite_in_order(prefix, tmp_path / "new" / "c")
    assert documents_of(open_megatron(tmp_path / "new" / "c")) == [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    patched(tmp_path / "c.bin", 0, b"\xff" * 8)  # its first sequence in the .bin is document 1's
    if dtype != "uint16":
        with pytest.raises(DataError, match="token 0 is -1, which is negative"):
            rewrite_in_order(prefix, tmp_path / "again")
        assert not list(tmp_path.glob("again*"))


def test_writing_refuses_what_the_format_cannot_say(tmp_path):
    with pytest.raises(DataError, match=r"token 1 is 70000, which uint16 does not hold"):
        write_megatron(tmp_path / "c", [as_shard([[1, 70_000]])], 2)
    with pytest.raises(DataError, match=r"token 0 is 2147483648, which int32 does not hold"):
        write_megatron(tmp_path / "c", [as_shard([[1 << 31]])], 4)
    with pytest.raises(DataError, match="not one token"):
        write_megatron(tmp_path / "c", [], 2)
    asked = Shard(Path("a.shard"), np.ones(4, np.uint16), np.array([4], np.uint64), np.array([12], np.uint8))
    with pytest.raises(DataError, match=r"a\.shard: has tokens that are not predicted"):
        write_megatron(tmp_path / "c", [asked], 2)
    assert not list(tmp_path.iterdir())
    write_megatron(tmp_path / "c", [as_shard([[1, 2]])], 2)
    with pytest.raises(DataError, match=r"c\.idx: exists already"):
        write_megatron(tmp_path / "c", [as_shard([[3]])], 2)
    assert open_megatron(tmp_path / "c").tokens.tolist() == [1, 2]


ENDLESS = """
import sys
from itertools import repeat
from pathlib import Path
import numpy as np
from mikoshi.data.dataset.megatron import write_megatron
from mikoshi.data.dataset.shards import Shard
shard = Shard(Path("memory"), np.ones(1 << 16, np.uint16), np.array([1 << 16], np.uint64))
write_megatron(sys.argv[1], repeat(shard), 2)
"""


def test_a_writer_that_is_killed_leaves_no_corpus_and_the_next_one_clears_up(tmp_path):
    prefix = tmp_path / "c"
    writer = subprocess.Popen([sys.executable, "-c", ENDLESS, str(prefix)], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size > 1 << 20 for p in tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
    finally:
        writer.kill()
        writer.wait()
    assert any(tmp_path.iterdir()), "the case needs a writer that had begun"
    with pytest.raises(DataError, match="No such file"):
        open_megatron(prefix)
    (tmp_path / "c.bin").write_bytes(b"killed between the two renames")
    with pytest.raises(DataError, match=r"c\.idx: cannot read"):
        open_megatron(prefix)
    write_megatron(prefix, [as_shard([[1, 2], [3]])], 2)
    assert documents_of(open_megatron(prefix)) == [[1, 2], [3]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_memory_is_bounded_whatever_is_written(tmp_path):
    shard = as_shard(np.split(np.arange(1 << 20, dtype=np.uint32) % 50_000, 1 << 14))
    tracemalloc.start()
    write_megatron(tmp_path / "c", (shard for _ in range(40)), 4)  # 160 MiB of ids, 13 MiB of index
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 48 << 20
    read = open_megatron(tmp_path / "c")
    assert len(read.tokens) == 40 << 20 and len(read.ends) == 40 << 14 and int(read.ends[-1]) == len(read.tokens)
    assert np.array_equal(read.tokens[-(1 << 20) :], shard.tokens)
