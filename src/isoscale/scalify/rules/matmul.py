"""Matrix products: the scale gets the root of the contracted size, divided out before the result is rounded.

With k independent terms a sum has RMS sqrt(k): r is the power of two below it (Scalify, arXiv 2407.17353). The division
rides in the product (alpha of addmm), so half data are rounded once; fp16 on a CPU is multiplied in float32, which is
twenty times faster there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import dtype_of, ops, under_wide, wide
from isoscale.scalify.scales import Scale


def _operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype == torch.float16 and a.device.type == "cpu":
        return a.float(), b.float()
    return a, b


def _mm(a: Tensor, b: Tensor, r: int) -> Tensor:
    """a b / r for two matrices or two stacks of them; fp16 on a CPU comes back in float32."""
    a, b = _operands(a, b)
    if r == 1:
        return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
    if a.dim() == 2:
        return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=1.0 / r)
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=1.0 / r)


def product(a: Any, b: Any) -> tuple[Tensor, Scale]:
    """Data of a b (matrices or stacks; fp16 on a CPU in float32) and its scale s_a s_b r."""
    a, b = lift(a), lift(b)
    r = scales.floor_root(a.data.shape[-1])
    return _mm(a.data, b.data, r), scales.mul(scales.mul(a.scale, b.scale), float(r))


@rule(*ops("mm", "bmm"))
def mm(a: Any, b: Any) -> Pair:
    """s = s_a s_b r, r = floor2(sqrt(k)), k the contracted size. Assumes k independent terms of zero mean."""
    data, s = product(a, b)
    return Pair(data.to(dtype_of(a, b)), s)


@rule(*ops("addmm", "baddbmm"))
def addmm(bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Pair:
    """s = max(s_bias |beta|, s_a s_b r |alpha|). Assumes k independent terms of zero mean, and an independent bias."""
    data, s = product(a, b)
    return _plus(bias, beta, data, s, alpha, dtype_of(a, b))


def _plus(bias: Any, beta: float, data: Tensor, share: Scale, alpha: float, dtype: torch.dtype) -> Pair:
    """beta bias + alpha data, data under `share`."""
    a, power = scales.split(alpha)
    share = scales.mul(share, power)
    if beta == 0:
        return Pair((data * a if a != 1 else data).to(dtype), share)
    bias = lift(bias)
    b, power = scales.split(beta)
    bias = Pair(bias.data * b if b != 1 else bias.data, scales.mul(bias.scale, power))
    s = scales.larger(bias.scale, share)
    moved = under_wide(Pair(data, share), s)
    return Pair(torch.add(under_wide(bias, s), moved, alpha=a).to(dtype), s)


@rule(*ops("mv", "dot", "vdot"))
def mv(a: Any, b: Any) -> Pair:
    """s = s_a s_b r. Assumes k independent terms of zero mean."""
    left = lift(a).data
    a, b = lift(a), lift(b)
    row = Pair(left if left.dim() == 2 else left.unsqueeze(0), a.scale)
    data, s = product(row, Pair(b.data.unsqueeze(1), b.scale))
    data = data.squeeze(1)
    return Pair((data if left.dim() == 2 else data.squeeze(0)).to(dtype_of(a, b)), s)


@rule(*ops("addmv"))
def addmv(bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Pair:
    """s = max(s_bias |beta|, s_a s_b r |alpha|). Assumes k independent terms of zero mean."""
    out = mv(a, b)
    return _plus(bias, beta, out.data, out.scale, alpha, out.data.dtype)


@rule(*ops("addr"))
def addr(bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Pair:
    """s = max(s_bias |beta|, s_a s_b |alpha|). Assumes independent factors."""
    a, b = lift(a), lift(b)
    outer = wide(a.data).unsqueeze(1) * wide(b.data).unsqueeze(0)
    return _plus(bias, beta, outer, scales.mul(a.scale, b.scale), alpha, dtype_of(a, b))


@rule(*ops("addbmm"))
def addbmm(bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Pair:
    """s = max(s_bias |beta|, s_a s_b r |alpha|), r from stack times k. Assumes independent terms of zero mean."""
    a, b = lift(a), lift(b)
    left = a.data.transpose(0, 1).reshape(a.data.shape[1], -1)
    data, s = product(Pair(left, a.scale), Pair(b.data.reshape(-1, b.data.shape[2]), b.scale))
    return _plus(bias, beta, data, s, alpha, dtype_of(a, b))


@rule(*ops("linear"))
def linear(x: Any, weight: Any, bias: Any = None) -> Pair:
    """s = max(s_x s_w r, s_bias), r = floor2(sqrt(fan-in)). Assumes independent terms of zero mean."""
    x, weight = lift(x), lift(weight)
    rows = Pair(x.data.reshape(-1, x.data.shape[-1]), x.scale)
    out = addmm(0.0 if bias is None else bias, rows, Pair(weight.data.t(), weight.scale), beta=0 if bias is None else 1)
    return Pair(out.data.reshape(*x.data.shape[:-1], weight.data.shape[0]), out.scale)


@rule(*ops("matmul"))
def matmul(a: Any, b: Any) -> Pair:
    """s = s_a s_b r, r = floor2(sqrt(k)). Assumes k independent terms of zero mean."""
    a, b = lift(a), lift(b)
    r = scales.floor_root(a.data.shape[-1])
    left, right = _operands(a.data, b.data)
    data = torch.matmul(left, right * (1.0 / r))
    return Pair(data.to(dtype_of(a, b)), scales.mul(scales.mul(a.scale, b.scale), float(r)))


@rule(*ops("_trilinear"))
def trilinear(
    a: Any, b: Any, c: Any, expand1: list[int], expand2: list[int], expand3: list[int], sumdim: list[int],
    unroll_dim: int = 1,
) -> Pair:  # fmt: skip
    """s = s_a s_b s_c r, r = floor2(sqrt(N)), N terms are summed. Assumes independent terms of zero mean."""
    terms = [lift(x) for x in (a, b, c)]
    seen = [list(p.data.shape) for p in terms]
    for shape, places in zip(seen, (expand1, expand2, expand3)):
        for place in places:
            shape.insert(place, 1)
    n: Any = 1
    for d in sumdim:
        n = n * max(shape[d] for shape in seen)
    r = scales.floor_root(n)
    data = torch.ops.aten._trilinear.default(
        wide(terms[0].data) * (1.0 / r), *(wide(p.data) for p in terms[1:]), expand1, expand2, expand3, sumdim,
        unroll_dim,
    )  # fmt: skip
    s = scales.mul(scales.mul(terms[0].scale, terms[1].scale), scales.mul(terms[2].scale, float(r)))
    return Pair(data.to(dtype_of(a, b, c)), s)
