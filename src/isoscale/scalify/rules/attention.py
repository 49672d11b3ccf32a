"""Fused attention: q takes s_q s_k, so that the logits are values; keys and values stay data; outputs stand under s_v.

Masks are on the logits and therefore values. With q' = q_data s_q s_k the fused operator and its gradient run as they
are, whichever kernel it is; what comes back for q' and k is brought to the inputs by powers of two. fp16 on a CPU goes
through float32. Elsewhere q' is fp16: logits beyond its range would be no attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, times, under
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import inverse, known, ops, real
from isoscale.scalify.scales import Scale

KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
_MASKS = ("attn_mask", "attn_bias")


def _named(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in op._schema.arguments]
    return dict(zip(names, args)) | kwargs


def _prepared(named: dict[str, Any]) -> tuple[Pair, Pair, Pair, Scale, torch.dtype]:
    """Puts plain tensors for q, k, v and mask; gives the pairs, the factor s_q s_k that went into q, and the dtype."""
    q, k, v = (lift(named[name]) for name in ("query", "key", "value"))
    kind = torch.float32 if q.data.dtype == torch.float16 and q.data.device.type == "cpu" else q.data.dtype
    c = scales.mul(known(q.scale), known(k.scale))
    named["query"], named["key"], named["value"] = times(q.data.to(kind), c), k.data.to(kind), v.data.to(kind)
    for name in _MASKS:
        mask = named.get(name)
        if isinstance(mask, Pair) or (isinstance(mask, Tensor) and mask.is_floating_point()):
            named[name] = real(mask).to(kind)
    return q, k, v, c, kind


def forward(op: OpOverload) -> Any:
    """The rule of a fused attention operator, by the names of its arguments."""

    def attention(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """s = s_v: a convex sum of values. Assumes that each query attends to few of them."""
        named = _named(op, args, kwargs)
        _, _, v, _, _ = _prepared(named)
        out, *rest = op(**named)
        return Pair(out.to(v.data.dtype), v.scale), *rest

    return attention


def backward(op: OpOverload) -> Any:
    """The rule of a fused attention operator's gradient, by the names of its arguments."""

    def attention_backward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """s = s_g s_v s_k (query), s_g s_v s_q (key), s_g (value), s_g s_v (mask). Assumes few keys for each query."""
        named = _named(op, args, kwargs)
        q, k, v, c, kind = _prepared(named)
        name = "grad_out" if "grad_out" in named else "grad_out_"
        g = lift(named[name])
        named[name] = g.data.to(kind)
        named["out"] = under(lift(named["out"]), v.scale).to(kind)
        named["logsumexp"] = real(named["logsumexp"])
        to_q, to_k, to_v, *to_mask = op(**named)
        s, dtype = scales.mul(g.scale, known(v.scale)), g.data.dtype
        return (
            Pair(to_q.to(dtype), scales.mul(s, known(k.scale))),
            Pair(times(to_k, inverse(c)).to(dtype), scales.mul(s, known(q.scale))),
            Pair(to_v.to(dtype), g.scale),
            *(Pair(x, s) if isinstance(x, Tensor) and x.numel() else None for x in to_mask),
        )

    return attention_backward


for _kernel in KERNELS:
    for _op in ops(_kernel):
        rule(_op)(forward(_op))
    for _op in ops(f"{_kernel}_backward"):
        rule(_op)(backward(_op))
