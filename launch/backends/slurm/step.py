"""Runs agent.node on a node of a job that keeps running when nodes are lost, and requeues the job if the head's node is
lost.

`python -P -m mikoshi.launch.backends.slurm.step` takes the place of agent.node. With --no-kill, a job continues when nodes
are lost, even the node of its batch script. Then nobody leads it, and its nodes would be held until its time is up. Without
--no-kill, Slurm would end it over any lost node.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from mikoshi.trainer.signals import STOP_SIGNALS
from mikoshi.trainer.streams import open_streams

_MAX_GOODBYE = 100
"""Maximum bytes of a line that is checked for a goodbye."""

_POLL_INTERVAL = 10.0
_QUERIES_PER_SECOND = 4
"""Maximum queries per second to Slurm's controller, by all nodes together."""

_WATCH_TIME = 3600.0
"""Seconds: far longer than Slurm takes to give up a node (SlurmdTimeout, 300 s by default)."""


class Relay:
    """Passes messages from the head to agent.node. goodbye: whether the head has dismissed it."""

    def __init__(self, to: IO[bytes]) -> None:
        self.to, self.goodbye = to, False

    def run(self) -> None:
        """Pass messages on until the head hangs up or agent.node is gone."""
        with contextlib.suppress(OSError), open(0, "rb", closefd=False) as lines, self.to:
            for line in lines:
                self.goodbye = self.goodbye or _is_goodbye(line)
                self.to.write(line)
                self.to.flush()


def main() -> None:
    """Run agent.node, and exit with its code."""
    open_streams(unread=True)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # agent.node gets it too, and tells the head
    node = subprocess.Popen([sys.executable, "-P", "-m", "mikoshi.launch.agent.node"], stdin=subprocess.PIPE)
    assert node.stdin is not None
    relay = Relay(node.stdin)
    threading.Thread(target=relay.run, daemon=True).start()
    code = node.wait()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    job = os.environ.get("SLURM_JOB_ID", "")
    if job and not relay.goodbye:
        requeue_if_head_lost(job)
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)


def requeue_if_head_lost(job: str) -> None:
    """Requeue the job once Slurm has removed the node of its batch script.

    Returns when that is done, when the job was requeued by others or has ended, or after an hour.
    """
    from mikoshi.launch.backends.slurm.commands import own_job_id, run_command
    from mikoshi.launch.backends.slurm.parse import parse_fields
    from mikoshi.parallel.process.nodelist import expand_nodelist
    from mikoshi.trainer.errors import LaunchError

    job = own_job_id(job)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    pause = max(_POLL_INTERVAL, len(expand_nodelist(os.environ.get("SLURM_JOB_NODELIST", ""))) / _QUERIES_PER_SECOND)
    until = time.monotonic() + _WATCH_TIME
    while time.monotonic() < until:
        time.sleep(pause)
        with contextlib.suppress(LaunchError):  # query again if the controller does not answer
            shown = parse_fields(run_command(["scontrol", "--oneliner", "show", "job", job], gone=""))
            if shown.get("JobState") != "RUNNING" or int(shown.get("Restarts", "0")) != restarts:
                return
            host = shown.get("BatchHost", "")
            if host and host not in expand_nodelist(shown.get("NodeList", "")):
                print(f"{host}, from where the run was led, is lost: the job is queued again", file=sys.stderr)
                run_command(["scontrol", "requeue", job])
                return


def _is_goodbye(line: bytes) -> bool:
    if len(line) > _MAX_GOODBYE:
        return False
    try:
        message = json.loads(line)
    except ValueError:
        return False
    return isinstance(message, dict) and message.get("do") == "bye"


if __name__ == "__main__":
    main()
