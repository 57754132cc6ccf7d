"""The `mikoshi` command, one file a group of verbs, each thin over the modules beneath.

Entry points: `main.command`.
"""
