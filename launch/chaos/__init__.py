"""A run that suffers a plan of faults, and the verdict on each.

Entry points: `run`, `verdict`.
"""
