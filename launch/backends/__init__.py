"""One package for each kind of cluster, behind two protocols.

Entry points: `open.open_backend` and `open.open_site`; `base.Backend` and `base.Site` are the protocols.
"""
