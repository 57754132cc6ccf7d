"""On a node of a job that Slurm keeps when nodes are lost: agent.node, and, when it is the head's own node that is lost, the
job queued again.

`python -P -m mikoshi.launch.backends.slurm.step`, in the place of agent.node. A job with fewer nodes than it asked for goes
on by --no-kill, also when the node of its batch script is gone: then nobody leads it, and its nodes would be held until its
time is up. Nor can it do without --no-kill, for then Slurm ends it over any node, which it goes on without.
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

from mikoshi.trainer.signals import ASKING
from mikoshi.trainer.streams import open_streams

_LONGEST = 100
"""Bytes of a line that may be a goodbye."""

_PAUSE = 10.0
_AT_ONCE = 4
"""Questions a second to Slurm's controller, at most, by all nodes together."""

_WATCH = 3600.0
"""Seconds, far longer than Slurm takes to give a node up (SlurmdTimeout, 300 s unless it is set)."""


class Talk:
    """What the leader says to agent.node, passed on. goodbye: whether it has dismissed it."""

    def __init__(self, to: IO[bytes]) -> None:
        self.to, self.goodbye = to, False

    def pass_on(self) -> None:
        """Until the leader hangs up, or agent.node is gone."""
        with contextlib.suppress(OSError), open(0, "rb", closefd=False) as words, self.to:
            for line in words:
                self.goodbye = self.goodbye or _is_goodbye(line)
                self.to.write(line)
                self.to.flush()


def main() -> None:
    """Entry point; exits as agent.node does."""
    open_streams(unread=True)
    for number in ASKING:
        signal.signal(number, lambda *_: None)  # agent.node has it too, and tells the leader
    node = subprocess.Popen([sys.executable, "-P", "-m", "mikoshi.launch.agent.node"], stdin=subprocess.PIPE)
    assert node.stdin is not None
    talk = Talk(node.stdin)
    threading.Thread(target=talk.pass_on, daemon=True).start()
    code = node.wait()
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL)
    job = os.environ.get("SLURM_JOB_ID", "")
    if job and not talk.goodbye:
        watch(job)
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)


def watch(job: str) -> None:
    """Have the job queued again once Slurm has taken the node of its batch script from it. Returns when that is done, or is no
    matter of this node any more: the job was queued again by others, has ended, or an hour is over."""
    from mikoshi.launch.backends.slurm.commands import ask, own_job
    from mikoshi.launch.backends.slurm.text import fields
    from mikoshi.parallel.process.nodelist import expand
    from mikoshi.trainer.errors import LaunchError

    job = own_job(job)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    pause = max(_PAUSE, len(expand(os.environ.get("SLURM_JOB_NODELIST", ""))) / _AT_ONCE)
    until = time.monotonic() + _WATCH
    while time.monotonic() < until:
        time.sleep(pause)
        with contextlib.suppress(LaunchError):  # a controller that does not answer is asked again
            shown = fields(ask(["scontrol", "--oneliner", "show", "job", job], gone=""))
            if shown.get("JobState") != "RUNNING" or int(shown.get("Restarts", "0")) != restarts:
                return
            host = shown.get("BatchHost", "")
            if host and host not in expand(shown.get("NodeList", "")):
                print(f"{host}, from where the run was led, is lost: the job is queued again", file=sys.stderr)
                ask(["scontrol", "requeue", job])
                return


def _is_goodbye(line: bytes) -> bool:
    if len(line) > _LONGEST:
        return False
    try:
        message = json.loads(line)
    except ValueError:
        return False
    return isinstance(message, dict) and message.get("do") == "bye"


if __name__ == "__main__":
    main()
