"""Records of a run: its folder, metrics, console and goodput.

Entry points: `run_folder.RunFolder`, `metrics`, `goodput`.
"""
