"""Sources to token shards on all cores, the same bytes however often it was stopped.

Entry points: `prepare.prepare`, `prepare.prepare_all`.
"""
