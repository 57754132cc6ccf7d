"""The Megatron engine: Megatron-core's layers in the native engine's pipeline, ZeRO and optimizers.

Entry points: `engine`; `names` is the table of its parameters and ours.
"""
