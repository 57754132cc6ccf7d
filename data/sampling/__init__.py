"""The order of samples: which source, which epoch and which row each sample of a run is.

Entry points: `sampler.make_sampler`, `mixture`, `shuffle.permute`.
"""
