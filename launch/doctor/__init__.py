"""Examines whether a cluster is fit to train on.

Entry points: `doctor`, `checks`.
"""
