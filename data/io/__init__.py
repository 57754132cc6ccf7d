"""Files here and far away: atomic, cached, verified, unpacked.

Entry points: `atomic`, `files.list_files`, `cache`, `fetch`.
"""
