"""Brings up the nodes of a cluster without a run, so that `mikoshi doctor` can examine them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikoshi.launch.agent.stop_requests import StopRequests
from mikoshi.launch.backends.base import Site
from mikoshi.launch.backends.local.local import LocalSite
from mikoshi.launch.backends.open import open_site
from mikoshi.launch.backends.setup import write_setup
from mikoshi.launch.config.cluster import Cluster, KubernetesCluster, LocalCluster, SlurmCluster, SshCluster
from mikoshi.launch.config.private_env import collect_env
from mikoshi.launch.controller.agent_pool import AgentPool
from mikoshi.launch.controller.gang import Gang, RankTask
from mikoshi.launch.controller.supervisor import collect_signals
from mikoshi.launch.runs.record import Attempt, Request, SubmittedRun, new_spec
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder

_REJOIN = 10.0
"""Seconds after which a failed node is not tried again."""

_EMPTY_CONFIG = {
    "run": {"name": "doctor"},
    "model": {"vocab": 2, "context": 1, "layers": 1, "width": 2, "heads": 1},
    "data": {"path": "."},
    "train": {"steps": 0, "global_batch": 1, "context": 1},
}
"""A config that is never trained: agents need one to start."""


@dataclass
class AllocatedNodes:
    """The agents of a pool as `doctor.doctor.Nodes`.

    names: nodes that came up
    missing: nodes that did not, with the reason
    number: attempts so far
    """

    pool: AgentPool
    names: list[str]
    missing: dict[str, str]
    number: int = 0

    def probe(self, question: dict[str, Any], patience: float) -> dict[str, dict[str, Any]]:
        """Send a question to all nodes at once, and return their answers; {"error": reason} where there is none."""
        answers = self.pool.probe(question, patience)
        self.raise_if_interrupted()
        return {name: answers.get(name, {"error": self.pool.down.get(name, "lost")}) for name in self.names}

    def raise_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt after a signal to stop. A node whose answer was cut short must not be judged."""
        if self.pool.requests.signals:
            raise KeyboardInterrupt

    def ranks(
        self, nodes: list[str], per_node: int, work: str, arguments: dict[str, Any], patience: float
    ) -> dict[int, dict[str, Any]]:
        """Run a task in `per_node` ranks on each of these nodes, and return each rank's answer.

        Raises LaunchError if a rank fails or `patience` seconds are over.
        """
        task = RankTask(work, arguments, ranks=per_node, patience=patience)
        outcome = Gang(self.pool, self.number, nodes, task).run()
        self.number += 1
        self.raise_if_interrupted()
        wrong = {rank: code for rank, code in outcome.codes.items() if code}
        if outcome.lost or wrong or len(outcome.codes) < outcome.ranks:
            where = [f"{node}: {why}" for node, why in outcome.lost.items()]
            where += [f"rank {rank}: {outcome.said.get(rank, f'exit code {code}')}" for rank, code in wrong.items()]
            raise LaunchError(f"{work}: {'; '.join(where) or f'not done after {patience:g} s'}")
        return {rank: json.loads(text) for rank, text in outcome.answers.items()}


@contextlib.contextmanager
def allocate_nodes(cluster: Cluster, count: int, workdir: Path) -> Iterator[AllocatedNodes]:
    """Run agents on `count` nodes of the cluster, or on all hosts of an ssh cluster, inside a `with` block.

    The nodes are given back at the end. Raises LaunchError.
    """
    if isinstance(cluster, KubernetesCluster):
        raise LaunchError(
            "doctor: pods cannot be looked at from outside: run `mikoshi doctor --on local` in one; "
            "`mikoshi submit --dry-run` has the server check what would be submitted"
        )
    wanted = len(cluster.hosts) if isinstance(cluster, SshCluster) else count
    try:
        folder = Path(tempfile.mkdtemp(prefix=".mikoshi-doctor-", dir=workdir))
    except OSError as error:
        raise LaunchError(
            f"workdir = {str(workdir)!r}: cannot be written to: {error.strerror}: mend it in the cluster file"
        ) from None
    try:
        run = SubmittedRun(RunFolder(folder), new_spec(RunConfig.model_validate(_EMPTY_CONFIG), cluster, workdir))
        attempt = Attempt(folder / "attempts" / "1")
        attempt.path.mkdir(parents=True)
        write_setup(run)
        attempt.write(Request(nodes=wanted, min_nodes=1, time=time.time()))
        with _allocated(cluster, run, attempt) as site:
            requests = StopRequests(5.0)
            pool = AgentPool(
                site, cluster, RecoverySection(), requests, attempt.node_log, workdir, collect_env(cluster, os.environ)
            )
            try:
                with collect_signals(requests):
                    yield _wait_until_up(pool, cluster, wanted)
            finally:
                pool.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(pool: AgentPool, cluster: Cluster, wanted: int) -> AllocatedNodes:
    """Wait until every node has answered or failed."""
    up = pool.gather(wanted, 0, cluster.patience.start, _REJOIN, first=True)
    missing = {name: pool.down.get(name, "it has not come up yet") for name in pool.names if name not in up}
    nodes = AllocatedNodes(pool, up, missing)
    nodes.raise_if_interrupted()
    return nodes


@contextlib.contextmanager
def _allocated(cluster: Cluster, run: SubmittedRun, attempt: Attempt) -> Iterator[Site]:
    """Yield the site. On Slurm this holds an allocation for as long as the block runs."""
    if isinstance(cluster, LocalCluster):
        yield LocalSite(cluster, run, attempt, led=False)
        return
    if not isinstance(cluster, SlurmCluster):
        yield open_site(cluster, run, attempt)
        return
    from mikoshi.launch.backends.slurm.site import SlurmSite, allocation

    with allocation(cluster, run, attempt.request) as (job, names):
        yield SlurmSite(cluster, run, attempt, job, names)
