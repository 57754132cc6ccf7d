"""Two digests of every file, computed in one pass while it is written. They find accidents; they are no signature.

XXH3 (128 bits, https://github.com/Cyan4973/xxHash) is as fast as memory and is compared before every load. SHA-256 can be
checked by anyone with sha256sum; remote stores and `mikoshi checkpoint verify` compare it.

Whoever can write the folder can also replace the digests. Security comes from elsewhere: nothing in a checkpoint is ever
executed, and no file outside of it is opened.
"""

from __future__ import annotations

import hashlib
from typing import TypedDict

from xxhash import xxh3_128


class Digests(TypedDict):
    """Digests in lower-case hexadecimal digits."""

    sha256: str
    xxh3: str


DIGITS = {"sha256": 64, "xxh3": 32}


class DigestPair:
    """Both digests of the bytes seen so far. Other threads run during an update."""

    def __init__(self, data: bytes = b"") -> None:
        self._sha256, self._xxh3 = hashlib.sha256(data), xxh3_128(data)

    def update(self, data: memoryview) -> None:
        """Add bytes to both digests."""
        self._sha256.update(data)
        self._xxh3.update(data)

    def hexdigests(self) -> Digests:
        """Returns both digests."""
        return {"sha256": self._sha256.hexdigest(), "xxh3": self._xxh3.hexdigest()}


def differing_digests(found: Digests, expected: Digests) -> list[str]:
    """Returns the names, for people, of the digests that differ."""
    compared = {"SHA-256": found["sha256"] == expected["sha256"], "XXH3": found["xxh3"] == expected["xxh3"]}
    return [name for name, same in compared.items() if not same]
