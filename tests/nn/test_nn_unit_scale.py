"""Outputs and gradients of every op are at unit scale, and a control shows that the check can fail."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as torch_f
from nn_claims import assert_unit_scaled, n, rms, run

from isoscale.nn import functional as F


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_unscaled_linear_fails_the_check() -> None:
    out, _ = run(torch_f.linear, n(512, 256), n(384, 256))
    with pytest.raises(AssertionError, match="rms"):
        assert_unit_scaled(out)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool) -> None:
    inputs = [n(16, 64, 256), n(384, 256)] + ([torch.zeros(384)] if bias else [])
    out, grads = run(lambda *a: F.linear(*a, constraint=None) if bias else F.linear(*a, None, None), *inputs)
    for value in (out, *grads):
        assert_unit_scaled(value)


def test_linear_constraint_moves_only_the_input_gradient() -> None:
    x, w = n(1024, 64), n(256, 64)
    free, (dx, dw) = run(lambda a, b: F.linear(a, b, constraint=None), x, w)
    tied, (tied_dx, tied_dw) = run(lambda a, b: F.linear(a, b), x, w)
    torch.testing.assert_close(free, tied)
    torch.testing.assert_close(dw, tied_dw)
    assert_unit_scaled(tied_dx, target=2.0)  # sqrt(256 / 64)
    assert_unit_scaled(dx)


def test_readout_forward_is_one_over_fan_in_and_gradients_are_unit() -> None:
    out, grads = run(F.linear_readout, n(1024, 256), n(128, 256))
    assert_unit_scaled(out, target=1 / 16)
    for grad in grads:
        assert_unit_scaled(grad)


def test_tokens_replace_the_local_row_count() -> None:
    _, (_, dw) = run(lambda a, b: F.linear(a, b, tokens=4 * 512), n(512, 64), n(64, 64))
    assert_unit_scaled(dw, target=0.5)


def test_matmul() -> None:
    out, grads = run(lambda a, b: F.matmul(a, b, None), n(256, 128), n(128, 512))
    for value in (out, *grads):
        assert_unit_scaled(value)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_conv1d(stride: int, groups: int) -> None:
    x, w, b = n(16, 64, 128), n(128, 64 // groups, 4), torch.zeros(128)
    out, grads = run(lambda *a: F.conv1d(*a, stride=stride, groups=groups, constraint=None), x, w, b)
    for value, band in zip((out, *grads), (0.05, 0.05, 0.05, 0.15)):  # 128 biases: a small sample; borders: zeros
        assert_unit_scaled(value, band)


def test_conv2d() -> None:
    x, w = n(8, 32, 24, 24), n(64, 32, 3, 3)
    out, grads = run(lambda a, b: F.conv2d(a, b, padding=0, constraint=None), x, w)
    for value, band in zip((out, *grads), (0.05, 0.1, 0.05)):  # 10 % of the input positions are read less often
        assert_unit_scaled(value, band)


@pytest.mark.parametrize("mult", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("op", [F.gelu, F.silu])
def test_activation_std(op: object, mult: float) -> None:
    assert callable(op)
    out, (dx,) = run(lambda x: op(x, mult, None), n(1 << 16))
    assert abs(out.std().item() - 1) < 0.05  # the mean is not zero: std, not rms, is what the factor is made for
    assert_unit_scaled(dx)


@pytest.mark.parametrize("mult", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("op", [F.silu_glu, F.gelu_glu])
def test_glu(op: object, mult: float) -> None:
    assert callable(op)
    out, (dx, dgate) = run(lambda x, g: op(x, g, mult), n(1 << 16), n(1 << 16))
    assert_unit_scaled(out)
    assert_unit_scaled(dx)
    # silu' and gelu' exceed the activation's rms over its input: 1.0 to 1.15 by numerical integration
    assert 0.95 < rms(dgate) < 1.2


def test_glu_with_the_wrong_factor_fails_the_check() -> None:
    with pytest.raises(AssertionError, match="rms"):
        assert_unit_scaled(n(1 << 14) * torch_f.silu(n(1 << 14)) * 2.0)


@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("mult", [0.25, 1.0, 4.0])
def test_softmax_band(size: int, mult: float) -> None:
    out, (dx,) = run(lambda x: F.softmax(x, -1, constraint=None, mult=mult), n(256, size))
    assert 0.8 < rms(out) < 1.1
    assert 0.5 < rms(dx) < 1.3


@pytest.mark.parametrize("mult", [1.0, 4.0])
def test_attention_full(mult: float) -> None:
    out, (dq, dk, dv) = run(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mult=mult), *(n(4, 4, 256, 64) for _ in range(3))
    )
    assert 0.9 < rms(out) < 1.1
    assert 0.9 < rms(dv) < 1.1
    for grad in (dq, dk):  # about mult / sqrt(head_size): the price of 1/head_size logits
        assert 0.7 < rms(grad) / (mult / 8) < 1.2


def test_attention_causal_is_unit_on_average_and_falls_with_position() -> None:
    out, _ = run(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *(n(8, 4, 256, 64) for _ in range(3))
    )
    assert 0.85 < rms(out) < 1.2
    first, last = rms(out[..., 0, :]), rms(out[..., -1, :])
    assert 5 < first < 8  # sqrt(256 / ln 256) = 6.8, slightly damped
    assert 0.3 < last < 0.6  # sqrt(1 / ln 256) = 0.42


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p: float) -> None:
    out, (dx,) = run(lambda x: F.dropout(x, p), n(1 << 16))
    assert_unit_scaled(out)
    assert_unit_scaled(dx)


def test_norms() -> None:
    for op, extra in ((F.rms_norm, []), (F.layer_norm, [torch.zeros(128)])):
        out, grads = run(lambda x, *p: op(x, 128, *p), n(2048, 128), torch.ones(128), *extra)
        assert_unit_scaled(out)
        assert_unit_scaled(grads[0])
        for grad in grads[1:]:
            assert_unit_scaled(grad, 0.2)  # 128 numbers


def test_add_with_broadcast() -> None:
    out, (left, right) = run(lambda a, b: F.add(a, b, None), n(512, 256), n(256))
    assert_unit_scaled(out)
    assert_unit_scaled(left)
    assert_unit_scaled(right, 0.15)
    assert rms(F.add(torch.zeros(512), 3.0)) == 3.0  # a number passes unscaled


@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
def test_residual(tau: float) -> None:
    inside: list[torch.Tensor] = []
    weight = n(128, 128)

    def branch(x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, weight)
        out.register_hook(inside.append)
        return out

    out, (dx,) = run(lambda x: F.residual_apply(branch, x, tau), n(2048, 128))
    assert_unit_scaled(out)
    assert_unit_scaled(dx)
    assert_unit_scaled(inside[0])  # gradients inside the branch stay at unit scale whatever tau is


def test_embedding() -> None:
    ids = torch.randint(0, 64, (64, 128))
    out, (dw,) = run(lambda w: F.embedding(ids, w), n(64, 128))
    assert_unit_scaled(out)
    assert_unit_scaled(dw)


def test_losses() -> None:
    logits, targets = torch.zeros(4096, 32), torch.randint(0, 32, (4096,))
    leaf = logits.requires_grad_()
    F.cross_entropy(leaf, targets).backward()
    assert_unit_scaled(leaf.grad)
    x, y = n(1 << 14).requires_grad_(), n(1 << 14)
    F.mse_loss(x, y).backward()
    assert_unit_scaled(x.grad)


def test_residual_rule_invariants() -> None:
    """Branch shares at the output: attention/FFN = ratio, rms of both / embedding = residual_mult."""
    mult, ratio, branches = 0.75, 0.25, 12
    shares, skip = [], 1.0
    for tau in F.transformer_residual_taus(branches, mult, ratio):
        a, b = tau / math.sqrt(1 + tau * tau), 1 / math.sqrt(1 + tau * tau)
        shares, skip = [share * b for share in shares] + [a], skip * b
    attn, ffn = (math.sqrt(sum(share**2 for share in shares[start::2])) for start in (0, 1))
    assert attn / ffn == pytest.approx(ratio)
    assert math.sqrt((attn**2 + ffn**2) / 2) / skip == pytest.approx(mult)
    assert shares[0] == pytest.approx(shares[2])
    assert shares[1] == pytest.approx(shares[-1])
