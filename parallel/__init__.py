"""Layouts of ranks, and the mechanisms that carry a model in them.

Entry points: `layout.Layout`, `sharding` (the table of what is cut where), `mesh.make_groups`, `pipeline`, `zero`, `tensor`,
`expert`, `context`.
"""
