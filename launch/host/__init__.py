"""Describes this machine: GPUs, cores, network, private folders.

Entry points: `probe.answer`, `gpus`, `network`, `affinity`.
"""
