"""Who leads a run: over the ranks of this machine or over all nodes, through faults to its result.

Entry points: `supervisor.supervise`, `head`.
"""
