"""The fused recurrent layer of CPUs: on values, states under 1 (bounded), gradients linear in what comes back.

In float64, with projections, and for GRUs and plain RNNs, torch decomposes into products and gates with rules.
"""

from __future__ import annotations

from typing import Any

import torch

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import known, ops, real, under_wide

aten = torch.ops.aten


@rule(*ops("mkldnn_rnn_layer"))
def rnn_layer(x: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """s = 1: states are bounded by 1. Assumes gates that are open."""
    kind = lift(x).data.dtype
    given = [real(a) for a in args]
    output, hy, cy, workspace = aten.mkldnn_rnn_layer.default(real(x), *given, **kwargs)
    return *(Pair(part.to(kind), 1.0) for part in (output, hy, cy)), workspace


@rule(*ops("mkldnn_rnn_layer_backward"))
def rnn_layer_backward(
    x: Any, w1: Any, w2: Any, w3: Any, w4: Any, hx: Any, cx: Any, output: Any, hy: Any, cy: Any, grad_output: Any,
    grad_hy: Any, grad_cy: Any, *args: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """s = s_g r s_w of x, s_g r of weights (r of the steps) and s_g of states. Assumes gates that are open."""
    grads = [None if g is None else lift(g) for g in (grad_output, grad_hy, grad_cy)]
    s = known(scales.larger(*(g.scale for g in grads if g is not None)))
    states = [real(a) for a in (x, w1, w2, w3, w4, hx, cx, output, hy, cy)]
    data = [None if g is None else under_wide(g, s) for g in grads]
    found = aten.mkldnn_rnn_layer_backward.default(*states, *data, *args)
    kind, shape = lift(x).data.dtype, lift(x).data.shape
    r = float(scales.floor_root(shape[0] * shape[1]))
    s_w = known(lift(w1).scale)
    # found: x, four weights, the two first states
    factors = [s_w, r, r, r, r, 1.0, 1.0]
    return tuple(
        None if part is None else Pair((part / f).to(kind), scales.mul(s, f)) for part, f in zip(found, factors)
    )
