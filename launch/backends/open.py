"""Opens the backend and the site for a cluster's kind. Each is imported when it is needed."""

from __future__ import annotations

from mikoshi.launch.backends.base import Backend, Site
from mikoshi.launch.config.cluster import Cluster
from mikoshi.launch.runs.record import Attempt, SubmittedRun


def open_backend(cluster: Cluster) -> Backend:
    """Return the backend for a cluster's kind."""
    if cluster.kind == "slurm":
        from mikoshi.launch.backends.slurm.slurm import SlurmBackend

        return SlurmBackend(cluster)
    if cluster.kind == "kubernetes":
        from mikoshi.launch.backends.kubernetes.kubernetes import KubernetesBackend

        return KubernetesBackend(cluster)
    from mikoshi.launch.backends.local.local import LocalBackend

    return LocalBackend(cluster)


def open_site(cluster: Cluster, run: SubmittedRun, attempt: Attempt) -> Site:
    """Return the site for a cluster's kind, for controller.head."""
    if cluster.kind == "slurm":
        from mikoshi.launch.backends.slurm.site import SlurmSite

        return SlurmSite(cluster, run, attempt)
    if cluster.kind == "ssh":
        from mikoshi.launch.backends.ssh.ssh import SshSite

        return SshSite(cluster, run, attempt)
    if cluster.kind == "kubernetes":
        from mikoshi.launch.backends.kubernetes.kubernetes import KubernetesSite

        return KubernetesSite(cluster, run, attempt)
    from mikoshi.launch.backends.local.local import LocalSite

    return LocalSite(cluster, run, attempt)
