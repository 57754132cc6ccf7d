"""Exit codes of a run's processes.

`trainer.train.rank` maps errors to codes, `launch.controller.supervisor` those of all ranks to the run's, and
`launch.controller.restart_policy` decides what follows.
"""

DONE = 0
FAULT = 1
USER_ERROR = 2
PREEMPTED = 75
"""Stopped on request with everything saved: start the same command again to go on (EX_TEMPFAIL of sysexits.h)."""
LOST_PEER = 76  # of one rank: another one was gone; the run as a whole ends with FAULT
HANG = 77
"""A rank fell silent again and again, and the restarts allowed are used up."""
DIVERGED = 78  # of one rank: replicas of the same weights differ; the run as a whole is restarted, or ends with FAULT
