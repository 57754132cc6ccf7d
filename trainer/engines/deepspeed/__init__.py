"""The DeepSpeed engine: the same run under DeepSpeed's ZeRO, offload and pipeline.

Entry points: `engine` and `pipeline`; `limits` says what DeepSpeed cannot do.
"""
