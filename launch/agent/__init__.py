"""One node: it forks ranks, watches them, and leaves none behind.

Entry points: `node` (the process), `worker_group.Ranks`, `fork_server`, `hang_detector`.
"""
