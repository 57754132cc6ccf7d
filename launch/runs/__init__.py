"""A submitted run on disk: its records and its logs.

Entry points: `record.open_submitted`, `logs`.
"""
