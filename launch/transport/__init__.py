"""How a leader and its agents talk: JSON lines over pipes or TCP.

Entry points: `link`, `connect`.
"""
