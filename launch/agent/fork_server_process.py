"""The process that ranks are forked from: it dies of the death of the process that made it, and of no signal to stop.

Imported first of all in a forkserver, and nowhere else: importing it is what makes a process so. A scheduler sends its signals
to every process of a job; the ranks answer them, while in here they are blocked, by inheritance (see agent.fork_server). As
that is not to ignore them, one that reaches a rank which is just being forked waits until that rank can take it.
"""

from __future__ import annotations

import os

from mikoshi.parallel.process.parent_death import die_with_parent

PID = os.getpid()

os.setsid()  # a terminal's Ctrl-C goes to the supervisor, which passes it on
# Ranks inherit the pipe by which a forkserver learns that its maker is gone: as long as they run, it would not learn it.
die_with_parent()
