"""The start of the pod that leads: what was submitted is put in the run folder, once, and controller.head takes over.

    python -P -m mikoshi.launch.backends.kubernetes.pod MOUNT RUNFOLDER

MOUNT holds spec.json and request.json, as the run's ConfigMap has them. A pod that is started again finds its attempt there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from mikoshi.launch.runs.record import Attempt, Request, Spec, SubmittedRun, create_run, open_submitted, read_record
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.exit_codes import USER_ERROR


def unpack_run(mount: Path, folder: Path) -> SubmittedRun:
    """Create or open the run, with an attempt for the mounted request. Raises LaunchError if another run has the folder."""
    spec, request = read_record(mount / "spec.json", Spec), read_record(mount / "request.json", Request)
    if spec is None or request is None:
        raise LaunchError(f"{mount}: no spec.json and request.json: it is to be the run's ConfigMap")
    run = open_submitted(folder) if (folder / "spec.json").exists() else create_run(spec, folder)
    if run.spec.id != spec.id:
        raise LaunchError(f"{folder}: another run of this name is there: submit this one with another run.name")
    if not any(_is_for(attempt, request) for attempt in run.attempts):
        run.add(request)
    return run


def _is_for(attempt: Attempt, request: Request) -> bool:
    return read_record(attempt.path / "request.json", Request) == request


def main(arguments: list[str]) -> NoReturn:
    """Become controller.head, or exit with an error message."""
    try:
        mount, folder = map(Path, arguments)
        unpack_run(mount, folder)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    argv = [sys.executable, "-P", "-m", "mikoshi.launch.controller.head", str(folder)]
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
