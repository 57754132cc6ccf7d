"""What this machine has: GPUs, cores, network, private folders.

Entry points: `probe.answer`, `gpus`, `network`, `affinity`.
"""
