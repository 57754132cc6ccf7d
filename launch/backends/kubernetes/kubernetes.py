"""Runs on Kubernetes as JobSets. A failed submit leaves nothing behind, and one list call returns the states of all runs.

No real cluster has run this yet: the objects are checked against the official schemas, and the calls against a test server.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mikoshi.launch.backends.base import JobState
from mikoshi.launch.backends.kubernetes.api import connect
from mikoshi.launch.backends.kubernetes.manifests import (
    ATTEMPT_LABEL,
    MANAGED,
    MOUNT,
    RUN_LABEL,
    SECRETS,
    Object,
    check_manifest,
    is_apart,
    job_name,
    jobset,
    to_yaml,
)
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.runs.record import Attempt, Request, Result, SubmittedRun
from mikoshi.launch.transport.connect import port_of
from mikoshi.trainer.errors import LaunchError
from mikoshi.trainer.exit_codes import DONE, USER_ERROR

_SELECTOR = ",".join(f"{key}={value}" for key, value in MANAGED.items())
_JOB_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class KubernetesBackend:
    """backends.base.Backend by the API server."""

    cluster: KubernetesCluster

    def check(self, run: SubmittedRun, request: Request) -> None:
        """Refuse a missing namespace, claim or Secret, a cluster without JobSets, and objects that the server refuses."""
        check_manifest(run)
        cluster, api = self.cluster, connect(self.cluster)
        api.namespace(cluster.namespace)
        api.jobsets(cluster.namespace, _SELECTOR, limit=1)
        if cluster.claim:
            api.claim(cluster.namespace, cluster.claim)
        for name in cluster.secret_refs:
            api.secret(cluster.namespace, name)
        self.server_dry_run(run, request)

    def server_dry_run(self, run: SubmittedRun, request: Request) -> None:
        """Have the server check in full what would be submitted. It keeps nothing. Raises LaunchError."""
        api = connect(self.cluster)
        for thing in jobset(run, request, _attempt_number(run, request), self._private()):
            api.create(thing, dry_run=True)

    def preview(self, run: SubmittedRun, request: Request) -> str:
        """The objects as YAML, with placeholders for secrets."""
        return to_yaml(jobset(run, request, _attempt_number(run, request)))

    def submit(self, run: SubmittedRun, attempt: Attempt) -> dict[str, str]:
        """Create the JobSet, and the ConfigMap and Secret that it owns."""
        api, name = connect(self.cluster), job_name(run, attempt.number)
        jobset_object, *others = jobset(run, attempt.request, attempt.number, self._private())
        made = api.create(jobset_object)
        try:
            # The JobSet owns the others, which are deleted with it. Its pods wait until both exist.
            uid = str(made["metadata"]["uid"])
            owner = {key: jobset_object[key] for key in ("apiVersion", "kind")} | {"name": name, "uid": uid, "controller": True}
            for thing in others:
                api.create(thing | {"metadata": thing["metadata"] | {"ownerReferences": [owner]}})
        except BaseException as error:
            try:
                api.delete(self.cluster.namespace, name, "Background")  # no pod has started
            except LaunchError as another:
                raise LaunchError(f"{error}; and it is still there: kubectl delete jobset {name} ({another})") from None
            raise
        apart = "yes" if is_apart(run) else ""
        return {"kind": "kubernetes", "namespace": self.cluster.namespace, "jobset": name, "uid": uid, "apart": apart}

    def _private(self) -> dict[str, str]:
        """A new token for this attempt, and the user's secrets."""
        missing = [name for name in self.cluster.secrets if name not in os.environ]
        if missing:
            raise LaunchError(f"secrets: {missing[0]} is not set here: export it, or take it out of the cluster file")
        return {"token": secrets.token_hex(32), **{name: os.environ[name] for name in self.cluster.secrets}}

    def query(self, jobs: Sequence[dict[str, str]]) -> list[JobState]:
        """List the JobSets, and the pods of those that run, once per namespace."""
        api = connect(self.cluster)
        found: dict[tuple[str, str], Object] = {}
        pods: dict[str, list[Object]] = {}
        for namespace in sorted({job["namespace"] for job in jobs if "namespace" in job}):
            listed = api.jobsets(namespace, _SELECTOR)
            found |= {(namespace, item["metadata"]["name"]): item for item in listed}
            if any(not _condition(item, "Completed") for item in listed):
                for pod in api.pods(namespace, _SELECTOR):
                    labels = pod["metadata"]["labels"]
                    pods.setdefault(f"{labels.get(RUN_LABEL)} {labels.get(ATTEMPT_LABEL)}", []).append(pod)
        return [_state(found.get((job.get("namespace", ""), job.get("jobset", ""))), pods) for job in jobs]

    def cancel(self, attempt: Attempt, now: bool) -> None:
        """Delete the JobSet, upon which its pods save within recovery.grace; or delete the pods at once."""
        job = attempt.job
        if not job:
            raise LaunchError(f"{attempt.path}: it never reached Kubernetes: nothing runs there")
        api = connect(self.cluster)
        # Deleting the JobSet sends SIGTERM to its pods. The head then has the ranks save, within recovery.grace.
        labels = api.delete(job["namespace"], job["jobset"])
        if now and labels:
            api.kill_pods(job["namespace"], ",".join(f"{key}={labels[key]}" for key in (RUN_LABEL, ATTEMPT_LABEL)))


class NoPodError(LaunchError):
    """The pod does not exist, yet or any more."""


def log_lines(
    cluster: KubernetesCluster, job: dict[str, str], node: int = 0, follow: bool = False, lines: int | None = None
) -> Iterator[str]:
    """Yield the output of a node's container, line by line. Raises NoPodError if there is no such pod.

    node: the node's number; 0 leads
    follow: until the container ends
    lines: only the last so many of the lines that exist
    """
    api = connect(cluster)
    name, index = ("head", 0) if node == 0 else ("nodes", node - 1)
    selector = f"jobset.sigs.k8s.io/jobset-name={job['jobset']},{_JOB_LABEL}={name},{_INDEX_LABEL}={index}"
    pods = [pod for pod in api.pods(job["namespace"], selector) if pod.get("status", {}).get("phase") != "Pending"]
    if not pods:
        raise NoPodError(
            f"{job['jobset']}: no pod of node {node}: it has not come up, or is deleted; see the run folder's logs"
        )
    newest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    return api.log(job["namespace"], newest["metadata"]["name"], follow, lines)


def _attempt_number(run: SubmittedRun, request: Request) -> int:
    """The number of the attempt that a request has, or would get."""
    for attempt in run.attempts:
        if attempt.request == request:
            return attempt.number
    return len(run.attempts) + 1


def _condition(item: Object, kind: str) -> Object | None:
    """A condition of this kind that is true, or None."""
    conditions = item.get("status", {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind and c.get("status") == "True"), None)


def _state(item: Object | None, pods: dict[str, list[Object]]) -> JobState:
    if item is None:
        return JobState("ended", "its JobSet is deleted")
    labels = item["metadata"]["labels"]
    mine = pods.get(f"{labels.get(RUN_LABEL)} {labels.get(ATTEMPT_LABEL)}", [])
    nodes = tuple(str(pod["spec"]["nodeName"]) for pod in mine if pod["spec"].get("nodeName"))
    if _condition(item, "Completed"):
        return JobState("ended", "Completed")
    if failed := _condition(item, "Failed"):
        return JobState(
            "ended", next(filter(None, map(_termination_reason, mine)), "") or failed.get("message", "Failed"), nodes
        )
    if item["metadata"].get("deletionTimestamp"):
        return JobState("running", "being deleted", nodes)
    if _condition(item, "Suspended"):
        return JobState("queued", "Suspended")
    head = [pod for pod in mine if pod["metadata"]["labels"].get(_JOB_LABEL) == "head"]
    if any(pod.get("status", {}).get("phase") == "Running" for pod in head):
        return JobState("running", next(filter(None, map(_waiting_reason, mine)), ""), nodes)
    return JobState("queued", next(filter(None, map(_waiting_reason, mine)), "no pod yet"), nodes)


def _containers(pod: Object) -> list[Object]:
    return pod.get("status", {}).get("containerStatuses") or []


def _waiting_reason(pod: Object) -> str:
    """Why a pod does not run, in Kubernetes' words; or ""."""
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    for container in _containers(pod):
        waiting: Any = container.get("state", {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason', '')}: {waiting.get('message', '')}".strip(": ")
    return ""


def _termination_reason(pod: Object) -> str:
    """Why a container was killed, such as OOMKilled or Evicted; or ""."""
    for container in _containers(pod):
        ended: Any = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated") or {}
        if ended.get("reason") not in (None, "Completed", "Error"):
            return str(ended["reason"])
    return str(pod.get("status", {}).get("reason") or "")


@dataclass(frozen=True)
class KubernetesSite:
    """backends.base.Site in the leading pod. mount, private: where the run's ConfigMap and Secret are."""

    cluster: KubernetesCluster
    run: SubmittedRun
    attempt: Attempt
    mount: Path = Path(MOUNT)
    private: Path = Path(SECRETS)

    def nodes(self) -> list[str]:
        """DNS names of the pods, from the ConfigMap. Raises LaunchError."""
        try:
            return (self.mount / "nodes").read_text(encoding="utf-8").split()
        except OSError as error:
            raise LaunchError(f"{self.mount / 'nodes'}: cannot be read: {error.strerror}: is this a pod of a run?") from None

    def command(self, node: str) -> list[str]:
        """agent.node in this pod, and transport.connect to the others."""
        python = [sys.executable, "-P", "-m"]
        if node == self.nodes()[0]:
            return [*python, "mikoshi.launch.agent.node"]
        wait, port = f"{self.cluster.patience.start:g}", str(port_of(self.run.spec.id))
        token = str(self.private / "token")
        return [
            *python,
            "mikoshi.launch.transport.connect",
            "connect",
            node,
            "--port",
            port,
            "--token-file",
            token,
            "--wait",
            wait,
        ]

    def after(self, run: SubmittedRun, attempt: Attempt, result: Result) -> Result:
        """Set `next` if the JobSet restarts the pods: after every exit code that is not final, as often as it may."""
        again = sum(other.request.cause == "requeue" for other in run.attempts) < self.cluster.restarts
        final = result.code in (DONE, USER_ERROR) or attempt.stop is not None
        return result if final or not again else result.model_copy(update={"next": "requeued"})
