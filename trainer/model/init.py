"""Initial weights as a function of (seed, canonical name, global index): any shard can be made alone, bit for bit.

A rank that holds rows 4,096 to 8,191 of a matrix asks for exactly those; nobody ever makes the whole. The values come
from a counter-based generator (no state to advance) and an inverse normal distribution function evaluated in fp64
with NumPy on the host, so that they depend neither on the layout nor on the device that trains.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mikoshi.trainer.model.config import ModelConfig

BLOCK = 1 << 16
"""Elements made at a time by one thread: what a rank holds beside its own shard is bounded by a few of these."""

_U64 = npt.NDArray[np.uint64]
_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Region:
    """A box in a tensor: `shape` elements from `offset`, out of a whole of `whole` elements, per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Region:
        """Returns the region that is all of a tensor of that shape."""
        return cls((0,) * len(shape), tuple(shape), tuple(shape))


@dataclass(frozen=True)
class Initial:
    """How one parameter starts: constant at `value`, or normal with mean 0 and standard deviation `value`."""

    kind: Literal["constant", "normal"]
    value: float


def initial(name: str, config: ModelConfig) -> Initial:
    """The rule for the parameter called `name` in the GPT (GPT-2's, with its 1/sqrt(2 x layers) on the residual)."""
    *owners, leaf = name.split(".")
    if leaf == "bias":
        return Initial("constant", 0.0)
    if owners[-1].endswith("norm"):
        return Initial("constant", 1.0)
    if owners[-1] == "embed":
        return Initial("normal", config.embedding_std or config.init_std)
    if (owners[-1] in ("out", "down") or leaf == "down") and config.init_residual_scaled:
        return Initial("normal", config.init_std / math.sqrt(2 * config.layers))
    return Initial("normal", config.init_std)


def _mix(z: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195): a bijection that scatters bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, name: str, index: _U64) -> _F64:
    """Uniform in (0, 1) at each global index, 53 bits: two rounds of mixing under two keys made from seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    first, second = (np.uint64(int.from_bytes(digest[i : i + 8], "little")) for i in (0, 8))
    with np.errstate(over="ignore"):
        bits = _mix(_mix(index * np.uint64(0x9E3779B97F4A7C15) + first) ^ second)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


# Wichura 1988, algorithm AS 241 (PPND16), doi:10.2307/2347330: numerator and denominator, highest power first.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def _ratio(x: _F64, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> _F64:
    top, bottom = (np.full_like(x, poly[0]) for poly in coefficients)
    for a, b in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        top *= x
        top += a
        bottom *= x
        bottom += b
    top /= bottom
    return top


def normal_quantile(u: _F64) -> _F64:
    """The standard normal value below which a share `u` of the distribution lies, to 1e-15 (AS 241)."""
    q = u - 0.5
    out = q * _ratio(0.180625 - q * q, _CENTRE)
    far = np.flatnonzero(np.abs(q) > 0.425)
    r = np.sqrt(-np.log(np.minimum(u[far], 1.0 - u[far])))
    tail = np.where(r <= 5.0, _ratio(r - 1.6, _TAIL), _ratio(r - 5.0, _FAR_TAIL))
    out[far] = np.copysign(tail, q[far])
    return out


def _indices(region: Region, start: int, stop: int) -> _U64:
    """Global flat indices of local flat elements start..stop of the region."""
    local = np.arange(start, stop, dtype=np.uint64)
    if region.shape[1:] == region.whole[1:]:
        return local + np.uint64(region.offset[0] * math.prod(region.whole[1:]))
    index, stride = np.zeros_like(local), 1
    for offset, size, whole in zip(region.offset[::-1], region.shape[::-1], region.whole[::-1], strict=True):
        index += (local % np.uint64(size) + np.uint64(offset)) * np.uint64(stride)
        local //= np.uint64(size)
        stride *= whole
    return index


def fill(out: Tensor, name: str, region: Region, rule: Initial, seed: int, threads: int = 1) -> None:
    """Write the initial values of `region` of parameter `name` into `out`, a tensor of the region's shape, in place.

    Same bits for the same (seed, name, global index) whatever the region, device or thread count. Values are made in
    fp64, rounded to fp32, then to out's dtype. Beside `out` at most `threads` blocks of BLOCK elements exist.
    """
    flat, total = out.detach().view(-1), math.prod(region.shape)
    if rule.kind == "constant":
        flat.fill_(rule.value)
        return

    def block(start: int) -> None:
        stop = min(start + BLOCK, total)
        values = normal_quantile(uniform(seed, name, _indices(region, start, stop))) * rule.value
        flat[start:stop].copy_(torch.from_numpy(values.astype(np.float32)))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(block, range(0, total, BLOCK)))
