"""Checkpoints: verified and committed atomically, or not there at all; restored into any layout and world size.

    step-00000030/
        rank-00000.safetensors ...  each rank's pieces of the state, every piece once
        manifest.json               sizes and digests of the files, where each piece of each tensor lies, the run's record

The pieces are planned by torch.distributed.checkpoint (DCP), which also maps them onto another layout when loading;
reading and writing is ours, so that nothing on disk is a pickle. All ranks call a collective function together.

Entry points: `saver.Saver`, `restore.newest_valid` and `restore.load`, `retention` (which stay and which go),
`storage.open.open_store`, `survey` (for people).
"""
