"""A head whose nodes are several agents on this machine: everything but the network between them is real."""

import os
import subprocess
import sys
import time
from pathlib import Path

from mikoshi.launch.config.cluster import LocalCluster
from mikoshi.launch.runs.record import Request, create_run, new_spec
from runs import run_config

PROGRAM = """
import sys
from pathlib import Path
import mikoshi.launch.controller.head as head

class Site:
    def __init__(self, cluster, run, attempt):
        self.names = [name for name in {names!r} if name not in attempt.request.avoided]
    def nodes(self):
        return self.names
    def command(self, node):
        if Path({folder!r}, "down-" + node).exists():
            return ["sh", "-c", "echo no route to this host >&2; exit 255"]
        # Its name is in the command, for a test to find it.
        return [sys.executable, "-P", "-m", "mikoshi.launch.agent.node", node]
    def after(self, run, attempt, result):
        return result

head.open_site = Site
sys.argv = ["head", {folder!r}]
head.main()
"""


def submitted(dataset, folder, nodes, min_nodes=None, ranks=1, patience=None, **sections):
    """A run's folder, with its first attempt asked for."""
    sections.setdefault("engine", {"device": "cpu"})
    config = run_config(dataset, folder, **sections)
    cluster = LocalCluster.model_validate(
        {"kind": "local", "ranks_per_node": ranks, "network": {"interface": "lo"}, "patience": patience or {}}
    )
    run = create_run(new_spec(config, cluster, folder))
    run.add(Request(nodes=nodes, min_nodes=min_nodes or nodes, time=time.time()))
    return run


def start(run, names):
    """The head of the run's newest attempt, over nodes of these names."""
    program = PROGRAM.format(names=list(names), folder=str(run.folder.path))
    return subprocess.Popen([sys.executable, "-P", "-c", program], start_new_session=True, env=dict(os.environ))


def down(run, node):
    """From now on this node does not answer."""
    (Path(run.folder.path) / f"down-{node}").touch()


def agents(head):
    """Agents of a head, by the names of their nodes."""
    import psutil

    found = {}
    for child in psutil.Process(head.pid).children():
        command = child.cmdline()
        if "mikoshi.launch.agent.node" in command:
            found[command[-1]] = child
    return found
