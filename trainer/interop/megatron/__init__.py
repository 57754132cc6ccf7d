"""Megatron-core's torch_dist checkpoints, in and out, without Megatron-core.

Entry points: `torch_dist.find_weights`, `export`.
"""
