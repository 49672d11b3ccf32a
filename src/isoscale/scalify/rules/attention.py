"""Fused attention: q takes s_q s_k, so that the logits are values; keys and values stay data; outputs stand under s_v.

Masks are on the logits and therefore values. With q' = q_data s_q s_k the fused operator and its gradient run as they
are; what comes back for q' and k is brought to the inputs by powers of two. Half data with a scale product beyond their
range, and fp16 on a CPU, go through float32 where the operator takes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, lift, times, under
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.support import inverse, known, ops, real
from isoscale.scalify.scales import Scale

aten = torch.ops.aten


def _run_as(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _inputs(q: Pair, k: Pair, v: Pair) -> tuple[Tensor, Tensor, Tensor, Scale]:
    """q under 1 / s_k, the data of k and v, and the factor c = s_q s_k that went into q."""
    kind = _run_as(q.data)
    c = scales.mul(known(q.scale), known(k.scale))
    return times(q.data.to(kind), c), k.data.to(kind), v.data.to(kind), c


def _bias(mask: Any, q: Tensor) -> Any:
    if mask is None or (isinstance(mask, Tensor) and not mask.is_floating_point()):
        return mask
    return real(lift(mask) if isinstance(mask, Pair) else mask).to(q.dtype)


def _gradients(found: Any, g: Pair, q: Pair, k: Pair, v: Pair, c: Scale) -> tuple[Pair, Pair, Pair]:
    to_q, to_k, to_v = found
    s = scales.mul(g.scale, known(v.scale))
    kind = g.data.dtype
    return (
        Pair(to_q.to(kind), scales.mul(s, known(k.scale))),
        Pair(times(to_k, inverse(c)).to(kind), scales.mul(s, known(q.scale))),
        Pair(to_v.to(kind), g.scale),
    )


@rule(*ops("_scaled_dot_product_flash_attention_for_cpu"))
def for_cpu(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Pair, Tensor]:  # fmt: skip
    """s = s_v: a convex sum of values. Assumes that each query attends to few of them."""
    q, k, v = lift(query), lift(key), lift(value)
    qd, kd, vd, _ = _inputs(q, k, v)
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(qd, kd, vd, dropout_p, is_causal, attn_mask=_bias(attn_mask, qd), scale=scale)
    return Pair(out.to(v.data.dtype), v.scale), lse


@rule(*ops("_scaled_dot_product_flash_attention_for_cpu_backward"))
def for_cpu_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout_p: float, is_causal: bool,
    attn_mask: Any = None, scale: float | None = None,
) -> tuple[Pair, Pair, Pair]:  # fmt: skip
    """s = s_g s_v s_k (query), s_g s_v s_q (key), s_g (value). Assumes that each query attends to few keys."""
    g, q, k, v, out = lift(grad), lift(query), lift(key), lift(value), lift(out)
    qd, kd, vd, c = _inputs(q, k, v)
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    found = op(
        g.data.to(qd.dtype), qd, kd, vd, under(out, v.scale).to(qd.dtype), real(lse), dropout_p, is_causal,
        attn_mask=_bias(attn_mask, qd), scale=scale,
    )  # fmt: skip
    return _gradients(found, g, q, k, v, c)


@rule(*ops("_scaled_dot_product_efficient_attention"))
def efficient(
    query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """s = s_v: a convex sum of values. Assumes that each query attends to few of them."""
    q, k, v = lift(query), lift(key), lift(value)
    qd, kd, vd, _ = _inputs(q, k, v)
    op = aten._scaled_dot_product_efficient_attention.default
    out, *rest = op(qd, kd, vd, _bias(attn_bias, qd), compute_log_sumexp, dropout_p, is_causal, scale=scale)
    return Pair(out.to(v.data.dtype), v.scale), *rest


@rule(*ops("_scaled_dot_product_efficient_attention_backward"))
def efficient_backward(
    grad: Any, query: Any, key: Any, value: Any, attn_bias: Any, out: Any, lse: Any, seed: Any, offset: Any,
    dropout_p: float, grad_input_mask: list[bool], is_causal: bool = False, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """s = s_g s_v s_k (query), s_g s_v s_q (key), s_g (value), s_g s_v (bias). Assumes few keys for each query."""
    g, q, k, v, out = lift(grad), lift(query), lift(key), lift(value), lift(out)
    qd, kd, vd, c = _inputs(q, k, v)
    op = aten._scaled_dot_product_efficient_attention_backward.default
    *found, to_bias = op(
        g.data.to(qd.dtype), qd, kd, vd, _bias(attn_bias, qd), under(out, v.scale).to(qd.dtype), lse, seed, offset,
        dropout_p, grad_input_mask, is_causal, scale=scale,
    )  # fmt: skip
    s = scales.mul(g.scale, known(v.scale))
    bias = Pair(to_bias, s) if grad_input_mask[3] and to_bias is not None else None
    return *_gradients(found, g, q, k, v, c), bias


@rule(*ops("_scaled_dot_product_flash_attention"))
def flash(
    query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """s = s_v: a convex sum of values. Assumes that each query attends to few of them."""
    q, k, v = lift(query), lift(key), lift(value)
    qd, kd, vd, _ = _inputs(q, k, v)
    op = aten._scaled_dot_product_flash_attention.default
    out, *rest = op(qd, kd, vd, dropout_p, is_causal, return_debug_mask, scale=scale)
    return Pair(out, v.scale), *rest


@rule(*ops("_scaled_dot_product_flash_attention_backward"))
def flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: Any, max_k: Any,
    dropout_p: float, is_causal: bool, seed: Any, offset: Any, scale: float | None = None,
) -> tuple[Pair, Pair, Pair]:  # fmt: skip
    """s = s_g s_v s_k (query), s_g s_v s_q (key), s_g (value). Assumes that each query attends to few keys."""
    g, q, k, v, out = lift(grad), lift(query), lift(key), lift(value), lift(out)
    qd, kd, vd, c = _inputs(q, k, v)
    op = aten._scaled_dot_product_flash_attention_backward.default
    found = op(
        g.data, qd, kd, vd, under(out, v.scale), lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset,
        scale=scale,
    )  # fmt: skip
    return _gradients(found, g, q, k, v, c)
