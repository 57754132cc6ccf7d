"""Text to batches: the batch at step n is a function of (data, seed, n).

Entry points: `prepare.prepare.prepare`, `dataset.dataset.open_dataset`, `loader.loader.Loader`, `loader.stream`.
"""
