"""The environment variables of a cluster's ranks, each with its reason, and warnings about the order of ranks.

Some are not set on purpose. NCCL finds InfiniBand, NVLink SHARP and the topology by itself, and its documentation advises
against NCCL_IB_DISABLE, NCCL_NVLS_ENABLE, NCCL_ALGO, NCCL_PROTO and the like in production. torch ignores
TORCH_NCCL_AVOID_RECORD_STREAMS (https://github.com/pytorch/pytorch/pull/194701). The caches of torch.compile are in the
node's own temporary folder anyway. CUDA_DEVICE_MAX_CONNECTIONS = 1 is for engines that rely on the order of kernel
launches, and DTensor's tensor parallelism does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Protocol

from mikoshi.launch.config.cluster import Base
from mikoshi.launch.host.network import RESOLVER

NCCL_DOCS = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
TORCH_DOCS = "https://docs.pytorch.org/docs/stable/distributed.html"
TORCH_NCCL_DOCS = "https://docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html"


@dataclass(frozen=True)
class Setting:
    """A variable of every rank, and the reason for its value."""

    name: str
    value: str
    why: str


class Degrees(Protocol):
    """The degrees of a run's parallelism: the trainer's section `parallel`, or a Layout."""

    @property
    def tp(self) -> int:
        """Tensor parallel degree."""
        ...

    @property
    def cp(self) -> int:
        """Context parallel degree."""
        ...

    @property
    def ep(self) -> int:
        """Expert parallel degree."""
        ...

    @property
    def expert_tp(self) -> int | None:
        """Tensor parallel degree inside an expert; None: tp."""
        ...


def settings(cluster: Base, nodes: int, ranks_per_node: int, interface: str, device: str, cores: int) -> list[Setting]:
    """Return the variables of every rank. Those of the cluster file take precedence.

    interface: the one by which nodes reach each other
    device: cpu or cuda
    cores: cores of a node that its ranks may use
    """
    chosen = [
        *_sockets(interface, device),
        *(_nccl(cluster, nodes) if device == "cuda" else ()),
        _threads(ranks_per_node, cores),
        Setting(
            *RESOLVER,
            "torch asks for the name of every peer that it connects to: where no name server answers, that would take 10 s at "
            "each start (resolv.conf(5))",
        ),
    ]  # fmt: skip
    users = [Setting(name, value, "the cluster file's env") for name, value in cluster.env.items()]
    return [one for one in chosen if one.name not in cluster.env] + users


def as_records(chosen: list[Setting]) -> list[dict[str, str]]:
    """The records of settings.json."""
    return [asdict(one) for one in chosen]


def _sockets(interface: str, device: str) -> list[Setting]:
    gloo = Setting(
        "GLOO_SOCKET_IFNAME", interface,
        "gloo would take the interface that this host's name resolves to, often loopback or a slow one; this one reaches the "
        f"other nodes ({TORCH_DOCS})",
    )  # fmt: skip
    if device != "cuda":
        return [gloo]
    nccl = Setting(
        "NCCL_SOCKET_IFNAME", f"={interface}",
        "NCCL may try an interface that is up and leads nowhere, and hang; the = stands for exactly this name, where "
        f"{interface} alone would also take {interface}0 ({NCCL_DOCS}#nccl-socket-ifname)",
    )  # fmt: skip
    return [gloo, nccl]


def _nccl(cluster: Base, nodes: int) -> list[Setting]:
    found = [
        Setting("NCCL_DEBUG", "WARN", f"NCCL says why a call failed, and nothing else ({NCCL_DOCS}#nccl-debug)"),
        Setting(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING", "3",
            "a collective that fails ends its rank, so that the run can go on from its checkpoint instead of waiting: torch's "
            f"default, whatever the node's environment says ({TORCH_NCCL_DOCS})",
        ),
    ]  # fmt: skip
    if cluster.network.hca and nodes > 1:
        why = f"network.hca of the cluster file: the adapters that carry traffic between nodes ({NCCL_DOCS}#nccl-ib-hca)"
        found.append(Setting("NCCL_IB_HCA", cluster.network.hca, why))
    return found


def _threads(ranks_per_node: int, cores: int) -> Setting:
    each = max(1, cores // max(1, ranks_per_node))
    why = f"{cores} cores of a node for {ranks_per_node} of its ranks: with more threads they would push each other aside"
    return Setting("OMP_NUM_THREADS", str(each), why)


def check_order(degrees: Degrees, ranks_per_node: int, nodes: int) -> list[str]:
    """Warn about parallelism that crosses nodes and should not: a line each, with what to do.

    Ranks are numbered node by node, and tp is the innermost axis of a layout, then cp (Layout.coordinates). A group of
    consecutive ranks is within a node if its size divides the number of ranks of a node.
    """
    if nodes < 2:
        return []
    lines = []
    if ranks_per_node % degrees.tp:
        fits = [n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0 and n < degrees.tp]
        lines.append(
            f"parallel.tp = {degrees.tp}: does not fit inside a node of {ranks_per_node} ranks: every layer would wait for the "
            f"network between nodes; use tp = {max(fits, default=1)}, and pp, cp or zero = 3 for the rest"
        )
    elif ranks_per_node % (degrees.tp * degrees.cp) and degrees.cp > 1:
        lines.append(
            f"parallel.cp = {degrees.cp}: with tp = {degrees.tp} it spans {degrees.tp * degrees.cp} ranks, and a node has "
            f"{ranks_per_node}: keys and values cross the network in every layer; it works, and is fast only on a fast network"
        )
    experts = degrees.ep * (degrees.expert_tp or degrees.tp)
    if degrees.ep > 1 and ranks_per_node % experts:
        lines.append(
            f"parallel.ep = {degrees.ep}: it spans {experts} ranks, and a node has {ranks_per_node}: tokens cross the network "
            "on their way to the experts; it works, and is fast only on a fast network"
        )
    return lines
