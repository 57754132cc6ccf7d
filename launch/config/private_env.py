"""Variables that only the owner of a run may read: a file of mode 0600 that is whole from its first moment.

They reach ranks by this file alone: on a command line, in a job's script or in the environment of a submission they would be
seen by every user of the machine, or be kept by the scheduler.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mikoshi.data.io.atomic import replacing
from mikoshi.launch.config.cluster import Base
from mikoshi.trainer.errors import LaunchError

PRIVATE = "private.json"
"""Its name in a run folder."""


def chosen(cluster: Base, environ: Mapping[str, str]) -> dict[str, str]:
    """The cluster file's variables, and its secrets from the environment of the one who submits. Raises LaunchError, naming
    a secret that is not there."""
    absent = [name for name in cluster.secrets if name not in environ]
    if absent:
        raise LaunchError(f"secrets: {', '.join(absent)}: not set where you submit: export {absent[0]}=… first")
    return {**{name: environ[name] for name in cluster.secrets}, **cluster.env}


@contextlib.contextmanager
def applied(values: Mapping[str, str]) -> Iterator[None]:
    """Have this process see variables, for as long as it looks at what its ranks will look at: what it starts later on is not
    to inherit them."""
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
    """Put variables in a file that its owner alone can read, whole or not at all. Raises LaunchError."""
    try:
        with replacing(path, mode=0o600) as out:
            out.write(json.dumps(dict(values)).encode("ascii"))
    except OSError as error:
        raise LaunchError(f"{path}: cannot be written: {error.strerror}") from None


def read_private(path: Path) -> dict[str, str]:
    """The variables of a file that write_private made, exactly; none where there is no file. Raises LaunchError where it is
    damaged, or not the caller's own."""
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
    """An export is a file for others to read. Raises LaunchError where it would have to hold a secret."""
    if cluster.secrets:
        raise LaunchError(
            f"secrets: {cluster.secrets[0]} would stand in the exported file: make a Secret of it, for secret_refs"
        )
