"""Where checkpoints lie: a folder or a bucket, behind one protocol.

Entry points: `open.open_store`, `base.Store`.
"""
