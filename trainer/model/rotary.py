"""Rotary positions: which angle each pair of head elements turns by at each position.

Shapes: B batch, T positions, H heads, D head elements, R rotated pairs (d_rotary / 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mikoshi.trainer.model.config import RopeConfig


def frequencies(rope: RopeConfig, d_rotary: int, length: int, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Radians per position, fp32 [R], and the factor that cos and sin are multiplied by.

    `length` is the longest position in use; only `dynamic` depends on it. Sources: rotary, Su et al. 2021
    (arXiv:2104.09864); linear, Chen et al. 2023 (arXiv:2306.15595); dynamic NTK and yarn, Peng et al. 2023
    (arXiv:2309.00071, equations 15 to 23); llama3, the Llama 3.1 reference.
    """
    exponents = torch.arange(0, d_rotary, 2, dtype=torch.float32, device=device) / d_rotary
    if rope.scaling == "dynamic":
        stretch = rope.factor * max(length, rope.original_context) / rope.original_context - (rope.factor - 1)
        return 1.0 / (rope.theta * stretch ** (d_rotary / (d_rotary - 2))) ** exponents, 1.0
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return plain / rope.factor, 1.0
    if rope.scaling == "llama3":
        rotations = plain * rope.original_context / (2 * math.pi)
        keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return plain * keep + plain / rope.factor * (1 - keep), 1.0
    if rope.scaling == "yarn":

        def pair_turning(times: float) -> float:
            rotations = math.log(rope.original_context / (times * 2 * math.pi))
            return d_rotary * rotations / (2 * math.log(rope.theta))

        first, last = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        low, high = max(first, 0), min(last, d_rotary - 1)
        pairs = torch.arange(d_rotary // 2, dtype=torch.float32, device=device)
        keep = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * keep + plain / rope.factor * (1 - keep), _magnitude(rope)
    return plain, 1.0


def _magnitude(rope: RopeConfig) -> float:
    """Yarn's factor of cos and sin: as given, else by the two mscales where both are, else by `factor` alone."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return (0.1 * rope.mscale * math.log(rope.factor) + 1.0) / (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0)
    return 0.1 * math.log(rope.factor) + 1.0


def rotation(rope: RopeConfig, d_rotary: int, positions_BT: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, fp32 [B, 1, T, R] (B may be 1: shared by the batch)."""
    radians_R, magnitude = frequencies(rope, d_rotary, length, positions_BT.device)
    angles = positions_BT[:, None, :, None].float() * radians_R
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2R elements of each head, pair (i, i + R) by angle i; in fp32, returned in x's dtype."""
    half = cos.shape[-1]
    first, second, rest = x_BHTD.split((half, half, x_BHTD.shape[-1] - 2 * half), dim=-1)
    first, second = first.float(), second.float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHTD.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
