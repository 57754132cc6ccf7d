"""Mikoshi: one config, one plain GPT, any layout of the cluster, the same run whichever layout carries it.

`mikoshi.launch.cli` is the command line. Beneath it stand, each on those after it: `mikoshi.launch`
(clusters, agents, recovery), `mikoshi.trainer` (the run itself), and beside each other `mikoshi.parallel` (layouts) and
`mikoshi.data` (text to batches). The four are links to the folders of those names at the top of the repository.
"""
