"""What a run needs before it has a GPU: memory, traffic and FLOPs of a rank, and the largest micro-batch.

Entry points: `dryrun`, `micro_batch`.
"""
