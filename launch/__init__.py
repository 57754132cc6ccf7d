"""Clusters, nodes and processes: how ranks get started, watched and started again.

Entry points: `cli.main` (the command), `controller.supervisor` (one machine), `controller.head` (several nodes).
"""
