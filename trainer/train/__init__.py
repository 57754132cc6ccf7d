"""The training loop, resuming, saving and logging of one run.

Entry points: `loop.fit`, `rank.train_rank`, `preflight.preflight`.
"""
