"""What a run leaves behind and shows: its folder, metrics, console, and where its time went.

Entry points: `run_folder.RunFolder`, `metrics`, `goodput`.
"""
