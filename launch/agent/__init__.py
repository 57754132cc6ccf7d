"""Runs on every node: forks ranks, watches them and leaves none behind.

Entry points: `node` (the process), `worker_group.WorkerGroup`, `fork_server`, `hang_detector`.
"""
