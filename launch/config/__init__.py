"""The schema of a cluster file, the variables that ranks get, and checked names.

Entry points: `cluster`, `settings`.
"""
