"""What the ranks of a pool are forked with: torch and the engine are imported once a session, not once a rank."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import mikoshi.trainer.engines.native.engine  # noqa: F401

torch.set_num_threads(1)
# Left out of every collection to come, of which there is one a call: it would take 0.2 s each.
gc.collect()
gc.freeze()
