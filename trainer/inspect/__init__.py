"""What a run would do or has read, for people: its layout, its optimizer, its batches, its data.

Entry points: `layout.layout_view`, `batches`, `statistics`, `verify`.
"""
