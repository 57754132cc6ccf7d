"""Trains while planned faults strike, and judges the outcome of each.

Entry points: `run`, `verdict`.
"""
