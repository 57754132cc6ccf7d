"""The data of a run: from prepared or raw text to each rank's batches.

Entry points: `feed.open_feed`; `streamed` is the way without preparation.
"""
