"""Leads a run on this machine or over all nodes, through faults, to its result.

Entry points: `supervisor.supervise`, `head`.
"""
