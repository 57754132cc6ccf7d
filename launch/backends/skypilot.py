"""Exports a run as a SkyPilot task. The config is inside the task, and torchrun starts the ranks."""

from __future__ import annotations

import shlex
from typing import Any

from mikoshi.launch.config.cluster import KubernetesCluster, SlurmCluster
from mikoshi.launch.config.private_env import refuse_secrets
from mikoshi.launch.runs.record import Request, SubmittedRun
from mikoshi.trainer.config.run import to_toml

_PORT = 29500


def skypilot(run: SubmittedRun, request: Request, number: int = 1) -> dict[str, Any]:
    """Return the task. If the cluster does not name its GPUs, `sky launch --gpus H100:8` does."""
    refuse_secrets(run.spec.cluster)
    cluster, name = run.spec.cluster, run.spec.config.run.name
    python = shlex.quote(cluster.python) if isinstance(cluster, KubernetesCluster) and cluster.python else "python"
    resources: dict[str, Any] = {}
    if cluster.image:
        resources["image_id"] = f"docker:{cluster.image}"
    if isinstance(cluster, SlurmCluster) and cluster.gpu_type and cluster.gpus_per_node:
        resources["accelerators"] = f"{cluster.gpu_type.upper()}:{cluster.gpus_per_node}"
    place = f'"$HOME"/.mikoshi/{run.spec.id}'
    config = f"{place}/{shlex.quote(f'{name}.toml')}"
    lines = [
        "set -e",
        *cluster.setup.splitlines(),
        f"mkdir -p {place}",
        f"printf '%s' {shlex.quote(to_toml(run.spec.config))} > {config}",
        'master=$(printf "%s\\n" "$SKYPILOT_NODE_IPS" | head -n 1)',
        f'exec {python} -P -m torch.distributed.run --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" '
        f'--nproc-per-node={cluster.ranks} --master-addr="$master" --master-port={_PORT} -m mikoshi train {config}',
    ]
    return {
        "name": f"{name}-{number}",
        "num_nodes": request.nodes,
        **({"resources": resources} if resources else {}),
        "envs": {"PYTHONSAFEPATH": "1", **cluster.env},
        "run": "\n".join(lines) + "\n",
    }
