"""Filters drop what a person would by the same rule; doubles are those that a plain set finds."""

import hashlib
import random

import pytest

from mikoshi.data.errors import DataError
from mikoshi.data.prepare import quality
from mikoshi.data.prepare.quality import (
    Filters,
    find_duplicates,
    read_duplicates,
    repeated_share,
    symbol_share,
    why_dropped,
    write_hashes,
)


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("abcd", {"min_chars": 5}, "min_chars"),
        ("abcde", {"min_chars": 5}, ""),
        ("abcdef", {"max_chars": 5}, "max_chars"),
        ("日本語です", {"max_chars": 5}, ""),
        ("ab!?", {"max_symbols": 0.5}, ""),
        ("ab!?#", {"max_symbols": 0.5}, "max_symbols"),
        ("日本 é 42\n", {"max_symbols": 0.0}, ""),
        ("a\nb\na\n\n\n\n", {"max_repeated_lines": 0.34}, ""),
        ("a\n  a\nb\n\n\n", {"max_repeated_lines": 0.33}, "max_repeated_lines"),
        ("read Lorem ipsum here", {"drop_matching": r"(?i)lorem\s+ipsum"}, "drop_matching"),
        ("nothing of it", {"drop_matching": r"(?i)lorem\s+ipsum"}, ""),
        ("!!", {"min_chars": 3, "max_symbols": 0.1}, "min_chars"),
        ("", {"max_symbols": 0.0, "max_repeated_lines": 0.0}, ""),
    ],
)
def test_filters(text, settings, reason):
    assert why_dropped(text, Filters(**settings)) == reason
    assert why_dropped(text, Filters()) == ""


def test_shares_are_those_of_counting_one_by_one():
    draw = random.Random(7)
    for _ in range(200):
        text = "".join(draw.choices("aé日9 _-!\n\t\u00a0😀\u0301", k=draw.randint(1, 60)))
        assert symbol_share(text) == pytest.approx(sum(not (c.isalnum() or c.isspace()) for c in text) / len(text))
        seen, again, lines = set(), 0, 0
        for line in text.splitlines():
            if line.strip():
                lines += 1
                again += line.strip() in seen
                seen.add(line.strip())
        assert repeated_share(text) == pytest.approx(again / lines if lines else 0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_symbols": 1.5}, "max_symbols = 1.5"),
        ({"max_repeated_lines": -0.1}, "max_repeated_lines = -0.1"),
        ({"min_chars": 10, "max_chars": 5}, "min_chars = 10 and max_chars = 5"),
        ({"drop_matching": "("}, r"drop_matching = '\('"),
    ],
)
def test_filters_that_make_no_sense(settings, told):
    with pytest.raises(DataError, match=told):
        Filters(**settings)


@pytest.mark.parametrize("at_once", [1 << 22, 64])
def test_doubles_are_those_of_a_set(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(quality, "_AT_ONCE", at_once)
    draw = random.Random(3)
    digests = [hashlib.sha256(b"%d" % n).digest()[:16] for n in range(400)]
    digests += [bytes(8) + d[8:] for d in digests[:40]] + [d[:8] + bytes(8) for d in digests[:40]]  # alike in one half
    pieces = [[draw.choice(digests) for _ in range(draw.choice([0, 1, 50, 200]))] for _ in range(20)]
    files = [tmp_path / f"{number:05d}" for number in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        assert write_hashes(file, b"".join(piece)) == len(piece)
    found = find_duplicates(files, tmp_path / "doubles")
    seen, total = set(), 0
    for number, piece in enumerate(pieces):
        wanted = []
        for place, one in enumerate(piece):
            if one in seen:
                wanted.append(place)
            seen.add(one)
        assert read_duplicates(tmp_path / "doubles" / f"{number:05d}").tolist() == wanted
        total += len(wanted)
    assert found == total > 300
    assert find_duplicates(files, tmp_path / "doubles") == total  # known from before


def test_no_documents_at_all(tmp_path):
    assert write_hashes(tmp_path / "00000", b"") == 0
    assert find_duplicates([tmp_path / "00000"], tmp_path / "doubles") == 0
