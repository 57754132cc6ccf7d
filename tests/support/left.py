"""What a start of the command has left running: found by a mark in its environment, which all that comes of it inherits."""

import contextlib

import psutil


def left_by(name, value):
    """Processes, other than dead ones, that were started with this variable, whatever they call themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
