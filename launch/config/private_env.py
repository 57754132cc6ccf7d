"""Passes variables to ranks in a file that only the run's owner can read, with mode 0600 from its creation.

On a command line, in a job script or in the environment of a submission, other users could see them, or the scheduler would
keep them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mikoshi.data.io.atomic import replaced_file
from mikoshi.launch.config.cluster import Base
from mikoshi.trainer.errors import LaunchError

PRIVATE = "private.json"
"""Name of the file in a run folder."""


def collect_env(cluster: Base, environ: Mapping[str, str]) -> dict[str, str]:
    """The cluster file's variables, and its secrets from the user's environment. Raises LaunchError if a secret is not set."""
    absent = [name for name in cluster.secrets if name not in environ]
    if absent:
        raise LaunchError(f"secrets: {', '.join(absent)}: not set where you submit: export {absent[0]}=… first")
    return {**{name: environ[name] for name in cluster.secrets}, **cluster.env}


@contextlib.contextmanager
def set_env(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables in this process inside the block, to check what its ranks will see. Processes started later do not get
    them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def write_private(path: Path, values: Mapping[str, str]) -> None:
    """Write variables to a file that only its owner can read, atomically. Raises LaunchError."""
    try:
        with replaced_file(path, mode=0o600) as out:
            out.write(json.dumps(dict(values)).encode("ascii"))
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {error.strerror}") from None


def read_private(path: Path) -> dict[str, str]:
    """Read the variables that write_private wrote; none if there is no file.

    Raises LaunchError if the file is damaged or belongs to another user.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read: {error.strerror}") from None
    with os.fdopen(handle, "rb") as file:
        if os.fstat(handle).st_uid not in (os.geteuid(), 0):
            raise LaunchError(f"{path}: it belongs to another user: remove it and submit again")
        try:
            found = json.loads(file.read())
        except ValueError:
            found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise LaunchError(f"{path}: damaged: submit or resume again, which writes it anew")
    return found


def refuse_secrets(cluster: Base) -> None:
    """Raise LaunchError if the cluster has secrets, since others can read an exported file."""
    if cluster.secrets:
        raise LaunchError(
            f"secrets: {cluster.secrets[0]} would stand in the exported file: make a Secret of it, for secret_refs"
        )
