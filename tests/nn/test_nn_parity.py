"""Values and gradients equal those of unit-scaling wherever that library is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_claims import n, run

from isoscale import nn as iso
from isoscale.nn import functional as F

uu = pytest.importorskip("unit_scaling")
U = pytest.importorskip("unit_scaling.functional")

CONSTRAINTS = ["to_output_scale", "to_grad_input_scale", "gmean", "hmean", "amean", None]


def same(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: torch.Tensor) -> None:
    (out, grads), (want, want_grads) = run(ours, *inputs), run(theirs, *inputs)
    torch.testing.assert_close(out, want, rtol=2e-5, atol=2e-6)
    for grad, want_grad in zip(grads, want_grads):
        torch.testing.assert_close(grad, want_grad, rtol=2e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_linears(constraint: str | None) -> None:
    x, w, b = n(3, 7, 16), n(24, 16), n(24)
    same(lambda *a: F.linear(*a, constraint=constraint), lambda *a: U.linear(*a, constraint=constraint), x, w, b)
    same(
        lambda *a: F.linear_readout(*a, constraint=constraint),
        lambda *a: U.linear_readout(*a, None, constraint=constraint),
        x,
        w,
    )


@pytest.mark.parametrize("constraint", ["to_output_scale", "to_left_grad_scale", "to_right_grad_scale", "gmean", None])
def test_two_operands(constraint: str | None) -> None:
    same(lambda *a: F.matmul(*a, constraint), lambda *a: U.matmul(*a, constraint=constraint), n(5, 16), n(16, 8))
    same(lambda *a: F.add(*a, constraint), lambda *a: U.add(*a, constraint=constraint), n(5, 16), n(16))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("mult", [0.25, 1.0, 3.0])
def test_activations(constraint: str | None, mult: float) -> None:
    same(lambda x: F.gelu(x, mult, constraint), lambda x: U.gelu(x, mult=mult, constraint=constraint), n(5, 16))
    same(lambda x: F.silu(x, mult, constraint), lambda x: U.silu(x, mult=mult, constraint=constraint), n(5, 16))
    same(
        lambda x: F.softmax(x, -1, None, constraint, mult),
        lambda x: U.softmax(x, dim=-1, mult=mult, constraint=constraint),
        n(5, 16),
    )
    same(lambda x, g: F.silu_glu(x, g, mult), lambda x, g: U.silu_glu(x, g, mult=mult), n(5, 16), n(5, 16))


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (2, 1, 1), (1, 2, 4)])
@pytest.mark.parametrize("constraint", ["to_output_scale", None])
def test_conv1d(stride: int, padding: int, groups: int, constraint: str | None) -> None:
    kw: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups, "constraint": constraint}
    same(lambda *a: F.conv1d(*a, **kw), lambda *a: U.conv1d(*a, **kw), n(2, 8, 15), n(12, 8 // groups, 3), n(12))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mult", [0.5, 2.0])
def test_attention(causal: bool, mult: float) -> None:
    same(
        lambda *a: F.scaled_dot_product_attention(*a, is_causal=causal, mult=mult),
        lambda *a: U.scaled_dot_product_attention(*a, is_causal=causal, mult=mult),
        *(n(2, 3, 9, 8) for _ in range(3)),
    )


def test_norms() -> None:
    same(lambda x, w: F.rms_norm(x, 16, w), lambda x, w: U.rms_norm(x, (16,), w), n(5, 3, 16), n(16))
    same(lambda x, w: F.rms_norm(x, (3, 16), w), lambda x, w: U.rms_norm(x, (3, 16), w), n(5, 3, 16), n(3, 16))
    same(
        lambda x, w, b: F.layer_norm(x, 16, w, b), lambda x, w, b: U.layer_norm(x, (16,), w, b), n(5, 16), n(16), n(16)
    )


@pytest.mark.parametrize("tau", [0.2, 1.0, 3.0])
def test_residual(tau: float) -> None:
    same(lambda x: F.residual_apply(torch.tanh, x, tau), lambda x: U.residual_apply(torch.tanh, x, tau), n(5, 16))


def test_embedding_and_losses() -> None:
    ids, targets = torch.randint(0, 9, (4, 5)), torch.randint(0, 9, (6,))
    same(lambda w: F.embedding(ids, w), lambda w: U.embedding(ids, w), n(9, 16))
    for mult in (1.0, 2.5):
        same(
            lambda x: F.cross_entropy(x, targets, mult=mult), lambda x: U.cross_entropy(x, targets, mult=mult), n(6, 9)
        )
    same(F.mse_loss, U.mse_loss, n(6, 9), n(6, 9))


@pytest.mark.parametrize(("mult", "ratio"), [(1.0, 1.0), (0.5, 4.0), (2.0, 0.25)])
def test_residual_taus(mult: float, ratio: float) -> None:
    rule = uu.transformer_residual_scaling_rule(mult, ratio)
    want = tuple(rule(i, 12) for i in range(12))
    assert F.transformer_residual_taus(12, mult, ratio) == pytest.approx(want)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: iso.Linear(16, 24, bias=True), lambda: uu.Linear(16, 24, bias=True)),
        (lambda: iso.LinearReadout(16, 24), lambda: uu.LinearReadout(16, 24)),
        (lambda: iso.RMSNorm(16, elementwise_affine=True), lambda: uu.RMSNorm(16, elementwise_affine=True)),
        (lambda: iso.LayerNorm(16), lambda: uu.LayerNorm(16)),
        (lambda: iso.GELU(2.0), lambda: uu.GELU(mult=2.0)),
        (lambda: iso.SiLU(), lambda: uu.SiLU()),
        (lambda: iso.Softmax(-1), lambda: uu.Softmax(-1)),
    ],
)
def test_modules(ours: Callable[[], torch.nn.Module], theirs: Callable[[], torch.nn.Module]) -> None:
    mine, other = ours(), theirs()
    state = {name: value.detach().clone() for name, value in other.named_parameters()}
    mine.load_state_dict(state)
    same(mine, other, n(3, 4, 16))
    for name, value in mine.named_parameters():
        torch.testing.assert_close(value.grad, dict(other.named_parameters())[name].grad, rtol=2e-5, atol=1e-5)
