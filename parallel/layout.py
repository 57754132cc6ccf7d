"""A layout: how many ranks carry the model and what each keeps, validated before any rank starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.errors import LayoutError

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class Layout:
    """Data-parallel ranks and their ZeRO stage (Rajbhandari et al. 2020, arXiv:1910.02054).

    What the ranks share out: 0 nothing; 1 the optimizer's state; 2 gradients too; 3 parameters too.
    """

    world: int
    zero: ZeroStage

    @property
    def replicas(self) -> int:
        """Ranks that hold the same piece of the state."""
        return self.world if self.zero == 0 else 1

    @property
    def shards(self) -> int:
        """Pieces that the state is cut into."""
        return self.world // self.replicas

    def rows_per_rank(self, global_batch: int) -> int:
        """Rows of each rank in a step. Raises LayoutError when they do not come out even."""
        if global_batch % self.world:
            fit = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            near = sorted(sorted(fit, key=lambda n: abs(n - self.world))[:3])
            up = -(-global_batch // self.world) * self.world
            raise LayoutError(
                f"train.global_batch {global_batch} cannot be shared evenly by {self.world} ranks: "
                f"start {', '.join(map(str, near[:-1]))} or {near[-1]} ranks, or use train.global_batch={up}"
                if len(near) > 1
                else f"train.global_batch {global_batch} cannot be shared by {self.world} ranks: use train.global_batch={up}"
            )
        return global_batch // self.world

    def mesh(self, device_type: str) -> DeviceMesh:
        """replicas x shards, named `replica` and `shard`."""
        return init_device_mesh(device_type, (self.replicas, self.shards), mesh_dim_names=("replica", "shard"))


def micro_rows(rows: int, at_most: int | None) -> int:
    """Rows of a micro-batch: the largest number that divides `rows` and is no more than `at_most`."""
    return next(n for n in range(min(rows, at_most or rows), 0, -1) if rows % n == 0)
