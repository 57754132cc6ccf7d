"""Mixture of experts without dropped tokens: a router sends each token to K of E gated MLPs and sums what they say.

What a token gets depends on that token alone: no capacity, no dropping, so no layout of the cluster changes it. How the
experts are balanced depends on the token's row alone, for the same reason. All tokens of the data count there, a prompt's
as those that are predicted; padding, which is computed too, counts nowhere.

Shapes: B batch, T positions, C width, N = B*T tokens, E experts, K chosen of them, M = N*K rows sorted by expert,
F width of one expert, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mikoshi.trainer.model.config import ModelConfig, MoEConfig
from mikoshi.trainer.model.mlp import MLP, gated


class Routing(NamedTuple):
    """What the router says of N tokens; fp32 whatever the model's precision."""

    weights_NK: Tensor
    chosen_NK: Tensor
    scores_NE: Tensor
    logits_NE: Tensor


class Router(nn.Module):
    """Scores every expert for every token and chooses K. A bias moves the choice, never the weights."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.experts, config.width))
        nn.init.normal_(self.weight, std=config.init_std)
        # No gradient: the trainer moves it by bias_rate towards the experts that had too little to do.
        unbiased = moe.bias_rate is None
        self.bias = None if unbiased else nn.Parameter(torch.zeros(moe.experts), requires_grad=False)

    def forward(self, x_NC: Tensor) -> Routing:
        """Returns the routing of N tokens."""
        return self.route(x_NC, self.weight, self.bias)

    def route(self, x_NC: Tensor, weight_EC: Tensor, bias_E: Tensor | None) -> Routing:
        """Returns the routing of N tokens by the given weights, in fp32.

        weight_EC: one row an expert.
        bias_E: added to the scores for the choice alone.
        """
        logits_NE = x_NC.float() @ weight_EC.float().T
        scores_NE = logits_NE.softmax(-1) if self.moe.router == "softmax" else logits_NE.sigmoid()
        chosen_NK = self.choose(scores_NE.detach(), bias_E)
        weights_NK = scores_NE.gather(-1, chosen_NK)
        if self.moe.normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights_NK * self.moe.scale, chosen_NK, scores_NE, logits_NE)

    def choose(self, scores_NE: Tensor, bias_E: Tensor | None) -> Tensor:
        """The K best experts [N, K], of the best groups where there are several (DeepSeek-V3, arXiv:2412.19437, 2.1.2)."""
        moe = self.moe
        if bias_E is not None:
            scores_NE = scores_NE + bias_E.float()
        if moe.top_groups < moe.groups:
            scores_NGE = scores_NE.unflatten(-1, (moe.groups, -1))
            group_NG = scores_NGE.topk(min(2, scores_NGE.shape[-1]), dim=-1).values.sum(-1)
            best = group_NG.topk(moe.top_groups, dim=-1).indices
            barred_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(-1, best, False)
            scores_NE = scores_NGE.masked_fill(barred_NG[..., None], float("-inf")).flatten(1)
        return scores_NE.topk(moe.top_k, dim=-1).indices


class Experts(nn.Module):
    """E gated MLPs as three stacked matrices, each applied to its own rows."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        e, f, c = moe.experts, moe.width or config.d_mlp, config.width
        self.gate = nn.Parameter(torch.empty(e, f, c))
        self.up = nn.Parameter(torch.empty(e, f, c))
        self.down = nn.Parameter(torch.empty(e, c, f))
        for p in (self.gate, self.up, self.down):
            nn.init.normal_(p, std=config.init_std)

    def forward(self, x_MC: Tensor, counts_E: Tensor) -> Tensor:
        """x_MC: rows sorted by expert; counts_E: int64, how many of them are each expert's."""
        return self.compute(x_MC, counts_E, self.gate, self.up, self.down)

    def compute(self, x_MC: Tensor, counts_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The same for any experts: gate, up [E, F, C] and down [E, C, F] of any E. One without rows gets gradients 0."""
        if _fits_grouped(x_MC, gate):
            ends_E = counts_E.cumsum(0).int()

            def product(x: Tensor, w: Tensor) -> Tensor:
                return F.grouped_mm(x, w.transpose(1, 2), offs=ends_E)

            return product(gated(self.kind, product(x_MC, gate), product(x_MC, up)), down)
        parts = x_MC.split(_host_counts(x_MC, counts_E))
        each = zip(parts, gate.unbind(), up.unbind(), down.unbind(), strict=True)
        return torch.cat([F.linear(gated(self.kind, F.linear(x, g), F.linear(x, u)), d) for x, g, u, d in each])


def _fits_grouped(x_MC: Tensor, gate_EFC: Tensor) -> bool:
    """Whether one grouped product does it: bf16 on CUDA, with rows, their lengths multiples of 16 bytes."""
    aligned = gate_EFC.shape[1] % 8 == 0 and gate_EFC.shape[2] % 8 == 0
    return x_MC.is_cuda and x_MC.dtype == torch.bfloat16 and aligned and x_MC.shape[0] > 0


def _host_counts(x_MC: Tensor, counts_E: Tensor) -> list[int]:
    """The counts as numbers. A dry run's fake tensors have none: there, as if the experts were in balance."""
    if isinstance(counts_E, FakeTensor) or isinstance(x_MC, FakeTensor):
        rows, experts = x_MC.shape[0], counts_E.shape[0]
        return [rows // experts + (e < rows % experts) for e in range(experts)]
    counts: list[int] = counts_E.tolist()
    return counts


class _Dispatch(torch.autograd.Function):
    """x_MC[i] = x_NC[order[i] // K]. Backward sums a token's K gradients in the order of its choices, in fp32:
    the same bits each time, which indexing does not promise on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, order_M: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_M)
        ctx.top_k = top_k
        return x_NC[order_M // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_M,) = ctx.saved_tensors
        g_NKC = _unsorted(grads[0], order_M).unflatten(0, (-1, ctx.top_k))
        return g_NKC.sum(1, dtype=torch.float32).to(g_NKC.dtype), None, None


def _unsorted(y_MC: Tensor, order_M: Tensor) -> Tensor:
    return torch.empty_like(y_MC).index_copy(0, order_M, y_MC)


class _Attach(torch.autograd.Function):
    """Returns y as it is. Backward adds the gradient of `extra`, as if the layer's `balance_share` of it were added to the
    summed loss (whose own gradient is 1), and counts the step's choices: once a step whether or not the forward pass is
    recomputed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, extra: Tensor | None, counts_E: Tensor, layer: MoE) -> Tensor:
        ctx.save_for_backward(counts_E)
        ctx.layer, ctx.extra = layer, extra is not None
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (counts_E,) = ctx.saved_tensors
        layer: MoE = ctx.layer
        layer.load = counts_E if layer.load is None else layer.load + counts_E
        share = torch.as_tensor(layer.balance_share, dtype=torch.float32, device=counts_E.device) if ctx.extra else None
        return grads[0], share, None, None


def _as_it_is(x: Tensor) -> Tensor:
    return x


class MoE(nn.Module):
    """The layer that stands where a dense MLP would: routed experts and, beside them, shared ones that see every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.moe is None:
            raise ValueError("a mixture of experts needs the [model.moe] settings")
        self.moe = moe = config.moe
        self.router = Router(config, moe)
        self.experts = Experts(config, moe)
        self.shared = MLP(config, moe.shared * (moe.width or config.d_mlp)) if moe.shared else None
        self.row_sum: Callable[[Tensor], Tensor] = _as_it_is
        """Sums int64 [B, E] over the ranks that hold other positions of the same rows; here, rows are whole."""
        self.own_tokens: Callable[[Tensor], Tensor] = _as_it_is
        """The part of what is told of all tokens that is of those given here; here, they are all."""
        self.balance_share: Tensor | float = 1.0
        """Predicted tokens of the global batch over all of its tokens but padding, in the step that is computed."""
        self.load: Tensor | None = None
        """Choices of each expert [E] in the backward passes since the last take_load, by the tokens seen here but padding."""

    def forward(self, x_BTC: Tensor, padding_BT: Tensor | None = None) -> Tensor:
        """padding_BT: true at places that hold no token; of all positions, where those of `x_BTC` are a part of them."""
        x_NC = x_BTC.flatten(0, 1)
        routing = self.router(x_NC)
        counts_BE = self.count(routing.chosen_NK, rows=x_BTC.shape[0])
        counts_E = counts_BE.sum(0)
        order_M = routing.chosen_NK.flatten().argsort(stable=True)
        y_MC = self.experts(_Dispatch.apply(x_NC, order_M, self.moe.top_k), counts_E)  # type: ignore[no-untyped-call]
        y_NKC = _unsorted(y_MC, order_M).unflatten(0, (-1, self.moe.top_k))
        y_NC = torch.einsum("nk,nkc->nc", routing.weights_NK, y_NKC.float()).to(x_NC.dtype)
        y_BTC = y_NC.view_as(x_BTC)
        if self.shared is not None:
            y_BTC = y_BTC + self.shared(x_BTC)
        if self.training and torch.is_grad_enabled():
            real_N = None
            if padding_BT is not None:
                mine_BT = padding_BT if padding_BT.shape[1] == x_BTC.shape[1] else self.own_tokens(padding_BT)
                real_N = ~mine_BT.flatten()
                counts_BE = self.count(routing.chosen_NK, x_BTC.shape[0], real_N)
            y_BTC = _attach(y_BTC, self.balance_loss(routing, counts_BE, real_N), counts_BE.sum(0), self)
        return y_BTC

    def count(self, chosen_NK: Tensor, rows: int, real_N: Tensor | None = None) -> Tensor:
        """How often each row chose each expert: int64 [B, E]. real_N: of these tokens alone."""
        chosen = chosen_NK.view(rows, -1)
        each = torch.ones_like(chosen) if real_N is None else real_N[:, None].expand_as(chosen_NK).reshape(rows, -1).long()
        zeros_BE = torch.zeros(rows, self.moe.experts, dtype=torch.int64, device=chosen.device)
        return zeros_BE.scatter_add(1, chosen, each)

    def balance_loss(self, routing: Routing, counts_BE: Tensor, real_N: Tensor | None = None) -> Tensor | None:
        """The sum over the tokens held here, but padding (those that `real_N` leaves out), of which the engine adds the
        mean over the global batch to the mean loss; None if there are no such losses.

        aux_loss x T x E sum_e f_e P_e for each row (Fedus et al. 2021, arXiv:2101.03961, eq. 4, by row as in
        arXiv:2412.19437, eq. 17): f the share of the row's choices, P the mean score, summing to 1. Summed over the row's T
        tokens, T P is the sum of scores, so the ranks that share a row each add their own tokens' part and only the
        counts must be known whole. z_loss x sum over tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv:2202.08906).
        """
        moe, terms = self.moe, []
        if moe.aux_loss:
            whole_BE = self.row_sum(counts_BE).detach()
            share_BE = whole_BE / whole_BE.sum(-1, keepdim=True).clamp(min=1)
            scores_NE = routing.scores_NE
            if moe.router == "sigmoid":
                scores_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
            if real_N is not None:
                scores_NE = scores_NE * real_N[:, None]
            row_scores_BE = scores_NE.unflatten(0, (counts_BE.shape[0], -1)).sum(1)
            terms.append(moe.aux_loss * moe.experts * (share_BE * row_scores_BE).sum())
        if moe.z_loss:
            squares_N = routing.logits_NE.logsumexp(-1).square()
            terms.append(moe.z_loss * (squares_N if real_N is None else squares_N * real_N).sum())
        return torch.stack(terms).sum() if terms else None

    def take_load(self) -> Tensor:
        """The load [E], int64, since the last call; from here on it counts anew."""
        load, self.load = self.load, None
        return torch.zeros(self.moe.experts, dtype=torch.int64, device=self.router.weight.device) if load is None else load


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attach(y: Tensor, extra: Tensor | None, counts_E: Tensor, layer: MoE) -> Tensor:
    """Apart because a compiled backward pass could not write into the module."""
    out: Tensor = _Attach.apply(y, extra, counts_E, layer)  # type: ignore[no-untyped-call]
    return out
