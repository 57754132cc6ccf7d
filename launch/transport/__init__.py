"""Carries messages between the head and its agents: JSON lines over pipes or TCP.

Entry points: `link`, `connect`.
"""
