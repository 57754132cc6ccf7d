"""The order of samples: which source, which epoch, which row, for any sample of a run.

Entry points: `sampler.make_course`, `mixture`, `shuffle.permute`.
"""
