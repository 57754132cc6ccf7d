"""Files of pieces are what the safetensors library reads and writes, and a header that lies is refused by the file's name."""

import hashlib
import json
import random
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128_hexdigest

from mikoshi.trainer.checkpoint.manifest import DTYPES
from mikoshi.trainer.checkpoint.pieces import bytes_of, dtype_named, lay_out, piece_file, write
from mikoshi.trainer.checkpoint.storage.digests import DigestPair
from mikoshi.trainer.checkpoint.storage.files import read_through
from mikoshi.trainer.errors import CheckpointError


def of_every_dtype():
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (), (2, 1, 3), (0, 4)]
    return {
        f'{name} ü "{number}': torch.randint(0, 100, shape, dtype=torch.uint8).view(torch.uint8).to(dtype_named(name))
        for name in DTYPES
        for number, shape in enumerate(shapes)
    }


def written(path, tensors):
    contents = lay_out(path.name, [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()])
    with path.open("wb") as out:
        digests = write(out, contents.header, [bytes_of(tensors[piece.key]) for piece in contents.pieces], threading.Event())
    assert path.stat().st_size == len(contents.header) + contents.bytes
    content, again = path.read_bytes(), DigestPair()
    read_through(path, again.update)
    assert digests == again.hexdigests()
    assert digests == {"sha256": hashlib.sha256(content).hexdigest(), "xxh3": xxh3_128_hexdigest(content)}
    return contents


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_the_library_reads_what_is_written_of_every_dtype(tmp_path):
    tensors = of_every_dtype()
    contents = written(tmp_path / "a.safetensors", tensors)
    assert len(contents.header) % 8 == 0
    assert all(piece.start % piece.dtype.itemsize == 0 for piece in contents.pieces)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape, raw(found[name])) == (tensor.dtype, tensor.shape, raw(tensor))


def test_what_the_library_writes_is_read_of_every_dtype(tmp_path):
    tensors = of_every_dtype()
    save_file(tensors, tmp_path / "a.safetensors")
    with piece_file(tmp_path / "a.safetensors") as file:
        for name, tensor in tensors.items():
            target = torch.zeros_like(tensor)
            file.fill(name, (0,) * tensor.ndim, tensor.shape, target)
            assert raw(target) == raw(tensor)


def test_any_box_of_a_piece_is_read_into_any_kind_of_target(tmp_path):
    whole = torch.randn(6, 5, 4)
    written(tmp_path / "a", {"w": whole})
    rng = random.Random(0)
    with piece_file(tmp_path / "a") as file:
        for _ in range(100):
            offset = [rng.randrange(n) for n in whole.shape]
            shape = [rng.randint(0, n - o) for n, o in zip(whole.shape, offset, strict=True)]
            box = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            dtype = rng.choice([torch.float32, torch.bfloat16])
            strided = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
            for target in (torch.zeros(shape, dtype=dtype), strided):
                file.fill("w", offset, shape, target)
                assert torch.equal(target, box.to(dtype))


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


LIES = {
    "longer than the file": (1 << 40, b"{}"),
    "empty": (0, b""),
    "not JSON": (None, b"\x80\x04\x95 pickle"),
    "not a table": (None, b"[1, 2]"),
    "deep": (None, b"[" * 100_000),
    "no entry": (None, json.dumps({"w": 3}).encode()),
    "unknown dtype": (None, json.dumps({"w": entry("OBJECT")}).encode()),
    "out of the file": (None, json.dumps({"w": entry(span=(0, 1 << 50), shape=(1 << 48,))}).encode()),
    "too short for its shape": (None, json.dumps({"w": entry(shape=(1 << 40,))}).encode()),
    "negative": (None, json.dumps({"w": entry(shape=(-2,), span=(8, 0))}).encode()),
    "from behind": (None, json.dumps({"w": entry(span=(8, 0))}).encode()),
    "fraction": (None, json.dumps({"w": entry(span=(0.0, 8.0))}).encode()),
    "truth": (None, json.dumps({"w": entry(shape=(True, 2))}).encode()),
    "text": (None, json.dumps({"w": entry(span=("0", "8"))}).encode()),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    length, header = LIES[lie]
    file = tmp_path / "a.safetensors"
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: damaged"), piece_file(file):
        pass


def test_a_write_that_is_stopped_ends_soon(tmp_path):
    stop = threading.Event()

    def parts():
        yield torch.zeros(8, dtype=torch.uint8)
        stop.set()
        yield torch.zeros(1 << 30, dtype=torch.uint8)

    with (tmp_path / "a").open("wb") as out, pytest.raises(InterruptedError):
        write(out, b"", parts(), stop)
    assert (tmp_path / "a").stat().st_size == 8
