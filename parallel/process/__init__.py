"""This process as a rank: how it joins the others, what it says of its progress, and whose death ends it.

Entry points: `process_group.World`, `heartbeat`.
"""
