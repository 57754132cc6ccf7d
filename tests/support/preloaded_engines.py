"""The other makers' engines, where a session has tests of them: they take seconds to import."""

import contextlib
import gc

import torch

from mikoshi.trainer.engines.deepspeed.setup import import_deepspeed

with contextlib.suppress(ImportError):
    import_deepspeed(torch.device("cpu"))
    import mikoshi.trainer.engines.deepspeed.engine
    import mikoshi.trainer.engines.deepspeed.pipeline
with contextlib.suppress(ImportError):
    import mikoshi.trainer.engines.megatron.engine  # noqa: F401

gc.collect()
gc.freeze()
