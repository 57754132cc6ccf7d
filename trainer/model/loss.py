"""Cross-entropy of the next token, with the logits made a chunk of rows at a time and never all at once."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not predicted: padding, or the first token of another document."""

# Logits per chunk: on CPU a chunk stays near the caches, on a GPU it is enough to fill the matrix units.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}


class Vocabulary(Protocol):
    """A part of the vocabulary, rows `first` and on, and what the holders of the other parts say of theirs."""

    @property
    def first(self) -> int:
        """The first row of this part."""

    def largest(self, x: Tensor) -> Tensor:
        """Returns the elementwise maximum of `x` over all parts."""

    def total(self, x: Tensor) -> Tensor:
        """Returns the elementwise sum of `x` over all parts."""


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows of hidden states whose logits are made together."""
    return max(16, CHUNK_ELEMENTS.get(device.type, 1 << 25) // vocab)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits exist, so that backward only scales them.

    The matrix work is that of the ordinary forward and backward (three products), without a recompute.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, w_VC: Tensor, labels_N: Tensor, scale: float, rows: int, part: Vocabulary | None,
        known: int | None,
    ) -> Tensor:  # fmt: skip
        want_x, want_w = ctx.needs_input_grad[:2]
        total = x_NC.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x_NC) if want_x else None
        grad_w = torch.zeros(w_VC.shape, dtype=torch.float32, device=w_VC.device) if want_w else None
        here_known = None if known is None else max(0, known - (0 if part is None else part.first))
        # Two buffers serve every chunk: fresh ones would be paged in anew each time.
        logits_buffer = x_NC.new_empty(min(rows, len(x_NC)), w_VC.shape[0])
        log_p_buffer = torch.empty_like(logits_buffer, dtype=torch.float32)
        for start in range(0, x_NC.shape[0], rows):
            x, labels = x_NC[start : start + rows], labels_N[start : start + rows]
            logits, log_p = logits_buffer[: len(x)], log_p_buffer[: len(x)]
            counted = labels != IGNORED
            target = labels.clamp(min=0)[:, None]
            torch.mm(x, w_VC.T, out=logits)
            if here_known is not None:
                logits[:, here_known:] = -torch.inf
            if part is None:
                torch.log_softmax(logits.float() * scale if scale != 1.0 else logits, -1, dtype=torch.float32, out=log_p)
                here, log_p_target = None, log_p.gather(1, target)[:, 0]
            else:
                target = target - part.first
                here = (target >= 0) & (target < len(w_VC))
                target = target.clamp(0, len(w_VC) - 1)
                log_p_target = _log_softmax_of_part(logits, scale, target, here, part, log_p)
            total -= (log_p_target * counted).sum()
            if not (want_x or want_w):
                continue
            error = log_p.exp_()  # the softmax, and below its gradient
            one = error.new_full((), -1.0).expand_as(target) if here is None else -here.to(error.dtype)
            error.scatter_add_(1, target, one)
            error = error.to(x.dtype)
            # Uncounted rows and the scale are applied on the narrow side of both products.
            weight = (counted * scale).to(x.dtype)[:, None]
            if grad_x is not None:
                torch.mm(error, w_VC, out=grad_x[start : start + rows]).mul_(weight)
            if grad_w is not None:
                if x.dtype == torch.float32:
                    grad_w.addmm_(error.T, x * weight)
                else:
                    grad_w.add_(error.T @ (x * weight))
        # Not save_for_backward: what backward scales in place could then not be asked for again, as the second half of a
        # split backward pass does.
        ctx.gradients = grad_x, None if grad_w is None else grad_w.to(w_VC.dtype)
        ctx.scale = None
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        (upstream,) = grads
        factor = upstream if ctx.scale is None else upstream / ctx.scale
        ctx.scale = upstream
        # In place: nothing else holds them, and the second matrix the size of the vocabulary would be the peak.
        scaled = [None if g is None else g.mul_(factor.to(g.dtype)) for g in ctx.gradients]
        return scaled[0], scaled[1], None, None, None, None, None


def _log_softmax_of_part(logits: Tensor, scale: float, target: Tensor, here: Tensor, part: Vocabulary, out: Tensor) -> Tensor:
    """Fill `out` with log p of this part's tokens, normalised over the whole vocabulary, and return log p of the target,
    wherever it is (Shoeybi et al. 2019, arXiv:1909.08053, section 3)."""
    torch.mul(logits, scale, out=out)
    out -= part.largest(out.amax(-1, keepdim=True))
    mine = torch.stack((out.exp().sum(-1), out.gather(1, target).masked_fill(~here, 0.0)[:, 0]))
    mass, chosen = part.total(mine).unbind()
    log_mass = mass.log()
    out -= log_mass[:, None]
    return chosen - log_mass


def next_token_loss(
    x_BTC: Tensor, w_VC: Tensor, labels_BT: Tensor, scale: float = 1.0, part: Vocabulary | None = None,
    known: int | None = None,
) -> Tensor:  # fmt: skip
    """Sum over all counted positions of -log p(label), in nats, fp32 scalar.

    `w_VC`: the head's weight, V vocabulary rows; logits are x w^T x `scale`. Labels equal to IGNORED add nothing.
    A sum, not a mean: the engine divides by the count of the whole batch, whichever ranks hold it. `part`: `w_VC` has a
    part of the vocabulary only, and the gradient of `x_BTC` is that part's share. `known`: p is over the first so many
    tokens of the whole vocabulary, as if the rows beyond were not there.
    """
    x_NC, labels_N = x_BTC.flatten(0, 1), labels_BT.flatten()
    if not torch.is_grad_enabled():  # autograd would still report that a parameter wants its gradient
        x_NC, w_VC = x_NC.detach(), w_VC.detach()
    rows = chunk_rows(w_VC.shape[0], x_BTC.device)
    total: Tensor = _ChunkedCrossEntropy.apply(x_NC, w_VC, labels_N, scale, rows, part, known)  # type: ignore[no-untyped-call]
    return total
