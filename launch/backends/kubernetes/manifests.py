"""Builds the Kubernetes objects for a run. Secrets are in the run's Secret alone, and no two attempts share a name.

Pod 0 leads: it runs controller.head, and its Job restarts it if it is lost. The others wait for it with transport.connect.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mikoshi.launch.backends.setup import SETUP
from mikoshi.launch.config.cluster import KubernetesCluster
from mikoshi.launch.config.private_env import refuse_secrets
from mikoshi.launch.runs.record import Request, SubmittedRun
from mikoshi.launch.transport.connect import port_of
from mikoshi.trainer.config.run import to_toml
from mikoshi.trainer.errors import LaunchError

MOUNT = "/etc/mikoshi"
"""Folder in a pod with spec.json, request.json, nodes and setup.sh."""
SECRETS = "/etc/mikoshi-secret"
MANAGED = {"app.kubernetes.io/managed-by": "mikoshi"}
NODE_NAME = "MIKOSHI_NODE_NAME"
"""Variable of a pod's container with the name of its node, which a later attempt can avoid."""
RUN_LABEL = "mikoshi/run-id"
ATTEMPT_LABEL = "mikoshi/attempt"
USER = 1000
"""The user of the images in docker/ and of every pod, which is never root."""
SECRET_PLACEHOLDER = "made when it is submitted"
Object = dict[str, Any]
_DNS = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:m|[kMGTPE]|[KMGTPE]i)?")


def job_name(run: SubmittedRun, number: int) -> str:
    """A DNS label that is unique to this attempt, short enough for the pod names that Kubernetes derives from it."""
    label = re.sub(r"[^a-z0-9]+", "-", run.spec.config.run.name.lower()).strip("-")[:24].strip("-") or "run"
    return f"{label if label[0].isalpha() else f'r{label[:23]}'}-{run.spec.id[:12]}-{number}"


def node_names(run: SubmittedRun, request: Request, number: int) -> list[str]:
    """DNS names of the pods, in rank order. The first one leads."""
    name = job_name(run, number)
    return [f"{name}-head-0-0.{name}", *(f"{name}-nodes-0-{index}.{name}" for index in range(request.nodes - 1))]


def run_folder(run: SubmittedRun) -> PurePosixPath:
    """The run folder inside the pods. The one on the submitting machine is a record."""
    return PurePosixPath(run.spec.workdir) / PurePosixPath(run.spec.config.run.path)


def is_apart(run: SubmittedRun) -> bool:
    """Whether the folder on this machine is only a record, not the one that the pods write to."""
    return run.folder.path.absolute().as_posix() != run_folder(run).as_posix()


def check_manifest(run: SubmittedRun) -> None:
    """Raise LaunchError, in terms of the cluster file, for what Kubernetes would refuse or what would lose the run."""
    cluster, spec = _cluster_of(run), run.spec
    if not cluster.image:
        raise LaunchError("image: missing: a pod is started from an image; docker/ has two to build")
    names = {
        "namespace": cluster.namespace,
        "claim": cluster.claim,
        "service_account": cluster.service_account,
        "queue": cluster.queue,
    }
    for key, value in [*names.items(), *(("secret_refs", name) for name in cluster.secret_refs)]:
        if value and not (len(value) <= 63 and _DNS.fullmatch(value)):
            raise LaunchError(f"{key} = {value!r}: no name in Kubernetes: lower-case letters, digits and dashes, at most 63")
    for key, value in {"cpus": cluster.cpus, "memory": cluster.memory, "shared_memory": cluster.shared_memory}.items():
        if (value or key == "shared_memory") and not _QUANTITY.fullmatch(value):
            raise LaunchError(f"{key} = {value!r}: no quantity of Kubernetes, such as 8 or 512Gi")
    if not PurePosixPath(spec.workdir).is_absolute():
        raise LaunchError(f"workdir = {spec.workdir!r}: the path that pods have their files at begins with /")
    if cluster.claim and not run_folder(run).is_relative_to(spec.workdir):
        raise LaunchError(f"run.folder = {run_folder(run).parent}: not on the claim, which is mounted at {spec.workdir}")
    if not cluster.claim and "://" not in spec.config.checkpoint.folder:
        raise LaunchError("the pods' files are gone with them: set claim in the cluster file, or checkpoint.folder to s3://…")


def jobset(run: SubmittedRun, request: Request, number: int = 1, private: Mapping[str, str] | None = None) -> list[Object]:
    """The JobSet with its ConfigMap and its Secret.

    private: the Secret's values: the run's token and the variables of cluster.secrets; None: placeholders
    """
    check_manifest(run)
    cluster, name = _cluster_of(run), job_name(run, number)
    values = private if private is not None else dict.fromkeys(["token", *cluster.secrets], SECRET_PLACEHOLDER)
    files = {
        "spec.json": run.spec.model_dump_json(indent=2, exclude_none=True),
        "request.json": request.model_dump_json(indent=2),
        "nodes": "".join(f"{node}\n" for node in node_names(run, request, number)),
        "setup.sh": f"{cluster.setup}\n",
    }
    labels = _labels(run, number)
    queue = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    meta = _meta(run, name, labels | queue) | {"annotations": {"mikoshi/run-name": run.spec.config.run.name}}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _meta(run, name, labels), "data": files}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": _meta(run, name, labels), "stringData": dict(values)}
    spec = _jobset_spec(run, request, number)
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": spec}, config, secret]


def _jobset_spec(run: SubmittedRun, request: Request, number: int) -> Object:
    cluster = _cluster_of(run)
    head = ["mikoshi.launch.backends.kubernetes.pod", MOUNT, str(run_folder(run))]
    listen = [
        "mikoshi.launch.transport.connect",
        "serve",
        "--port",
        str(port_of(run.spec.id)),
        "--token-file",
        f"{SECRETS}/token",
    ]
    jobs = [_replicated("head", 1, 0, _pod(run, request, number, head))]
    if request.nodes > 1:
        jobs.append(_replicated("nodes", request.nodes - 1, (1 << 31) - 1, _pod(run, request, number, listen)))
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job_name(run, number)},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["head"]},
        "failurePolicy": {
            "maxRestarts": cluster.restarts,
            "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": jobs,
    }


def _replicated(name: str, pods: int, again: int, template: Object) -> Object:
    """One Job of the set. An evicted pod is restarted; exit code 2 ends everything."""
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "mikoshi", "operator": "In", "values": [2]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": again,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": template,
    }
    return {"name": name, "replicas": 1, "template": {"spec": spec}}


def _pod(run: SubmittedRun, request: Request, number: int, module: list[str]) -> Object:
    cluster, name, labels = _cluster_of(run), job_name(run, number), _labels(run, number)
    container = _container(run, "mikoshi", _with_setup(cluster, [cluster.python or "python", "-P", "-m", *module])) | {
        "ports": [{"name": "dial", "containerPort": port_of(run.spec.id), "protocol": "TCP"}],
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": NODE_NAME, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}},
            *(_from_secret(name, variable) for variable in cluster.secrets),
        ],
    }
    container["volumeMounts"] += [
        {"name": "config", "mountPath": MOUNT, "readOnly": True},
        {"name": "secret", "mountPath": SECRETS, "readOnly": True},
    ]
    token = {"key": "token", "path": "token"}
    spec = _pod_placement(run, request, labels) | {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(run.spec.config.recovery.grace) + 30,
        # The first process of a pod must reap orphans. With this setting it is Kubernetes' own, which does.
        "shareProcessNamespace": True,
        "containers": [container],
        "volumes": [
            *_volumes(run),
            {"name": "config", "configMap": {"name": name}},
            {"name": "secret", "secret": {"secretName": name, "defaultMode": 0o440, "items": [token]}},
        ],
    }  # fmt: skip
    return {"metadata": {"labels": labels}, "spec": spec}


def _container(run: SubmittedRun, name: str, command: list[str]) -> Object:
    """The parts of a container that all kinds of jobs share."""
    cluster = _cluster_of(run)
    fabric = cluster.host_network and cluster.network.hca
    limits: Object = {}
    if cluster.gpus_per_node:
        limits[cluster.gpu_resource] = str(cluster.gpus_per_node)
    if cluster.memory:
        limits["memory"] = cluster.memory
    requests = limits | ({"cpu": cluster.cpus} if cluster.cpus else {})
    security: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if fabric:  # InfiniBand pins the memory that it registers
        security["capabilities"]["add"] = ["IPC_LOCK"]
    return {
        "name": name,
        "image": cluster.image,
        "command": command,
        "workingDir": run.spec.workdir,
        "envFrom": [{"secretRef": {"name": secret}} for secret in cluster.secret_refs],
        "resources": {"limits": limits, "requests": requests},
        "securityContext": security,
        "volumeMounts": [
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "runs", "mountPath": _runs_at(run)},
        ],
    }


def _pod_placement(run: SubmittedRun, request: Request | None, labels: Mapping[str, str]) -> Object:
    """Where pods run, and as which user.

    One pod per node; never on excluded nodes, on bad ones only if there is no other; never as root.
    """
    cluster = _cluster_of(run)
    apart = [{"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": "kubernetes.io/hostname"}]
    affinity: Object = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": apart}}
    if request is not None:
        # Only the name identifies a node, not a label. The server takes one name per term.
        never, rather_not = (
            [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in _names(run, given)]
            for given in (request.exclude, request.bad)
        )
        nodes: Object = {}
        if never:
            nodes["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [{"matchFields": never}]}
        if rather_not:
            preferred = [{"weight": 100, "preference": {"matchFields": rather_not}}]
            nodes["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
        if nodes:
            affinity["nodeAffinity"] = nodes
    placed: Object = {
        "affinity": affinity,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip
    if cluster.node_selector:
        placed["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        placed["tolerations"] = [_toleration(given) for given in cluster.tolerations]
    if cluster.service_account:
        placed["serviceAccountName"] = cluster.service_account
    if cluster.host_network:
        placed |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return placed


def _names(run: SubmittedRun, given: Sequence[str]) -> list[str]:
    """Valid names among the nodes to avoid, without pods of this run whose node is unknown."""
    names = [name for name in dict.fromkeys(given) if run.spec.id[:12] not in name]
    return [name for name in names if len(name) <= 253 and all(map(_DNS.fullmatch, name.split(".")))]


def _toleration(given: Mapping[str, str]) -> Object:
    """Convert a toleration: Kubernetes takes one of its values as a number."""
    return {key: int(value) if key == "tolerationSeconds" and value.isdigit() else value for key, value in given.items()}


def _volumes(run: SubmittedRun) -> list[Object]:
    cluster = _cluster_of(run)
    claim = {"persistentVolumeClaim": {"claimName": cluster.claim}}
    return [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "runs", **(claim if cluster.claim else {"emptyDir": {}})},
    ]


def _runs_at(run: SubmittedRun) -> str:
    """Mount path of the volume: the whole working folder with a claim, else the run folders alone."""
    return run.spec.workdir if _cluster_of(run).claim else str(run_folder(run).parent)


def _with_setup(cluster: KubernetesCluster, argv: list[str]) -> list[str]:
    """The command after the setup lines. These come from a file, so that no text is inserted into a script."""
    return ["/bin/bash", "-c", SETUP, f"{MOUNT}/setup.sh", *argv] if cluster.setup else argv


def _from_secret(name: str, variable: str) -> Object:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": variable}}}


def _labels(run: SubmittedRun, number: int) -> dict[str, str]:
    return {**MANAGED, RUN_LABEL: run.spec.id, ATTEMPT_LABEL: str(number)}


def _meta(run: SubmittedRun, name: str, labels: Mapping[str, str]) -> Object:
    return {"name": name, "namespace": _cluster_of(run).namespace, "labels": dict(labels)}


def _cluster_of(run: SubmittedRun) -> KubernetesCluster:
    cluster = run.spec.cluster
    if not isinstance(cluster, KubernetesCluster):
        raise LaunchError(f'a cluster of kind "{cluster.kind}" has no Kubernetes objects: give one of kind "kubernetes"')
    return cluster


# --- exports for operators that start the ranks themselves ---


def pytorchjob(run: SubmittedRun, request: Request, number: int = 1) -> list[Object]:
    """A PyTorchJob of the training operator (kubeflow.org/v1) with its ConfigMap.

    torchrun starts the ranks. A lost node restarts the job from its newest checkpoint.
    """
    cluster, name = _cluster_of(run), job_name(run, number)
    pod = _exported_pod(run, request, number, "pytorch")
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod}}
    if request.nodes > 1:
        replicas["Worker"] = {"replicas": request.nodes - 1, "restartPolicy": "OnFailure", "template": pod}
    spec = {
        "nprocPerNode": str(cluster.ranks),
        "runPolicy": {"backoffLimit": cluster.restarts, "cleanPodPolicy": "Running"},
        "pytorchReplicaSpecs": replicas,
    }
    labels = _labels(run, number) | ({"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {})
    job = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _meta(run, name, labels), "spec": spec}
    return [_toml_map(run, number), job]


def trainjob(run: SubmittedRun, request: Request, number: int = 1) -> list[Object]:
    """A TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1), with a TrainingRuntime for the volumes and a
    ConfigMap."""
    cluster, name, group = _cluster_of(run), job_name(run, number), "trainer.kubeflow.org"
    job = {
        "name": "node",
        "template": {
            "metadata": {"labels": {f"{group}/trainjob-ancestor-step": "trainer"}},
            "spec": {"template": _exported_pod(run, request, number, "node")},
        },
    }
    jobset_spec = {"failurePolicy": {"maxRestarts": cluster.restarts}, "replicatedJobs": [job]}
    runtime = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _meta(run, name, _labels(run, number) | {f"{group}/framework": "torch"}),
        "spec": {"mlPolicy": {"numNodes": request.nodes, "torch": {}}, "template": {"spec": jobset_spec}},
    }
    labels = _labels(run, number) | ({"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {})
    train = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainJob",
        "metadata": _meta(run, name, labels),
        "spec": {
            "runtimeRef": {"apiGroup": group, "kind": "TrainingRuntime", "name": name},
            "trainer": {"numNodes": request.nodes, "numProcPerNode": cluster.ranks},
        },
    }
    return [_toml_map(run, number), runtime, train]


def _exported_pod(run: SubmittedRun, request: Request, number: int, container: str) -> Object:
    """The pod of an exported job. Its container has the name that the operator expects."""
    cluster, name, labels = _cluster_of(run), job_name(run, number), _labels(run, number)
    check_manifest(run)
    refuse_secrets(run.spec.cluster)
    train = ["-P", "-m", "torch.distributed.run", "-m", "mikoshi", "train", f"{MOUNT}/{_toml_name(run)}"]
    inside = _container(run, container, _with_setup(cluster, [cluster.python or "python", *train]))
    variables = {"HOME": "/tmp", "PYTHONSAFEPATH": "1"} | cluster.env
    inside["env"] = [{"name": key, "value": value} for key, value in variables.items()]
    inside["volumeMounts"].append({"name": "config", "mountPath": MOUNT, "readOnly": True})
    spec = _pod_placement(run, request, labels) | {
        "terminationGracePeriodSeconds": math.ceil(run.spec.config.recovery.grace) + 30,
        "containers": [inside],
        "volumes": [*_volumes(run), {"name": "config", "configMap": {"name": name}}],
    }
    return {"metadata": {"labels": labels}, "spec": spec}


def _toml_map(run: SubmittedRun, number: int) -> Object:
    files = {_toml_name(run): to_toml(run.spec.config), "setup.sh": f"{_cluster_of(run).setup}\n"}
    meta = _meta(run, job_name(run, number), _labels(run, number))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files}


def _toml_name(run: SubmittedRun) -> str:
    return f"{run.spec.config.run.name}.toml"


def to_yaml(objects: list[Object] | Object) -> str:
    """YAML documents that kubectl, or sky, takes as they are."""
    import yaml

    documents = objects if isinstance(objects, list) else [objects]
    # Through JSON, so that shared objects are written out instead of as YAML anchors.
    plain = [json.loads(json.dumps(document)) for document in documents]
    return yaml.safe_dump_all(plain, sort_keys=False, width=120, allow_unicode=True)
