"""Weights, data and configs exchanged with other libraries; nothing of theirs is run.

Entry points: `huggingface`, `sharded` (safetensors), `megatron`, `dcp`, `accelerate`, `dataloader` (for loops of one's own).
"""
