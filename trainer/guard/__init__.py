"""What is wrong with a run that goes on: losses that cannot be trusted, and ranks that are slow.

Entry points: `loss_guard` and `straggler.Stragglers`.
"""
