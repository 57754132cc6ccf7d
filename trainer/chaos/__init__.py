"""Faults on purpose: a plan of them, and what makes each happen inside a rank.

Entry points: `plan` and `inject`.
"""
