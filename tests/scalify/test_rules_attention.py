"""The fused attention of every device, by one rule: the kernels that this machine lacks are stood in for by mathematics.

What the stand-ins cannot show, that the kernels take these arguments, is for a machine with a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from isoscale.scalify import ScaledTensor, as_plain, as_scaled
from isoscale.scalify.pair import Pair, value
from isoscale.scalify.rules import attention
from isoscale.scalify.rules.support import ops

KERNELS = [name for name in attention.KERNELS if ops(name)]


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, scale: float | None) -> Tensor:
    logits = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        logits = logits + bias
    if causal:
        logits = logits.masked_fill(torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool(), float("-inf"))
    return torch.softmax(logits, -1) @ v


class StandIn:
    """An operator with the schema of a kernel; refuses arguments that are not in it."""

    def __init__(self, op: Any) -> None:
        self._schema = op._schema

    def __call__(self, **named: Any) -> tuple[Any, ...]:
        known = {argument.name for argument in self._schema.arguments}
        assert set(named) <= known
        bias = named.get("attn_bias", named.get("attn_mask"))
        leaves = [named[n].detach().requires_grad_() for n in ("query", "key", "value")]
        if bias is not None:
            leaves.append(bias.detach().requires_grad_())
        with torch.enable_grad():
            out = formula(*leaves[:3], leaves[3] if bias is not None else None, named["is_causal"], named.get("scale"))
        grad = named.get("grad_out", named.get("grad_out_"))
        if grad is None:
            return (out.detach(), *[torch.zeros(()) for _ in self._schema.returns[1:]])
        torch.testing.assert_close(named["out"], out.detach(), check_dtype=False)
        found = torch.autograd.grad(out, leaves, grad)
        return (*found, *[None] * (len(self._schema.returns) - len(found)))[: len(self._schema.returns)]


def given(op: Any, **named: Any) -> dict[str, Any]:
    return {a.name: named[a.name] for a in op._schema.arguments if a.name in named}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_rule_of_every_kernel(kernel: str, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    q, k, v, grad = (Pair(x, torch.tensor(s)) for x, s in zip(data, (2.0**-3, 2.0**2, 2.0**7, 2.0**-11)))
    bias = torch.randn(2, 2, 5, 5, generator=generator, dtype=torch.float64)
    forward_op, backward_op = ops(kernel)[0], ops(f"{kernel}_backward")[0]
    masked = any(a.name in ("attn_bias", "attn_mask") for a in forward_op._schema.arguments)
    plain = [value(p).requires_grad_() for p in (q, k, v)]
    want_bias = bias.clone().requires_grad_()
    want = formula(*plain, want_bias if masked else None, causal, 0.3)
    gradients = torch.autograd.grad(want, [*plain, want_bias] if masked else plain, value(grad))

    out = attention.forward(StandIn(forward_op))(**given(
        forward_op, query=q, key=k, value=v, attn_bias=bias, attn_mask=bias, is_causal=causal, scale=0.3,
        compute_log_sumexp=True,
    ))[0]  # fmt: skip
    torch.testing.assert_close(value(out), want.detach())
    assert float(out.scale) == 2.0**7
    found = attention.backward(StandIn(backward_op))(**given(
        backward_op, grad_out=grad, grad_out_=grad, query=q, key=k, value=v, attn_bias=bias, attn_mask=bias, out=out,
        logsumexp=torch.zeros(()), is_causal=causal, scale=0.3,
    ))  # fmt: skip
    for a, b in zip(found, gradients):
        if a is not None:
            torch.testing.assert_close(value(a), b)
    with pytest.raises(AssertionError):  # control: another factor
        torch.testing.assert_close(value(found[0]) * 2, gradients[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_data_far_from_1(dtype: torch.dtype) -> None:
    """Queries of 2^-20 and keys of 2^20: their products are fine."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, 16, generator=generator).to(dtype) for _ in range(3))
    scaled = [as_scaled(x.float() * s, s, dtype).detach().requires_grad_() for x, s in zip((q, k, v), (2.0**-20, 2.0**20, 2.0**30))]
    plain = [x.double().requires_grad_() for x in (q, k, v)]
    found = torch.nn.functional.scaled_dot_product_attention(*scaled, is_causal=True)
    want = torch.nn.functional.scaled_dot_product_attention(*plain, is_causal=True)
    assert isinstance(found, ScaledTensor)
    found.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(found._data.double(), want, rtol=0, atol=4e-2)
    for x, y, s in zip(scaled, plain, (2.0**50, 2.0**10, 1.0)):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(as_plain(x.grad, torch.float64) / s, y.grad, rtol=0, atol=4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
def test_kernels_of_a_gpu(backend: str, dtype: torch.dtype) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if dtype == torch.float32 and backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        pytest.skip("half only")
    torch.manual_seed(0)
    data = [torch.randn(2, 4, 64, 64, device="cuda") for _ in range(3)]
    ours = [as_scaled(x * s, s, dtype).detach().requires_grad_() for x, s in zip(data, (2.0**-3, 2.0**2, 2.0**9))]
    plain = [as_plain(x, torch.float64).detach().requires_grad_() for x in ours]
    with sdpa_kernel(getattr(SDPBackend, backend)):
        found = torch.nn.functional.scaled_dot_product_attention(*ours, is_causal=True)
        found.sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(*plain, is_causal=True)
        want.sum().backward()
    for a, b in [(found, want), *((x.grad, y.grad) for x, y in zip(ours, plain))]:
        error = (as_plain(a, torch.float64) - b).abs().max() / b.abs().max()
        assert float(error) < 3e-2
