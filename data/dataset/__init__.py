"""Prepared data: shards on disk, split into rows of T tokens.

Entry points: `dataset.open_dataset`, `split`, `rows`, `shards`.
"""
