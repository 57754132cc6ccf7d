"""The nodes of a cluster with no run on them, to be looked at: what `mikoshi doctor` asks its questions of."""

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

from mikoshi.launch.agent.requests import Requests
from mikoshi.launch.backends.base import Site
from mikoshi.launch.backends.local.local import LocalSite
from mikoshi.launch.backends.open import open_site
from mikoshi.launch.backends.setup import write_setup
from mikoshi.launch.config.cluster import Cluster, KubernetesCluster, LocalCluster, SlurmCluster, SshCluster
from mikoshi.launch.config.private_env import chosen
from mikoshi.launch.controller.agent_pool import Crew
from mikoshi.launch.controller.gang import Course, Errand
from mikoshi.launch.controller.supervisor import asked
from mikoshi.launch.runs.record import Attempt, Request, Submitted, new_spec
from mikoshi.trainer.config.data import RecoverySection
from mikoshi.trainer.config.run import RunConfig
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.record.run_folder import RunFolder

_FIRST = 10.0
"""Seconds after which a node that has failed is not tried again."""

_NOTHING = {
    "run": {"name": "doctor"},
    "model": {"vocab": 2, "context": 1, "layers": 1, "width": 2, "heads": 1},
    "data": {"path": "."},
    "train": {"steps": 0, "global_batch": 1, "context": 1},
}
"""A config that is never trained: agents are started as for a run."""


@dataclass
class Gathered:
    """doctor.doctor.Nodes over the agents of a crew."""

    crew: Crew
    names: list[str]
    missing: dict[str, str]
    number: int = 0

    def probe(self, question: dict[str, Any], patience: float) -> dict[str, dict[str, Any]]:
        """The answer of every node, asked at the same time; {"error": why} of one that gave none."""
        told = self.crew.probe(question, patience)
        self.go_on()
        return {name: told.get(name, {"error": self.crew.why.get(name, "lost")}) for name in self.names}

    def go_on(self) -> None:
        """Raises KeyboardInterrupt where a signal has asked to stop: nodes that were cut short are not ill."""
        if self.crew.requests.asked:
            raise KeyboardInterrupt

    def ranks(
        self, nodes: list[str], per_node: int, work: str, arguments: dict[str, Any], patience: float
    ) -> dict[int, dict[str, Any]]:
        """Have ranks of these nodes work; what each left behind. Raises LaunchError where one did not come to its end."""
        errand = Errand(work, arguments, ranks=per_node, patience=patience)
        ended = Course(self.crew, self.number, nodes, errand).run()
        self.number += 1
        self.go_on()
        wrong = {rank: code for rank, code in ended.codes.items() if code}
        if ended.lost or wrong or len(ended.codes) < ended.ranks:
            where = [f"{node}: {why}" for node, why in ended.lost.items()]
            where += [f"rank {rank}: {ended.said.get(rank, f'exit code {code}')}" for rank, code in wrong.items()]
            raise LaunchError(f"{work}: {'; '.join(where) or f'not done after {patience:g} s'}")
        return {rank: json.loads(text) for rank, text in ended.answers.items()}


@contextlib.contextmanager
def gathered(cluster: Cluster, count: int, workdir: Path) -> Iterator[Gathered]:
    """Agents on `count` nodes of the cluster, or on all hosts of an ssh cluster; gone at the end. Raises LaunchError."""
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
        run = Submitted(RunFolder(folder), new_spec(RunConfig.model_validate(_NOTHING), cluster, workdir))
        attempt = Attempt(folder / "attempts" / "1")
        attempt.path.mkdir(parents=True)
        write_setup(run)
        attempt.write(Request(nodes=wanted, min_nodes=1, time=time.time()))
        with _allocated(cluster, run, attempt) as site:
            requests = Requests(5.0)
            crew = Crew(site, cluster, RecoverySection(), requests, attempt.node_log, workdir, chosen(cluster, os.environ))
            try:
                with asked(requests):
                    yield _up(crew, cluster, wanted)
            finally:
                crew.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _up(crew: Crew, cluster: Cluster, wanted: int) -> Gathered:
    """The nodes that have answered when all have, or the others have failed."""
    up = crew.gather(wanted, 0, cluster.patience.start, _FIRST, first=True)
    missing = {name: crew.why.get(name, "it has not come up yet") for name in crew.names if name not in up}
    nodes = Gathered(crew, up, missing)
    nodes.go_on()
    return nodes


@contextlib.contextmanager
def _allocated(cluster: Cluster, run: Submitted, attempt: Attempt) -> Iterator[Site]:
    """The site; of Slurm, nodes of a job that lasts as long as they are looked at."""
    if isinstance(cluster, LocalCluster):
        yield LocalSite(cluster, run, attempt, led=False)
        return
    if not isinstance(cluster, SlurmCluster):
        yield open_site(cluster, run, attempt)
        return
    from mikoshi.launch.backends.slurm.site import SlurmSite, allocated

    with allocated(cluster, run, attempt.request) as (job, names):
        yield SlurmSite(cluster, run, attempt, job, names)
