import os

# Two cores: one thread a process keeps the ranks of a multi-rank test out of each other's way.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
