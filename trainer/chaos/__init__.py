"""Fault injection: the plan, and the code that triggers each fault inside a rank.

Entry points: `plan` and `inject`.
"""
