"""Two digests of every file, made in one pass while it is written: each finds any accident, neither keeps anybody out.

XXH3 (128 bits, https://github.com/Cyan4973/xxHash) is as fast as memory and so is compared before every load. SHA-256 is
what anybody can check with sha256sum; stores that fetch from afar and `mikoshi checkpoint verify` compare it.

Neither is a signature. Against someone who can write the folder a digest in the same folder protects nothing: it is made
anew as easily as the file. What protects is that nothing in a checkpoint is ever run, and no file outside of it opened.
"""

from __future__ import annotations

import hashlib
from typing import TypedDict

from xxhash import xxh3_128


class Digests(TypedDict):
    """In lower-case hexadecimal digits."""

    sha256: str
    xxh3: str


DIGITS = {"sha256": 64, "xxh3": 32}


class Both:
    """The two digests of the bytes seen so far. Other threads run while it looks at more."""

    def __init__(self, data: bytes = b"") -> None:
        self._sha256, self._xxh3 = hashlib.sha256(data), xxh3_128(data)

    def update(self, data: memoryview) -> None:
        self._sha256.update(data)
        self._xxh3.update(data)

    def hexdigests(self) -> Digests:
        return {"sha256": self._sha256.hexdigest(), "xxh3": self._xxh3.hexdigest()}


def differing(found: Digests, expected: Digests) -> list[str]:
    """Names, for people, of the digests that are not what they should be."""
    compared = {"SHA-256": found["sha256"] == expected["sha256"], "XXH3": found["xxh3"] == expected["xxh3"]}
    return [name for name, same in compared.items() if not same]
