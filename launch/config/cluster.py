"""The schema of a cluster file, which describes a cluster once for all runs."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, field_validator

from mikoshi.launch.config.hostfile import read_hostfile
from mikoshi.launch.config.names import Host, Interface, Line, Plain, Variable, Word, same_host
from mikoshi.launch.host.gpus import count_visible_gpus
from mikoshi.trainer.config.data import Count, Natural, Section
from mikoshi.trainer.config.toml import override, read, validate
from mikoshi.trainer.errors import ConfigError, LaunchError

OWN = Path("configs/clusters")
SHIPPED = next(
    (place for place in (Path(__file__).resolve().parents[2] / OWN, Path(sysconfig.get_path("data"), "share/mikoshi/clusters"))
     if place.is_dir()), OWN,
)  # fmt: skip
"""The shipped cluster files: in the checkout, or where an installation has put them."""


class NetworkSection(Section):
    """Empty: found by itself."""

    interface: Interface = Field(
        "", description="interface that nodes reach each other by, such as ib0 (default: the default route's)"
    )
    hca: Line = Field("", description="InfiniBand adapters for NCCL, as NCCL_IB_HCA has them, such as mlx5_0,mlx5_1")


class PatienceSection(Section):
    """How long is waited for nodes."""

    lost: float = Field(5.0, gt=0, description="seconds without a word from a node before it counts as lost")
    rejoin: float = Field(0.0, ge=0, description="seconds that a lost node is waited for before a run goes on with fewer")
    start: float = Field(300.0, gt=0, description="seconds that all nodes may take to come up")


class Base(Section):
    """Settings of every kind of cluster."""

    nodes: Count = Field(1, description="nodes of a run that does not say how many")
    gpus_per_node: Natural = Field(0, description="GPUs of a node; 0: it has none, or, on this machine, those that are there")
    ranks_per_node: Natural = Field(0, description="ranks of a node (default: one a GPU, else 1)")
    python: Plain = Field("", description="the interpreter that has Mikoshi, on every node (default: the one that submits)")
    workdir: Plain = Field(
        "", description="folder, the same on every node, that relative paths start from (default: the current one)"
    )
    setup: Plain = Field("", description="lines of shell before anything is started: module load, source activate")
    env: dict[Variable, Plain] = Field({}, description="variables of every rank; they win over those that Mikoshi chooses")
    secrets: list[Variable] = Field(
        [], description="variables taken from the one who submits, never written where others can read"
    )
    image: Line = Field("", description="container image")
    network: NetworkSection = NetworkSection()
    patience: PatienceSection = PatienceSection()

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1


class LocalCluster(Base):
    """This machine."""

    kind: Literal["local"]


class SshCluster(Base):
    """Hosts that are reached by ssh."""

    kind: Literal["ssh"]
    hosts: list[Host] = Field(
        [], description="host names, in the order that ranks are laid out in; more than `nodes` are spares"
    )
    hostfile: Plain = Field("", description="hosts from a file in DeepSpeed's format instead: a line `name slots=8` each")
    user: Word = Field("", description="account there (default: as ssh has it)")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(22, description="of sshd there; 22: as ssh has it")
    identity: Plain = Field("", description="private key file (default: as ssh has it)")
    known_hosts: Plain = Field(
        "", description="file of the hosts' keys; a host whose key is not there is refused (default: ssh's own)"
    )
    connect_timeout: Count = Field(10, description="seconds to reach a host")

    @field_validator("hosts")
    @classmethod
    def _once_each(cls, hosts: list[str]) -> list[str]:
        seen: dict[str, str] = {}
        for host in hosts:
            if (other := seen.get(same_host(host))) is not None:
                raise ValueError(f"{host} stands there twice{'' if other == host else f', as {other}'}")
            seen[same_host(host)] = host
        return hosts


_ALONE = (
    "--contiguous", "--exclusive", "--get-user-env", "--hold", "--ignore-pbs", "--nice", "--overcommit", "--oversubscribe",
    "--propagate", "--reboot", "--spread-job", "--use-min-nodes",
)  # fmt: skip
"""Options of sbatch without a value. For any other, the next word would be its value."""

_OWN = (
    "--array", "--chdir", "--comment", "--exclude", "--export", "--export-file", "--job-name", "--nodes", "--no-requeue",
    "--open-mode", "--output", "--parsable", "--requeue", "--signal", "--test-only", "--wait", "--wrap",
)  # fmt: skip


class SlurmCluster(Base):
    """A cluster with Slurm."""

    kind: Literal["slurm"]
    partition: Word = Field("", description="partition of the jobs (default: the cluster's own; `sinfo` lists them)")
    account: Word = Field("", description="account that the jobs are charged to (default: the user's own)")
    qos: Word = Field("", description="quality of service (default: the account's)")
    constraint: Line = Field("", description="features of nodes, as sbatch --constraint has them")
    reservation: Word = Field("", description="reservation to run in (default: none)")
    gpu_request: Literal["gres", "gpus-per-node", "none"] = Field(
        "gres", description="how GPUs are asked for; none: nodes are given whole"
    )
    gpu_type: Word = Field("", description="in --gres=gpu:TYPE:n")
    cpus_per_node: Natural = Field(0, description="cores asked for on a node; 0: as the partition has it")
    memory: Word = Field("", description="memory asked for on a node, such as 512G; 0: all of it")
    exclusive: bool = Field(False, description="nodes that no other job shares")
    time: Word = Field("", description="time limit of a job, as Slurm has it: 2-00:00:00; a longer run is chained on by itself")
    warning: Count = Field(120, description="seconds before the time limit at which a run saves and asks to be queued again")
    requeues: Natural = Field(20, description="times that a job asks to be queued again without a checkpoint in between")
    exclude: list[Host] = Field([], description="nodes never to use")
    options: list[Line] = Field([], description="more options for sbatch, one an entry: --mail-type=END")

    @field_validator("options")
    @classmethod
    def _long(cls, options: list[str]) -> list[str]:
        for option in options:
            name, equals, _ = option.partition("=")
            if not option.startswith("--") or len(name) < 4 or not (equals or name in _ALONE):
                raise ValueError(f"{option!r}: a long option with its value after =, such as --mail-type=END")
            if own := next((own for own in _OWN if own.startswith(name)), ""):  # Slurm accepts abbreviated options
                raise ValueError(f"{option!r}: {own} is set by Mikoshi: leave it out")
        return options


class KubernetesCluster(Base):
    """A cluster with Kubernetes and JobSet."""

    kind: Literal["kubernetes"]
    namespace: Word = Field("default", description="namespace that the objects are made in")
    context: Line = Field("", description="of the kubeconfig (default: its current one)")
    claim: Word = Field("", description="PersistentVolumeClaim with the run folders, mounted at workdir")
    service_account: Word = Field("", description="service account of the pods (default: the namespace's)")
    secret_refs: list[Word] = Field([], description="names of Secrets whose keys become variables of every rank")
    node_selector: dict[str, str] = Field({}, description="labels of the nodes to use")
    tolerations: list[dict[str, str]] = Field([], description="taints to put up with, as Kubernetes has them")
    gpu_resource: Line = Field("nvidia.com/gpu", description="what a GPU is called in resource limits")
    cpus: Word = Field("", description="cores a pod asks for")
    memory: Word = Field("", description="memory a pod asks for, such as 512Gi")
    shared_memory: Word = Field("16Gi", description="size of /dev/shm")
    queue: Word = Field("", description="Kueue's LocalQueue, if jobs go through one")
    host_network: bool = Field(False, description="pods use the node's own network, as InfiniBand often needs")
    restarts: Natural = Field(20, description="times that all pods are started anew after one is lost")


Cluster = Annotated[LocalCluster | SshCluster | SlurmCluster | KubernetesCluster, Field(discriminator="kind")]
KINDS: dict[str, type[Base]] = {
    "local": LocalCluster, "ssh": SshCluster, "slurm": SlurmCluster, "kubernetes": KubernetesCluster,
}  # fmt: skip
ADAPTER: TypeAdapter[Cluster] = TypeAdapter(Cluster)


def load_cluster(name: str, overrides: tuple[str, ...] = ()) -> Cluster:
    """Load a cluster file by path, or by name from configs/clusters, here or as shipped.

    Raises ConfigError, a line for each mistake.

    overrides: settings such as "partition=long"
    """
    path = Path(name)
    if not name.endswith(".toml") and "/" not in name:
        path = next((file for folder in (OWN, SHIPPED) if (file := folder / f"{name}.toml").is_file()), OWN / f"{name}.toml")
    if not path.is_file():
        known = sorted({file.stem for folder in (OWN, SHIPPED) for file in folder.glob("*.toml")})
        raise ConfigError(f"--on {name}: no such cluster file: {path}; there are {', '.join(known) or 'none'}")
    values, origin = read(path)
    kind = next((text[5:] for text in reversed(overrides) if text.startswith("kind=")), values.get("kind"))
    override(KINDS.get(kind, Base) if isinstance(kind, str) else Base, values, origin, overrides)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{path}: kind = {kind!r}: one of {', '.join(KINDS)}")
    cluster: Cluster = validate(KINDS[kind], values, origin)  # type: ignore[assignment]
    if isinstance(cluster, SshCluster):
        return _with_hosts(cluster, path)
    if isinstance(cluster, LocalCluster) and not cluster.gpus_per_node:
        return cluster.model_copy(update={"gpus_per_node": count_visible_gpus()})
    return cluster


def _with_hosts(cluster: SshCluster, path: Path) -> SshCluster:
    if bool(cluster.hosts) == bool(cluster.hostfile):
        raise ConfigError(f"{path}: give hosts or a hostfile, one of the two")
    if not cluster.hostfile:
        return cluster
    slots = read_hostfile(path.parent / cluster.hostfile)
    counts = sorted(set(slots.values()))
    if len(counts) > 1:
        raise LaunchError(
            f"{path.parent / cluster.hostfile}: slots {', '.join(map(str, counts))}: every node must carry as many ranks"
        )
    ranks = cluster.ranks_per_node or counts[0]
    return cluster.model_copy(update={"hosts": list(slots), "hostfile": "", "ranks_per_node": ranks})
