"""Engines that turn a batch into an updated model, behind one small protocol.

Entry points: `build.build_engine`, `base.Engine` (the protocol), `layout.layout_of`, `limits.LIMITS` (what each engine cannot
do).
"""
