"""From prepared or raw text to the batches of a rank, as a run's config says.

Entry points: `feed.open_feed`; `streamed` is the way without preparation.
"""
