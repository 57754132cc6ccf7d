"""Checkpoints: whole, verified and committed at once, or not there at all; restored by any world size.

    step-00000030/
        rank-00000.safetensors ...  each rank's pieces of the state, every piece once
        manifest.json               sizes and digests of the files, where each piece of each tensor lies, the run's record

The pieces are planned by torch.distributed.checkpoint (DCP), which also maps them onto another layout when loading;
reading and writing is ours, so that nothing on disk is a pickle. Every function named collective is called by all
ranks together.
"""

from trainer.checkpoint.agree import on_first_rank
from trainer.checkpoint.keep import Keep, prune, surplus
from trainer.checkpoint.manifest import FORMAT, Manifest
from trainer.checkpoint.restore import Saved, load, newest_valid, problem_of, read_manifest, step_folder, steps_in, verify
from trainer.checkpoint.saver import Outcome, Saver, save
from trainer.checkpoint.store import MANIFEST, LocalStore, Store, open_store

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Keep",
    "LocalStore",
    "Manifest",
    "Outcome",
    "Saved",
    "Saver",
    "Store",
    "load",
    "newest_valid",
    "on_first_rank",
    "open_store",
    "problem_of",
    "prune",
    "read_manifest",
    "save",
    "step_folder",
    "steps_in",
    "surplus",
    "verify",
]
