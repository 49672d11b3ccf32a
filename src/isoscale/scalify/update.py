"""One step of AdamW or SGD on (data, scale), by the rules.

Pure functions: pairs with float32 data in, pairs out. Averages stand under the larger of their two scales (the convex
rule: a Gaussian sum rounded down would let the data of a slow average grow a thousandfold). The second moment is kept
as its root: half the exponent range, so fp16 holds what fp16 squares would lose, and the same numbers in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, under
from isoscale.scalify.rules.arithmetic import add, mul, sub
from isoscale.scalify.scales import Scale


@dataclass(frozen=True)
class Adam:
    """What is fixed for a group of parameters.

    Attributes:
        betas: of the two averages.
        eps: added to the root.
        decoupled: whether decay shrinks the weight (AdamW) or joins the gradient (Adam).
        maximize: climb instead.
    """

    betas: tuple[float, float]
    eps: float
    decoupled: bool
    maximize: bool = False


@dataclass(frozen=True)
class Sgd:
    """What is fixed for a group of parameters: as in `torch.optim.SGD`."""

    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool = False


def unit(pair: Pair) -> Pair:
    """Its RMS, to the nearest power of two, moved into the scale: exact."""
    n = scales.rms2(pair.data)
    scale = scales.as_tensor(pair.scale, pair.data)
    n = torch.where((scale == 0) | (n == 0), 1.0, n)
    return Pair(pair.data * (1.0 / n), scale * n)


def _average(old: Pair, new: Pair, beta: float) -> Pair:
    s = scales.larger(old.scale, new.scale)
    return Pair(torch.lerp(under(old, s), under(new, s), 1.0 - beta), s)


def _missing(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step: without the cancellation that costs 1 - 0.999 four digits in float32."""
    return -torch.expm1(step * math.log(beta)) if beta > 0 else torch.ones_like(step)


def _signed(grad: Pair, maximize: bool) -> Pair:
    return Pair(-grad.data, grad.scale) if maximize else grad


def adam(
    w: Pair, g: Pair, m: Pair, r: Pair, step: Tensor, lr: Tensor, decay: Tensor, rule: Adam
) -> tuple[Pair, Pair, Pair]:
    """One step of Adam or AdamW (Kingma & Ba, 2015; Loshchilov & Hutter, 2019).

    Args:
        w: weight.
        g: gradient.
        m: first moment.
        r: root of the second moment.
        step: 0-d float32, 1 at the first.
        lr: 0-d float32.
        decay: 0-d float32.
        rule: the rest.

    Returns:
        The new w, m and r, data in float32.
    """
    g = _signed(g, rule.maximize)
    if rule.decoupled:
        w = mul(w, lift(1.0 - lr * decay))
    else:
        g = add(g, mul(w, lift(decay)))
    beta1, beta2 = rule.betas
    m = _average(m, g, beta1)
    s = scales.larger(r.scale, g.scale)
    old, new = under(r, s), under(g, s)
    r = Pair(torch.sqrt(beta2 * old * old + (1.0 - beta2) * new * new), s)
    first, second = _missing(beta1, step), torch.sqrt(_missing(beta2, step))
    denominator = add(mul(r, lift(1.0 / second)), rule.eps)
    size = lift(lr / first)
    ratio = Pair(
        m.data / denominator.data * size.data, scales.mul(scales.div(m.scale, denominator.scale), size.scale)
    )
    return sub(w, ratio), m, r


def sgd(
    w: Pair, g: Pair, buffer: Pair | None, first: Tensor, lr: Tensor, decay: Tensor, rule: Sgd
) -> tuple[Pair, Pair | None]:
    """One step of SGD, with momentum where there is a buffer.

    Args:
        w: weight.
        g: gradient.
        buffer: momentum, or None.
        first: 0-d bool: the buffer is empty and takes the gradient whole.
        lr: 0-d float32.
        decay: 0-d float32.
        rule: the rest.

    Returns:
        The new w and buffer, data in float32.
    """
    g = _signed(g, rule.maximize)
    g = add(g, mul(w, lift(decay)))
    if buffer is not None:
        s: Scale = scales.larger(buffer.scale, g.scale)
        fresh = torch.where(first, 1.0, 1.0 - rule.dampening)
        buffer = Pair(under(buffer, s) * rule.momentum + under(g, s) * fresh, s)
        g = add(g, mul(buffer, lift(rule.momentum))) if rule.nesterov else buffer
    return sub(w, mul(g, lift(lr))), buffer
