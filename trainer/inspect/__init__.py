"""Views of a run for people: layout, optimizer, batches and data.

Entry points: `layout.layout_view`, `batches`, `statistics`, `verify`.
"""
