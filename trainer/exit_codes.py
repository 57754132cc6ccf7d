"""How a run ends, as its process says it."""

DONE = 0
FAULT = 1
USER_ERROR = 2
PREEMPTED = 75
"""Stopped on request with everything saved: start the same command again to go on (EX_TEMPFAIL of sysexits.h)."""
LOST_PEER = 76  # of one rank: another one was gone; the run as a whole ends with FAULT
