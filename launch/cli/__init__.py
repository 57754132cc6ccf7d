"""The `mikoshi` command: one file for each group of verbs, each a thin layer over the modules beneath.

Entry points: `main.command`.
"""
