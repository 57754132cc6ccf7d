"""The schema of a cluster file, the variables that ranks get, and names that are safe to hand on.

Entry points: `cluster`, `settings`.
"""
