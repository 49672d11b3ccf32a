"""Predicted scales where positions are not independent: a mean-field recursion over the decoder at init.

Closed-form unit scaling takes positions as independent. They are not: a causal average over earlier positions gives
neighbours a common part, the next attention averages that part without shrinking it, and its output grows past 1 (the
drift that users of u-muP report). At infinite width and init, the covariance of two positions, averaged over features,
follows a recursion of its own, which is computed here: attention with near-uniform weights is K -> f^2 A K A^T (A: the
causal mean), a norm divides by the diagonal, SwiGLU maps a correlation c to c S(c), with S from the Hermite series of
SiLU, and the residual rule mixes a^2 K_branch + b^2 K.

Ours; no paper's. What is left out: tokens are taken as uniform and independent (real text repeats more, and so drifts a
little more), and logit noise enters to first order only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isoscale.nn.factors import attention_factor, residual_scales, silu_glu_factor

Kernel = NDArray[np.float64]
_TERMS = 16


@dataclass(frozen=True)
class BlockScales:
    """Predicted rms at the sites of one block, over all positions."""

    attn_out: float
    attn_residual: float
    act: float
    mlp_residual: float


def _silu_series(mult: float) -> NDArray[np.float64]:
    """a_k^2 with E[s(g) s(g')] = sum_k a_k^2 c^k for s(g) = silu(mult g) / mult and correlation c."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = weights / weights.sum()
    value = nodes / (1 + np.exp(np.clip(-mult * nodes, -700.0, 700.0)))
    out = []
    for k in range(_TERMS):
        basis = np.polynomial.hermite_e.hermeval(nodes, [0.0] * k + [1.0]) / math.sqrt(math.factorial(k))
        out.append(float((weights * value * basis).sum()) ** 2)
    # What the cut series misses of the variance belongs to c = 1.
    out[-1] += max(0.0, float((weights * value**2).sum()) - sum(out))
    return np.array(out)


def _rms(kernel: Kernel) -> float:
    return math.sqrt(float(np.diag(kernel).mean()))


def _correlation(kernel: Kernel) -> Kernel:
    root = np.sqrt(np.diag(kernel))
    return np.asarray(kernel / np.outer(root, root))


def decoder_scales(
    taus: Sequence[float], *, length: int, vocab: int, head_size: int, logit_scale: float, act_mult: float
) -> tuple[BlockScales, ...]:
    """Predicted scales of every block of a unit-scaled causal decoder.

    Args:
        taus: residual multipliers, two per block (attention, FFN).
        length: sequence length, tokens.
        vocab: number of ids; two positions share one with probability 1 / vocab.
        head_size: features per head.
        logit_scale: factor on q.k.
        act_mult: alpha of the FFN non-linearity.
    """
    kernel: Kernel = np.full((length, length), 1.0 / vocab)
    np.fill_diagonal(kernel, 1.0)
    seen = np.arange(1, length + 1, dtype=np.float64)
    mult = logit_scale * head_size
    attn, glu = attention_factor(mult, head_size, length, True), silu_glu_factor(act_mult)
    noise = math.expm1(min(logit_scale**2 * head_size, 20.0))  # relative variance of exp(logit)
    series = _silu_series(act_mult)
    out = []
    for attn_tau, mlp_tau in zip(taus[0::2], taus[1::2]):
        c = _correlation(kernel)
        mean = np.cumsum(np.cumsum(c, 0), 1) / np.outer(seen, seen)
        spread = np.maximum(0.0, 1.0 - np.diag(mean))  # variance of the values around their causal mean
        mean[np.diag_indices(length)] += spread * np.minimum(1.0, noise / seen)
        branch = attn**2 * mean
        a, b = residual_scales(attn_tau)
        kernel = a * a * branch + b * b * kernel
        attn_out, attn_residual = _rms(branch), _rms(kernel)
        c = _correlation(kernel)
        branch = glu**2 * c * np.polynomial.polynomial.polyval(c, series)
        a, b = residual_scales(mlp_tau)
        kernel = a * a * branch + b * b * kernel
        out.append(BlockScales(attn_out, attn_residual, _rms(branch), _rms(kernel)))
    return tuple(out)
