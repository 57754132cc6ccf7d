"""Engines and layouts side by side on one config, data and seed.

Entry points: `comparison` (who takes part, and the figures), `page` and `text` (how they are shown).
"""
