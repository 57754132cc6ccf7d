"""Opens the store that an address names: a local folder or a bucket."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mikoshi.trainer.checkpoint.storage.base import Store
from mikoshi.trainer.checkpoint.storage.local import LocalStore
from mikoshi.trainer.errors import CheckpointError


def open_store(place: str | Path, scratch: Path, options: Mapping[str, str] | None = None) -> Store:
    """Returns the store at a folder, a file:// URL or a remote URL (s3:// gs:// az://). Creates and requests nothing yet.

    Raises CheckpointError for an address that cannot be used.

    scratch: local folder for fetched files, shared by the ranks of one run and by nobody else.
    options: settings of a remote store (endpoint, region, ...); the rest comes from the environment or the machine's role.
    """
    if isinstance(place, Path) or "://" not in place:
        return LocalStore(Path(place))
    if not place.startswith("file://"):
        from mikoshi.trainer.checkpoint.storage.bucket import open_remote_store

        return open_remote_store(place, scratch, options or {})
    parts = urlsplit(place)
    if parts.netloc not in ("", "localhost") or len(parts.path) < 2 or parts.query or parts.fragment:
        raise CheckpointError(f"checkpoint.folder = {place!r}: give a folder of this machine as file:///path/to/folder")
    return LocalStore(Path(url2pathname(parts.path)))
