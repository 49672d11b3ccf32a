"""bfloat16 and autocast: right dtypes, values close to float32, factors unchanged."""

from __future__ import annotations

import pytest
import torch
from nn_claims import OPS, n, rms, run

from isoscale import nn as iso
from isoscale.nn import functional as F


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", list(OPS))
def test_bf16_follows_float32(name: str) -> None:
    fn, make = OPS[name]
    inputs = [x.bfloat16().float() for x in make()]
    out, grads = run(fn, *inputs)
    low, low_grads = run(fn, *(x.bfloat16() for x in inputs))
    assert low.dtype == (torch.float32 if name == "cross_entropy" else torch.bfloat16)
    for value, want in zip((low, *low_grads), (out, *grads)):
        assert rms(value.float() - want) < 0.02 * rms(want) + 1e-3


@pytest.mark.parametrize("name", ["linear", "linear_bias", "linear_readout", "conv1d", "conv2d"])
def test_autocast_casts_at_the_entry(name: str) -> None:
    fn, make = OPS[name]
    inputs = make()
    _, grads = run(fn, *inputs)

    def cast(*args: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(*args)

    low, low_grads = run(cast, *inputs)
    assert low.dtype == torch.bfloat16
    for value, want in zip(low_grads, grads):
        assert value.dtype == torch.float32
        assert rms(value - want) < 0.02 * rms(want)


def test_autocast_keeps_a_float32_stream() -> None:
    layer = iso.Linear(16, 8)
    x, skip = n(4, 16).requires_grad_(), n(4, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, skip=skip, branch_scale=0.6, skip_scale=0.8)
    assert out.dtype == torch.float32
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(skip.grad, grad)
    torch.testing.assert_close(out, 0.8 * skip + 0.6 * layer(x), rtol=0.02, atol=0.02)


def test_rms_norm_of_bf16_is_computed_in_float32() -> None:
    x = (n(64, 512) * 1e-3 + 1).bfloat16()
    want = torch.nn.functional.rms_norm(x.float(), (512,), eps=1e-5).bfloat16()
    assert torch.equal(F.rms_norm(x, 512), want)
