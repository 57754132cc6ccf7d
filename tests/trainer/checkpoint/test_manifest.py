"""A manifest is believed only where all of it can be: whatever is wrong is refused with the file's name and the key."""

import copy
import hashlib
import itertools
import json
import random
import sys

import pytest
import torch

from mikoshi.trainer.checkpoint.manifest import FORMAT, encode, overlap, parse
from mikoshi.trainer.checkpoint.saver import save
from mikoshi.trainer.checkpoint.verify import read_manifest
from mikoshi.trainer.errors import CheckpointError

GOOD = {
    "format": FORMAT,
    "record": {"step": 3, "config": "x = 1"},
    "made": {"ranks": 2},
    "files": {
        "a.safetensors": {"size": 1000, "sha256": "0" * 64, "xxh3": "2" * 32},
        "b.safetensors": {"size": 1000, "sha256": "1" * 64, "xxh3": "3" * 32},
    },
    "tensors": {
        "w": {
            "dtype": "float32",
            "shape": [4, 6],
            "pieces": [
                {"offset": [0, 0], "shape": [4, 3], "file": "a.safetensors"},
                {"offset": [0, 3], "shape": [1, 3], "file": "b.safetensors"},
                {"offset": [1, 3], "shape": [3, 3], "file": "b.safetensors"},
            ],
        },
        "step": {"dtype": "float32", "shape": [], "pieces": [{"offset": [], "shape": [], "file": "a.safetensors"}]},
        "none": {"dtype": "bool", "shape": [0, 7], "pieces": []},
    },
}
PIECES = ("tensors", "w", "pieces")


def signed(body):
    """The file of this content: whoever made it can make the digest."""
    return b'{"sha256":"%s","content":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def changed(path, value):
    content = copy.deepcopy(GOOD)
    at = content
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return signed(json.dumps(content, separators=(",", ":")).encode())


def piece(offset, shape, file="a.safetensors"):
    return {"offset": offset, "shape": shape, "file": file}


FILE = {"size": 1, "sha256": "0" * 64, "xxh3": "0" * 32}
NAMES = ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\0b", "a\nb", "manifest.json", "x" * 300, "a\\b", "C:x", "é"]
BAD = {
    **{f"file {name[:20]!r}": (("files", name), FILE, "is not the name of a file") for name in NAMES},
    "format of text": (("format",), "2", "format"),
    "format of truth": (("format",), True, "format"),
    "no format": (("format",), None, "format"),
    "other format": (("format",), 1, "format 1 is not 2: another version"),
    "no record": (("record",), None, "'record' is missing"),
    "record": (("record",), [], "record: not a table"),
    "no step": (("record", "step"), None, "record.step"),
    "negative step": (("record", "step"), -1, "record.step"),
    "half a step": (("record", "step"), 2.5, "record.step"),
    "step of truth": (("record", "step"), True, "record.step"),
    "huge step": (("record", "step"), 1 << 70, "record.step"),
    "config": (("record", "config"), {"run": 1}, "record.config"),
    "made": (("made",), 3, "made: not a table"),
    "unknown key": (("more",), 3, "'more' is not known"),
    "files": (("files",), ["a.safetensors"], "files: not a table"),
    "file": (("files", "a.safetensors"), 1000, "not a table"),
    "size": (("files", "a.safetensors", "size"), -1, "size"),
    "size of text": (("files", "a.safetensors", "size"), "1000", "size"),
    "size of a fraction": (("files", "a.safetensors", "size"), 1000.0, "size"),
    "too small": (("files", "a.safetensors", "size"), 10, "too small for its pieces"),
    "digest": (("files", "a.safetensors", "sha256"), "00", "sha256"),
    "digest of a number": (("files", "a.safetensors", "sha256"), 0, "sha256"),
    "long digest": (("files", "a.safetensors", "sha256"), "0" * 65, "sha256: not 64 hexadecimal digits"),
    "xxh3": (("files", "a.safetensors", "xxh3"), "0" * 31, "xxh3: not 32 hexadecimal digits"),
    "xxh3 of letters": (("files", "a.safetensors", "xxh3"), "g" * 32, "xxh3: not 32 hexadecimal digits"),
    "xxh3 in capitals": (("files", "a.safetensors", "xxh3"), "A" * 32, "xxh3: not 32 hexadecimal digits"),
    "xxh3 and a line": (("files", "a.safetensors", "xxh3"), "0" * 31 + "\n", "xxh3: not 32 hexadecimal digits"),
    "xxh3 of a number": (("files", "a.safetensors", "xxh3"), 10**31, "xxh3: not 32 hexadecimal digits"),
    "xxh3 of a list": (("files", "a.safetensors", "xxh3"), ["0"] * 32, "xxh3: not 32 hexadecimal digits"),
    "no xxh3": (("files", "a.safetensors", "xxh3"), None, "'xxh3' is missing"),
    "no sha256": (("files", "a.safetensors", "sha256"), None, "'sha256' is missing"),
    "key of a file": (("files", "a.safetensors", "url"), "http://x", "'url' is not known"),
    "file that is not listed": (("files", "b.safetensors"), None, "is not in files"),
    "tensors": (("tensors",), [], "tensors: not a table"),
    "dtype": (("tensors", "w", "dtype"), "object", "dtype"),
    "dtype of torch": (("tensors", "w", "dtype"), "load", "dtype"),
    "dunder": (("tensors", "w", "dtype"), "__class__", "dtype"),
    "dtype of a list": (("tensors", "w", "dtype"), ["float32"], "dtype"),
    "shape": (("tensors", "w", "shape"), 24, "shape"),
    "huge shape": (("tensors", "w", "shape"), [1 << 62, 6], "shape"),
    "long shape": (("tensors", "w", "shape"), [1] * 65, "shape"),
    "other shape": (("tensors", "w", "shape"), [4, 7], "do not make up the tensor"),
    "smaller shape": (("tensors", "w", "shape"), [4, 5], "reaches out"),
    "pieces": (("tensors", "w", "pieces"), {}, "pieces: not a list"),
    "no pieces": (("tensors", "w", "pieces"), [], "do not make up"),
    "piece": ((*PIECES, 0), [], "pieces[0]: not a table"),
    "negative offset": ((*PIECES, 0, "offset"), [0, -1], "offset"),
    "out of the tensor": ((*PIECES, 0, "offset"), [1, 0], "reaches out"),
    "other dimensions": ((*PIECES, 0, "offset"), [0], "not of 2 dimensions"),
    "twice": ((*PIECES, 1), piece([0, 0], [1, 3]), "overlap"),
    "hole": ((*PIECES, 1), piece([0, 3], [1, 2]), "do not make up"),
    "file of a piece": ((*PIECES, 0, "file"), "../../etc/passwd", "is not in files"),
    "manifest as a file": ((*PIECES, 0, "file"), "manifest.json", "is not in files"),
    "file that is a list": ((*PIECES, 0, "file"), [], "is not in files"),
    "scalar twice": (("tensors", "step", "pieces"), [piece([], []), piece([], [])], "do not make up"),
    "scalar without": (("tensors", "step", "pieces"), [], "do not make up"),
}


def test_the_good_one_is_believed_and_comes_back_as_it_was():
    manifest = parse(changed(("record", "more"), {"any": ["thing", 1.5, None]}), "m")
    assert manifest.step == 3
    assert manifest.tensors == GOOD["tensors"]
    assert parse(encode(manifest), "m") == manifest


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused_with_its_key(what):
    path, value, message = BAD[what]
    with pytest.raises(CheckpointError) as error:
        parse(changed(path, value), "PLACE/step-00000003/manifest.json")
    assert str(error.value).startswith("PLACE/step-00000003/manifest.json: ")
    assert message in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'{"format":2,"record":{"step":' + b"9" * 1_000_000 + b"}}",
        b'{"format":NaN}',
        b'{"format":2,"record":{"step":Infinity}}',
        b"",
        b"null",
        b"3",
        b"{}",
        b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
        b'{"format":2}}',
        '{"format":2,"record":"\ud800"}'.encode("utf-8", "surrogatepass"),
    ],
)
def test_what_is_not_even_json_of_the_right_kind(body):
    with pytest.raises(CheckpointError, match=r"^m: damaged: "):
        parse(signed(body), "m")


def test_every_changed_or_missing_byte_is_refused():
    raw = encode(parse(changed(("record", "more"), 1), "m"))
    rng = random.Random(0)
    for at in range(len(raw) - 1):  # the end of the line is worth nothing
        for altered in (raw[:at], raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :], raw[at + 1 :]):
            with pytest.raises(CheckpointError, match="m: "):
                parse(altered, "m")


def test_a_manifest_of_another_step_is_refused(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, {"w": torch.ones(3)}, {"config": ""}, keep=5)
    raw = (tmp_path / "step-00000001" / "manifest.json").read_bytes()
    (tmp_path / "step-00000002" / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest\.json: of step 1, not 2"):
        read_manifest(tmp_path, 2)


def cut(shape, rng):
    """Boxes that make up a shape, by cuts through boxes at random."""
    boxes = [((0,) * len(shape), tuple(shape))]
    for _ in range(rng.randrange(40)):
        offset, size = boxes.pop(rng.randrange(len(boxes)))
        along = rng.randrange(len(shape))
        if size[along] < 2:
            boxes.append((offset, size))
            continue
        first = rng.randrange(1, size[along])
        boxes.append((offset, (*size[:along], first, *size[along + 1 :])))
        moved = (*offset[:along], offset[along] + first, *offset[along + 1 :])
        boxes.append((moved, (*size[:along], size[along] - first, *size[along + 1 :])))
    rng.shuffle(boxes)
    return boxes


def test_overlaps_are_found_as_by_comparing_all_with_all():
    def meet(one, other):
        return all(o < p + m and p < o + n for o, n, p, m in zip(*one, *other, strict=True))

    rng = random.Random(0)
    found = 0
    for _ in range(300):
        boxes = cut([rng.randint(1, 9) for _ in range(rng.randint(1, 3))], rng)
        assert not overlap(boxes)
        other = list(boxes)
        offset, size = other.pop(rng.randrange(len(other)))
        other.append((tuple(max(0, o - rng.randrange(2)) for o in offset), size))
        truth = any(meet(*pair) for pair in itertools.combinations(other, 2))
        assert overlap(other) == truth
        found += truth
    assert found > 50


def test_a_manifest_of_many_shards_is_read_in_linear_time():
    files = {f"rank-{rank:05d}.safetensors": {**FILE, "size": 1 << 30} for rank in range(4096)}
    grid = [piece([r * 4, c * 8], [4, 8], f"rank-{8 * r + c:05d}.safetensors") for r in range(512) for c in range(8)]
    tensors = {f"w.{n}": {"dtype": "float32", "shape": [2048, 64], "pieces": grid} for n in range(20)}
    content = {**GOOD, "files": files, "tensors": tensors}
    steps = itertools.count()
    sys.setprofile(lambda *_: next(steps))
    try:
        parse(signed(json.dumps(content).encode()), "m")
    finally:
        sys.setprofile(None)
    assert next(steps) < 200 * 20 * len(grid), "not the square of their number"
