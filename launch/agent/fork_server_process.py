"""The process that ranks are forked from: it dies with its parent, and no signal to stop ends it.

A forkserver imports this module first; nothing else may, since importing it changes the process. A scheduler sends its
signals to every process of a job. The ranks handle them, and here they are blocked, by inheritance (see agent.fork_server).
Since a blocked signal is not an ignored one, a signal to a rank that is just being forked waits until the rank can handle
it.
"""

from __future__ import annotations

import os

from mikoshi.parallel.process.parent_death import die_with_parent

PID = os.getpid()

os.setsid()  # Ctrl-C in a terminal goes to the supervisor alone, which forwards it
# Ranks inherit the pipe that tells a forkserver of its parent's death, so that it would not notice while they run.
die_with_parent()
