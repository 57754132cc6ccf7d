"""A training run, step by step: the loop, what it resumes from, when it saves, what it says.

Entry points: `loop.fit`, `rank.train_rank`, `preflight.preflight`.
"""
