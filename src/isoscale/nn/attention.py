"""Scaled-dot-product attention with one unit-scaling factor, and rotary positions.

u-muP divides the logits by the head size, not by its root, since trained q and k align (arXiv 2407.17465, section 3
and Table 2); the factor on the output then restores unit scale at the start. The same factor acts on the output and on
the gradients of q, k and v, so it is a plain multiplier, and a composite module may leave it to the next linear.
What it cannot do: it is an average over positions. Early positions of a causal sequence are larger than late ones,
and the gradients of q and k are about mult/sqrt(head_size), not 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_f
from torch import Tensor
from torch.autograd import forward_ad

from isoscale._base.errors import ConfigError
from isoscale.nn.factors import attention_factor, symbolic_log
from isoscale.nn.scale import times


def sdpa_factor(
    q: Tensor, k: Tensor, *, scale: float, is_causal: bool, dropout_p: float = 0.0, length: int | None = None
) -> float:
    """The factor of `scaled_dot_product_attention` for these operands. See `factors.attention_factor`.

    Args:
        q: queries `[..., heads, queries, head_size]`.
        k: keys `[..., kv_heads, keys, head_size]`.
        scale: the full factor on q.k.
        is_causal: as in torch.
        dropout_p: as in torch.
        length: use the factor of this key length; None uses that of `k`. Cached decoding wants the training length
            here (and `is_causal=True`), or the scale of the activations moves with every new token.
    """
    keys = k.shape[-2] if length is None else length
    head_size = q.shape[-1]
    if torch.compiler.is_compiling():
        return attention_factor(scale * head_size, head_size, keys, is_causal, dropout_p, symbolic_log)
    return attention_factor(scale * head_size, head_size, keys, is_causal, dropout_p)


def raw_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """torch's attention, grouped heads included; in plain matmuls under forward-mode AD, where kernels have no rule."""
    gqa = True if q.dim() > 3 and q.shape[-3] != k.shape[-3] else False  # noqa: SIM210 - a symbolic bool is refused
    if torch.compiler.is_compiling():  # the kernel's own scale would be compiled in: another alpha, another graph
        return torch_f.scaled_dot_product_attention(
            q * (scale * q.shape[-1] ** 0.5), k, v, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=gqa
        )
    if forward_ad._current_level < 0:
        return torch_f.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=gqa
        )
    if gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    logits = (q @ k.transpose(-1, -2)) * scale
    if is_causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril().logical_not()
        logits = logits.masked_fill(hidden, float("-inf"))
    return torch_f.dropout(logits.softmax(-1), dropout_p, dropout_p > 0) @ v


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """All q.k that a causal mask lets through, for looking at: no gradient, no scale.

    Args:
        q: `[batch, heads, length, head_size]`.
        k: `[batch, kv_heads, length, head_size]`.

    Returns:
        `[batch, heads, length * (length + 1) / 2]`.
    """
    with torch.no_grad():
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
        return scores[..., torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()]


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    mult: float = 1.0,
    length: int | None = None,
) -> Tensor:
    """Unit-scaled attention.

    Args:
        q: `[..., heads, queries, head_size]`.
        k: `[..., kv_heads, keys, head_size]`; `kv_heads` divides `heads`.
        v: `[..., kv_heads, keys, value_size]`.
        scale: full factor on q.k; default `mult / head_size`.
        is_causal: query i sees keys 0..i.
        dropout_p: dropout on the attention weights.
        mult: alpha_attn, ignored when `scale` is given.
        length: key length whose factor is used; default that of `k`. See `sdpa_factor`.

    Returns:
        `[..., heads, queries, value_size]`.

    Raises:
        ConfigError: heads that do not divide, or a dropout outside [0, 1).
    """
    if not 0 <= dropout_p < 1:
        raise ConfigError("dropout must be in [0, 1)", key="dropout_p", value=dropout_p)
    if q.dim() > 3 and q.shape[-3] % k.shape[-3]:
        raise ConfigError("the number of key heads must divide that of query heads", key="kv_heads", value=k.shape[-3])
    logit_scale = mult / q.shape[-1] if scale is None else scale
    factor = sdpa_factor(q, k, scale=logit_scale, is_causal=is_causal, dropout_p=dropout_p, length=length)
    return times(raw_attention(q, k, v, scale=logit_scale, is_causal=is_causal, dropout_p=dropout_p), factor)


def rope_tables(
    length: int,
    head_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    base: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864), each `[length, head_size]`, angles in float32.

    Raises:
        ConfigError: odd `head_size`.
    """
    if head_size % 2:
        raise ConfigError("rotary positions turn pairs, so the head size is even", key="head_size", value=head_size)
    pairs = torch.arange(0, head_size, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), base ** (-pairs / head_size))
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_size/2) of `x [..., length, head_size]`. A rotation, so its factor is 1."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin
