"""Watches a running job: losses that cannot be trusted, and slow ranks.

Entry points: `loss_guard` and `straggler.Stragglers`.
"""
