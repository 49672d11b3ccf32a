"""The encoder layer and the attention that torch runs as one operator in evaluation: by the rules of their pieces."""

from __future__ import annotations

import math
from typing import Any

import torch

from isoscale.scalify.pair import Pair, lift
from isoscale.scalify.registry import rule
from isoscale.scalify.rules.activation import relu_or_gelu
from isoscale.scalify.rules.arithmetic import add, mul
from isoscale.scalify.rules.matmul import linear, mm
from isoscale.scalify.rules.norm import layer_norm
from isoscale.scalify.rules.reduce import mean_dim
from isoscale.scalify.rules.select import masked_fill
from isoscale.scalify.rules.softmax import safe_softmax
from isoscale.scalify.rules.support import ops

_OVER_QUERIES, _PADDING = 0, 1


def _heads(x: Pair, heads: int) -> Pair:
    """(batch, length, width) as (batch * heads, length, width of a head)."""
    b, n, width = x.data.shape
    return Pair(x.data.reshape(b, n, heads, width // heads).transpose(1, 2).reshape(b * heads, n, -1), x.scale)


def _masked(scores: Pair, mask: Any, kind: int | None, b: int, heads: int) -> Pair:
    if mask is None:
        return scores
    m = (mask.data if isinstance(mask, Pair) else mask).to(torch.bool)
    m = m[None, None] if kind == _OVER_QUERIES else m[:, None, None] if kind == _PADDING else m
    n, k = scores.data.shape[1:]
    return masked_fill(scores, m.expand(b, heads, n, k).reshape(b * heads, n, k), -math.inf)


def _attended(xs: list[Any], heads: int, w: Any, bias: Any, mask: Any, kind: int | None) -> tuple[Pair, Pair]:
    """Outputs of the heads side by side, and the probabilities."""
    w, bias = lift(w), lift(bias)
    parts = zip(xs, w.data.chunk(3), bias.data.chunk(3))
    q, k, v = (_heads(linear(lift(x), Pair(a, w.scale), Pair(c, bias.scale)), heads) for x, a, c in parts)
    b = lift(xs[0]).data.shape[0]
    scores = mm(mul(q, 1.0 / math.sqrt(q.data.shape[-1])), Pair(k.data.mT, k.scale))
    probabilities = safe_softmax(_masked(scores, mask, kind, b, heads), -1)
    out = mm(probabilities, v)
    joined = out.data.reshape(b, heads, out.data.shape[1], -1).transpose(1, 2).reshape(b, out.data.shape[1], -1)
    return Pair(joined, out.scale), probabilities


@rule(*ops("_native_multi_head_attention"))
def multi_head_attention(
    query: Any, key: Any, value: Any, embed_dim: int, num_head: int, qkv_weight: Any, qkv_bias: Any, proj_weight: Any,
    proj_bias: Any, mask: Any = None, need_weights: bool = True, average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """s = that of its pieces: products, softmax, product. Assumes what they assume."""
    out, p = _attended([query, key, value], num_head, qkv_weight, qkv_bias, mask, mask_type)
    weights: Any = None
    if need_weights:
        weights = Pair(p.data.reshape(-1, num_head, *p.data.shape[1:]), p.scale)
        weights = mean_dim(weights, [1]) if average_attn_weights else weights
    return linear(out, proj_weight, proj_bias), weights


@rule(*ops("_transformer_encoder_layer_fwd"))
def encoder_layer(
    src: Any, embed_dim: int, num_heads: int, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any,
    use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Any, norm_bias_1: Any, norm_weight_2: Any,
    norm_bias_2: Any, ffn_weight_1: Any, ffn_bias_1: Any, ffn_weight_2: Any, ffn_bias_2: Any, mask: Any = None,
    mask_type: int | None = None,
) -> Pair:  # fmt: skip
    """s = that of its pieces: attention, norms, products, sums. Assumes what they assume."""

    def attended(x: Any) -> Pair:
        out, _ = _attended([x, x, x], num_heads, qkv_weight, qkv_bias, mask, mask_type)
        return linear(out, proj_weight, proj_bias)

    def fed(x: Any) -> Pair:
        inner = relu_or_gelu(linear(x, ffn_weight_1, ffn_bias_1), use_gelu)
        return linear(inner, ffn_weight_2, ffn_bias_2)

    def first(x: Any) -> Pair:
        return layer_norm(x, [embed_dim], norm_weight_1, norm_bias_1, eps)[0]

    def second(x: Any) -> Pair:
        return layer_norm(x, [embed_dim], norm_weight_2, norm_bias_2, eps)[0]

    if norm_first:
        x = add(src, attended(first(src)))
        return add(x, fed(second(x)))
    x = first(add(src, attended(src)))
    return second(add(x, fed(x)))
