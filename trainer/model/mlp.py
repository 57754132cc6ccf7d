"""The dense feed-forward layer, gated or not.

Shapes: B batch, T positions, C width, F mlp width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mikoshi.trainer.model.config import GATED, ModelConfig


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202), elementwise."""
    return (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up


class MLP(nn.Module):
    """The feed-forward layer of a block, gated if the config's `mlp` is."""

    def __init__(self, config: ModelConfig, mlp_width: int | None = None) -> None:
        super().__init__()
        self.kind, width = config.mlp, mlp_width or config.d_mlp
        self.gate = nn.Linear(config.width, width, bias=config.bias) if config.mlp in GATED else None
        self.up = nn.Linear(config.width, width, bias=config.bias)
        self.down = nn.Linear(width, config.width, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns [B, T, C]."""
        up_BTF = self.up(x_BTC)
        if self.gate is not None:
            h_BTF = gated(self.kind, self.gate(x_BTC), up_BTF)
        elif self.kind == "relu":
            h_BTF = F.relu(up_BTF)
        else:
            h_BTF = F.gelu(up_BTF, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        out: Tensor = self.down(h_BTF)
        return out
