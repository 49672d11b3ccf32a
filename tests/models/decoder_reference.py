"""Two decoders written out by hand: plain torch, and one op of `isoscale.nn.functional` at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from isoscale.models import Decoder
from isoscale.nn import functional as F


def rotate(x: Tensor) -> Tensor:
    """RoPE by complex numbers: pairs (i, i + half) turn by position * 10000^(-2i/size)."""
    size, length = x.shape[-1], x.shape[-2]
    half = size // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(length, half, dtype=torch.float64), torch.arange(length)[:, None] * speed)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def heads_of(qkv: Tensor, model: Decoder) -> list[Tensor]:
    c = model.config
    parts = qkv.split([c.heads * c.head_size, c.groups * c.head_size, c.groups * c.head_size], -1)
    return [part.unflatten(-1, (-1, c.head_size)).transpose(1, 2) for part in parts]


def plain_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Standard decoder on the weights of `model`."""
    c = model.config
    x = model.embed.weight[ids]
    mask = torch.ones(ids.shape[1], ids.shape[1]).tril().log()
    for block in model.blocks:
        h = torch_f.rms_norm(x, (c.width,), block.attn_norm.weight, c.norm_eps)
        q, k, v = heads_of(h @ block.attn.qkv.weight.t(), model)
        if c.qk_norm:
            q = torch_f.rms_norm(q, (c.head_size,), block.attn.q_norm.weight, c.norm_eps)
            k = torch_f.rms_norm(k, (c.head_size,), block.attn.k_norm.weight, c.norm_eps)
        k, v = (t.repeat_interleave(c.heads // c.groups, 1) for t in (rotate(k), v))
        weights = (rotate(q) @ k.transpose(-1, -2) / c.head_size**0.5 + mask).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2) @ block.attn.out.weight.t()
        h = torch_f.rms_norm(x, (c.width,), block.mlp_norm.weight, c.norm_eps)
        gate, up = (h @ block.mlp.gate_up.weight.t()).chunk(2, -1)
        x = x + (torch_f.silu(gate) * up) @ block.mlp.down.weight.t()
    x = torch_f.rms_norm(x, (c.width,), model.norm.weight, c.norm_eps)
    return x @ (model.embed.weight if c.tied else model.head.weight).t()


def unit_loss(model: Decoder, ids: Tensor, targets: Tensor) -> Tensor:
    """Unit-scaled decoder, unfolded, on the weights of `model`."""
    c = model.config
    x = F.embedding(ids, model.embed.weight)
    for block in model.blocks:

        def attention(h: Tensor, block: torch.nn.Module = block) -> Tensor:
            h = F.rms_norm(h, c.width, block.attn_norm.weight, c.norm_eps)
            q, k, v = heads_of(F.linear(h, block.attn.qkv.weight), model)
            if c.qk_norm:
                q = F.rms_norm(q, c.head_size, block.attn.q_norm.weight, c.norm_eps)
                k = F.rms_norm(k, c.head_size, block.attn.k_norm.weight, c.norm_eps)
            out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, mult=c.alpha_attn)
            return F.linear(out.transpose(1, 2).flatten(2), block.attn.out.weight)

        def mlp(h: Tensor, block: torch.nn.Module = block) -> Tensor:
            h = F.rms_norm(h, c.width, block.mlp_norm.weight, c.norm_eps)
            gate_weight, up_weight = block.mlp.gate_up.weight.chunk(2)
            gate, up = (F.linear(h, w, constraint=None) for w in (gate_weight, up_weight))
            return F.linear(F.silu_glu(up, gate, c.alpha_ffn_act), block.mlp.down.weight, constraint=None)

        x = F.residual_apply(attention, x, block.attn_tau)
        x = F.residual_apply(mlp, x, block.mlp_tau)
    x = F.rms_norm(x, c.width, model.norm.weight, c.norm_eps)
    logits = F.linear_readout(x, model.embed.weight if c.tied else model.head.weight)
    return F.cross_entropy(logits, targets, mult=c.alpha_loss)


def peer_loss(model: Decoder, ids: Tensor, targets: Tensor, uu: object) -> Tensor:
    """The same from ops of unit-scaling (no grouped heads), an oracle from outside."""
    U = uu.functional  # type: ignore[attr-defined]
    c = model.config
    x = U.embedding(ids, model.embed.weight)
    for block in model.blocks:
        h, skip = U.residual_split(x, block.attn_tau)
        q, k, v = heads_of(U.linear(U.rms_norm(h, (c.width,)), block.attn.qkv.weight, None), model)
        out = U.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, mult=c.alpha_attn)
        x = U.residual_add(U.linear(out.transpose(1, 2).flatten(2), block.attn.out.weight, None), skip, block.attn_tau)
        h, skip = U.residual_split(x, block.mlp_tau)
        h = U.rms_norm(h, (c.width,))
        gate, up = (U.linear(h, w, None, constraint=None) for w in block.mlp.gate_up.weight.chunk(2))
        down = U.linear(U.silu_glu(up, gate, mult=c.alpha_ffn_act), block.mlp.down.weight, None, constraint=None)
        x = U.residual_add(down, skip, block.mlp_tau)
    logits = U.linear_readout(U.rms_norm(x, (c.width,)), model.head.weight, None)
    return U.cross_entropy(logits.flatten(0, 1), targets.flatten(), mult=c.alpha_loss)


__all__ = ["peer_loss", "plain_logits", "unit_loss"]
