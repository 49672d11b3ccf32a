"""The RMS of a row from the largest magnitudes of its blocks: the statistic of MXNorm (arXiv 2603.13180, section 3).

For rows of independent Gaussian elements the generalised mean G of the K block maxima tends to c(p, B) times the RMS,
so a(p, B) G with a = 1 / c estimates it from K numbers in place of D. Other shapes of distribution have other
constants: a heavy tail is overestimated (Laplace by a quarter), which a gain can undo only where it is the same for
every token.

Beyond the paper: a last block that D does not fill has the constant of its own size and counts by its size, so that it
biases nothing; maxima are divided by the row's largest before they are squared, so that no finite row overflows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats.block import BlockFormat

ESTIMATES = ("raw", "rounded")
TABLE = 256


def _check(p: int, block: int) -> None:
    if p not in (1, 2) or isinstance(p, bool):
        raise ConfigError("MXNorm takes the mean (p = 1) or the quadratic mean (p = 2)", key="p", value=p)
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ConfigError("a block has at least one element", key="block", value=block)


@functools.lru_cache(maxsize=1024)
def mxnorm_constant(p: int, block: int) -> float:
    """a(p, B) = 1 / E[max^p]^(1/p) of the largest magnitude of `block` standard normal numbers.

    By quadrature of E[max] = int 1 - erf(t / sqrt 2)^B dt and E[max^2] = int 2 t (1 - erf(t / sqrt 2)^B) dt over
    t > 0; arXiv 2603.13180 finds the same numbers by sampling. Good to 12 digits.

    Args:
        p: 1 or 2.
        block: B, any size.

    Raises:
        ConfigError: another p; no elements.
    """
    _check(p, block)
    top = math.sqrt(2 * math.log(block + 1)) + 9
    nodes, weights = np.polynomial.legendre.leggauss(20)
    panels = 64
    total = 0.0
    for panel in range(panels):
        for node, weight in zip(nodes, weights):
            t = top / panels * (panel + (float(node) + 1) / 2)
            tail = -math.expm1(block * math.log1p(-math.erfc(t / math.sqrt(2)))) if t > 0 else 1.0
            total += float(weight) * tail * (1.0 if p == 1 else 2 * t)
    return float((total * top / panels / 2) ** (-1 / p))


def mxnorm_bound(p: int, block: int, dim: int) -> float:
    """The largest magnitude that MXNorm can put out for a row of `dim` elements: c K for p = 1, c sqrt(K) for p = 2.

    Reached by a row with one element that is not zero (eps apart). RMSNorm's is sqrt(dim).

    Raises:
        ConfigError: as `mxnorm_constant`; no dim.
    """
    full, last = block_weights(p, block, dim)
    return float(min(full, last) ** (-1 / p))


def block_weights(p: int, block: int, dim: int) -> tuple[float, float]:
    """What the p-th power of a block's maximum counts: of whole blocks, and of the last one.

    A block of n elements counts n / D a(p, n)^p, so that the expectation of the sum is the p-th power of the RMS.
    """
    _check(p, block)
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ConfigError("a norm needs a number of features, at least one", key="dim", value=dim)
    last = dim % block or min(block, dim)
    whole = min(block, dim)
    return whole / dim * mxnorm_constant(p, whole) ** p, last / dim * mxnorm_constant(p, last) ** p


def rounding_cut(fmt: BlockFormat) -> float:
    """c such that the scale rule rounds a maximum in [c 2^(j+1), c 2^(j+2)) to 2^(j+1) (times a power of two).

    Raises:
        ConfigError: scales of the format are no powers of two.
    """
    if fmt.scale != "e8m0":
        message = "an estimate from rounded scales needs power-of-two scales"
        raise ConfigError(message, key="estimate", value="rounded", place=str(fmt), hint='estimate="raw"')
    bits = fmt.element.mantissa_bits
    mantissa = 2 * math.frexp(fmt.element.max)[0]
    return {"floor": 1.0, "ceil": 0.5, "even": (2 - 2.0 ** -(bits + 1)) / 2, "rceil": mantissa / 2}[fmt.scale_rule]


def _mean_of_rounded(p: int, block: int, cut: float, sigma: float) -> float:
    """E[S^p]^(1/p) for maxima rounded to powers of two: S = 2^j for a maximum in [2^j c, 2^(j+1) c)."""

    def below(value: float) -> float:
        return float(math.erf(value / sigma / math.sqrt(2)) ** block)

    low, high = math.floor(math.log2(sigma)) - 24, math.floor(math.log2(sigma)) + 6
    steps = ((2.0**j) ** p * (below(2.0 ** (j + 1) * cut) - below(2.0**j * cut)) for j in range(low, high))
    return float(math.fsum(steps) ** (1 / p))


@functools.lru_cache(maxsize=64)
def rounded_table(p: int, block: int, cut: float) -> tuple[float, ...]:
    """sigma / mean at `TABLE` places of the fraction of log2(mean), where the mean is that of rounded maxima.

    The mean of powers of two is not proportional to sigma, but repeats itself with every octave.
    """
    sigmas = np.exp2(np.linspace(-1.5, 1.5, 6 * TABLE + 1))
    means = np.array([_mean_of_rounded(p, block, cut, float(sigma)) for sigma in sigmas])
    places = np.arange(TABLE) / TABLE
    start = math.ceil(math.log2(float(means[0])))
    found = np.interp(places + start, np.log2(means), np.log2(sigmas)) - (places + start)
    return tuple(float(value) for value in np.exp2(found))


@dataclass(frozen=True)
class Estimator:
    """How the RMS of rows of one size is estimated; all that depends on sizes is worked out once.

    Args:
        dim: D, size of a row.
        block: B, from the format.
        p: 1 or 2, the generalised mean.
        eps: added to the estimate, not under a root: its like in RMSNorm is its square.
        clamp: bound on the magnitude of x / r, or None.
        estimate: `raw` takes the maxima as they are, the published method. `rounded` takes them after their scales
            were rounded to powers of two (one Gaussian table undoes the rounding). UNSTABLE: for blocks of like maxima
            it jumps by an octave where the row moves by an ulp; kept for comparison (docs/results/mxnorm.md).
        cut: see `rounding_cut`, for `rounded`.

    Attributes:
        full: what the p-th power of a whole block's maximum counts; `last` that of the last block.
        bound: the largest magnitude of x / r.
    """

    dim: int
    block: int
    p: int = 2
    eps: float = 1e-5
    clamp: float | None = None
    estimate: str = "raw"
    cut: float = 1.0
    full: float = field(init=False)
    last: float = field(init=False)
    bound: float = field(init=False)

    def __post_init__(self) -> None:
        _check(self.p, self.block)
        if self.estimate not in ESTIMATES:
            hint = did_you_mean(str(self.estimate), ESTIMATES)
            raise ConfigError("no such estimate", key="estimate", value=self.estimate, hint=hint)
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ConfigError("eps is a finite number of at least 0", key="eps", value=self.eps)
        if self.clamp is not None and not (math.isfinite(self.clamp) and self.clamp > 0):
            raise ConfigError("a clamp is a finite number > 0, or None", key="clamp", value=self.clamp)
        full, last = block_weights(self.p, self.block, self.dim)
        if self.estimate == "rounded":
            if self.dim % self.block:
                hint = 'estimate="raw" takes any size'
                message = f"an estimate from rounded scales wants whole blocks of {self.block}"
                raise ConfigError(message, key="dim", value=self.dim, hint=hint)
            full = last = self.block / self.dim
            object.__setattr__(self, "_table", rounded_table(self.p, self.block, self.cut))
        most = mxnorm_bound(self.p, self.block, self.dim)
        object.__setattr__(self, "bound", most if self.clamp is None else min(most, self.clamp))
        object.__setattr__(self, "full", full)
        object.__setattr__(self, "last", last)

    def rms(self, x: Tensor) -> Tensor:
        """The estimate r: [..., 1], at least float32. NaN for a row with an inf or a NaN.

        Args:
            x: [..., D].
        """
        if x.shape[-1] != self.dim:
            raise ConfigError("the norm was made for rows of another size", key="dim", value=x.shape[-1],
                              hint=f"made for {self.dim}")  # fmt: skip
        wide = x if x.dtype == torch.float64 else x.float()
        short = -self.dim % self.block
        blocks = pad(wide.abs(), (0, short)) if short else wide.abs()
        count = -(-self.dim // self.block)
        most = blocks.view(*x.shape[:-1], count, self.block).amax(-1)  # amax hands NaN on
        top = most.amax(-1, keepdim=True)
        exponent = torch.frexp(top)[1] - 1
        finite, zero = top.isfinite(), top == 0
        exponent = torch.where(finite & ~zero, exponent, 0)
        parts = torch.where(finite, _shifted(most, -exponent), 0.0)
        if self.estimate == "rounded":
            out = self._from_rounded(parts)
        else:
            powers = parts if self.p == 1 else parts.square()
            total = self._sum(powers) if wide.dtype == torch.float32 else self._weighted(powers)
            # torch's float32 sqrt is off by an ulp on some CPUs; through float64 it rounds as the kernels' does
            out = total if self.p == 1 else total.to(torch.float64).sqrt().to(total.dtype)
        out = torch.where(zero, 0.0, _shifted(out, exponent)) + self.eps
        return torch.where(finite, out, math.nan)

    def _weighted(self, powers: Tensor) -> Tensor:
        return powers[..., :-1].sum(-1, keepdim=True) * self.full + powers[..., -1:] * self.last

    def _sum(self, powers: Tensor) -> Tensor:
        """The weighted sum in integers, as in `isoscale.kernels.cpu_norm`: the same bits in any order of adding."""
        counts = (powers * 2.0**36).to(torch.int64)
        whole = counts[..., :-1].sum(-1, keepdim=True).to(torch.float32)
        return (whole * self.full + counts[..., -1:].to(torch.float32) * self.last) * 2.0**-36

    def _from_rounded(self, parts: Tensor) -> Tensor:
        """From powers of two alone. The row's own power of two was taken out before, and is put back after."""
        mantissa, exponent = torch.frexp(parts)
        powers = torch.ldexp(torch.ones_like(parts), exponent - 1 + (mantissa >= self.cut).to(exponent.dtype))
        powers = torch.where(parts > 0, powers, 0.0)
        mean = powers if self.p == 1 else powers.square()
        mean = (mean.sum(-1, keepdim=True) * self.full) ** (1 / self.p)
        table = torch.tensor(self.__dict__["_table"], dtype=mean.dtype, device=mean.device)
        place = torch.log2(mean.clamp(min=2.0**-30))
        place = (place - place.floor()) * TABLE
        low = place.floor()
        share, index = place - low, low.long() % TABLE
        return mean * (table[index] * (1 - share) + table[(index + 1) % TABLE] * share)

    def normed(self, x: Tensor, rms: Tensor) -> Tensor:
        """x / r, clamped, at least float32: [..., D]. Rows whose estimate is 0 stay 0.

        Args:
            x: [..., D].
            rms: [..., 1] of `rms`.
        """
        out = (x if x.dtype == torch.float64 else x.float()) * reciprocal(rms)
        return out if self.clamp is None else out.clamp(-self.clamp, self.clamp)


def _shifted(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent, exactly where it can be: 2^149 is no float32."""
    return torch.ldexp(x.to(torch.float64), exponent).to(x.dtype)


def reciprocal(rms: Tensor) -> Tensor:
    """1 / r; 0 where r is 0, and finite where r is tiny."""
    most = torch.finfo(rms.dtype).max
    return torch.where(rms == 0, 0.0, torch.reciprocal(rms).clamp(max=most))
