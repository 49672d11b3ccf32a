"""Claims about unit-scaled ops as helpers, and one table of all ops for the tests that go over every one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isoscale.nn import functional as F

torch.set_num_threads(1)


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def assert_unit_scaled(x: Tensor | None, tolerance: float = 0.05, target: float = 1.0) -> None:
    """The rms of `x` is `target` within a relative `tolerance`."""
    assert x is not None
    assert abs(rms(x) / target - 1) <= tolerance, f"rms {rms(x):.4f}, expected {target} within {tolerance:.0%}"


def run(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output for `inputs`, and their gradients under a unit normal output gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    torch.manual_seed(99)
    out.backward(torch.randn(out.shape).to(out.dtype))
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return out.detach(), [grad for grad in grads if grad is not None]


def n(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


IDS = torch.arange(12).reshape(3, 4) % 7

OpCase = tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]

OPS: dict[str, OpCase] = {
    "linear": (lambda x, w: F.linear(x, w), lambda: [n(3, 4, 5), n(6, 5)]),
    "linear_bias": (lambda x, w, b: F.linear(x, w, b), lambda: [n(3, 4, 5), n(6, 5), n(6)]),
    "linear_readout": (lambda x, w: F.linear_readout(x, w), lambda: [n(3, 4, 5), n(6, 5)]),
    "matmul": (lambda a, b: F.matmul(a, b, None), lambda: [n(3, 4, 5), n(5, 6)]),
    "conv1d": (lambda x, w: F.conv1d(x, w, stride=2, padding=1), lambda: [n(3, 4, 9), n(6, 4, 3)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, constraint=None), lambda: [n(3, 2, 5, 6), n(4, 2, 3, 2)]),
    "gelu": (lambda x: F.gelu(x, 2.0, None), lambda: [n(3, 4, 5)]),
    "silu": (lambda x: F.silu(x, 0.5, None), lambda: [n(3, 4, 5)]),
    "silu_glu": (lambda x, g: F.silu_glu(x, g, 2.0), lambda: [n(3, 4, 5), n(3, 4, 5)]),
    "gelu_glu": (lambda x, g: F.gelu_glu(x, g), lambda: [n(3, 4, 5), n(3, 4, 5)]),
    "softmax": (lambda x: F.softmax(x, -1, constraint=None, mult=2.0), lambda: [n(3, 4, 5)]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: [n(3, 4, 5, 8), n(3, 2, 5, 8), n(3, 2, 5, 8)],
    ),
    "rope": (lambda x: F.apply_rope(x, *F.rope_tables(5, 8, dtype=x.dtype)), lambda: [n(3, 4, 5, 8)]),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), lambda: [n(3, 4, 5)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, 5, w, b), lambda: [n(3, 4, 5), n(5), n(5)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, 5, w), lambda: [n(3, 4, 5), n(5)]),
    "norm_split": (
        lambda x: torch.stack(F.norm_split(x, branch_scale=0.6, skip_scale=0.8)).sum(0),
        lambda: [n(3, 4, 5)],
    ),
    "add": (lambda a, b: F.add(a, b, None), lambda: [n(3, 4, 5), n(5)]),
    "residual": (lambda x: F.residual_apply(torch.tanh, x, 0.5), lambda: [n(3, 4, 5)]),
    "embedding": (lambda w: F.embedding(IDS, w), lambda: [n(7, 5)]),
    "cross_entropy": (lambda x: F.cross_entropy(x, IDS, mult=2.0, ignore_index=3), lambda: [n(3, 4, 7)]),
    "mse_loss": (lambda x, y: F.mse_loss(x, y), lambda: [n(3, 4), n(3, 4)]),
}
