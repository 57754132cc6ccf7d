"""What a submitted run is on disk: its records and its logs.

Entry points: `record.open_submitted`, `logs`.
"""
