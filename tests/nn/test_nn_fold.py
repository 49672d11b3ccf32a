"""Folded forms equal the composition of single ops, value and gradients, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from nn_claims import n, run
from torch import Tensor

from isoscale.nn import Linear, LinearReadout
from isoscale.nn import functional as F
from isoscale.nn.scale import scale, scale_bwd, scale_fwd

D = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def slow_linear(x: Tensor, w: Tensor, b: Tensor | None, forward: float, input_grad: float, tokens: int) -> Tensor:
    """The op from its definition: one scale per operand and direction."""
    grad = tokens**-0.5
    out = scale_bwd(x, input_grad) @ scale_bwd(w, grad).t()
    if b is not None:
        out = out + scale_bwd(b, grad)
    return scale_fwd(out, forward)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("tokens", [None, 1000])
def test_linear_with_pending_bias_and_residual(bias: bool, with_skip: bool, tokens: int | None) -> None:
    tau, pending = 0.5, 1.7
    a, b = tau / math.sqrt(1 + tau**2), 1 / math.sqrt(1 + tau**2)
    layer = Linear(8, 6, bias=bias, constraint=None, grad_fan_out=3, dtype=D)
    x, skip = n(2, 5, 8, dtype=D), n(2, 5, 6, dtype=D)
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    if bias:
        torch.nn.init.normal_(parameters[1])

    def folded(x: Tensor, skip: Tensor, *_: Tensor) -> Tensor:
        if not with_skip:
            return layer(x, pending=pending, tokens=tokens) + skip
        return layer(x, pending=pending, skip=skip, branch_scale=a, skip_scale=b, tokens=tokens)

    def unfolded(x: Tensor, skip: Tensor, w: Tensor, *bias_: Tensor) -> Tensor:
        y = slow_linear(x * pending, w, bias_[0] if bias_ else None, 8**-0.5, 3**-0.5, tokens or 10)
        return F.residual_add(y, skip, tau) if with_skip else y + skip

    out, (dx, dskip) = run(folded, x, skip)
    want, (want_dx, want_dskip, *want_parameters) = run(unfolded, x, skip, *parameters)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(dx, want_dx)
    torch.testing.assert_close(dskip, want_dskip)
    for parameter, grad in zip(parameters, want_parameters):
        torch.testing.assert_close(parameter.grad, grad)


def test_readout_multiplier_acts_both_ways() -> None:
    layer = LinearReadout(8, 6, dtype=D)
    x = n(5, 8, dtype=D)
    out, (dx,) = run(layer, x)
    layer.multiplier = 3.0
    tripled, (tripled_dx,) = run(layer, x)
    torch.testing.assert_close(tripled, 3 * out)
    torch.testing.assert_close(tripled_dx, 3 * dx)


def test_plain_linear_is_torch() -> None:
    layer = Linear(8, 6, scaling="plain", dtype=D)
    x, skip = n(5, 8, dtype=D), n(5, 6, dtype=D)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight))
    folded = layer(x, pending=2.0, skip=skip, branch_scale=0.5, skip_scale=0.25)
    torch.testing.assert_close(folded, 0.25 * skip + torch.nn.functional.linear(x, layer.weight))


@pytest.mark.parametrize("trainable", [False, True])
def test_norm_split_is_residual_split_and_norm(trainable: bool) -> None:
    tau = 0.7
    a, b = tau / math.sqrt(1 + tau**2), 1 / math.sqrt(1 + tau**2)
    inputs = [n(4, 6, dtype=D), n(6, 6, dtype=D)] + ([n(6, dtype=D)] if trainable else [])

    def folded(x: Tensor, mix: Tensor, *w: Tensor) -> Tensor:
        normed, skip = F.norm_split(x, branch_scale=a, skip_scale=b, weight=w[0] if w else None)
        return torch.tanh(normed @ mix) + skip.sin()

    def unfolded(x: Tensor, mix: Tensor, *w: Tensor) -> Tensor:
        branch, skip = F.residual_split(x, tau)
        normed = branch / (branch.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        if w:
            normed = normed * scale_bwd(w[0], 4**-0.5)
        return torch.tanh(normed @ mix) + skip.sin()

    (out, grads), (want, want_grads) = run(folded, *inputs), run(unfolded, *inputs)
    torch.testing.assert_close(out, want)
    for grad, want_grad in zip(grads, want_grads):
        torch.testing.assert_close(grad, want_grad)


def test_norm_split_when_one_output_is_unused() -> None:
    x = n(4, 6, dtype=D)
    _, (only_norm,) = run(lambda x: F.norm_split(x, branch_scale=0.6, skip_scale=0.8)[0], x)
    _, (want,) = run(lambda x: F.rms_norm(scale_bwd(x, 0.6), 6), x)
    torch.testing.assert_close(only_norm, want)
    out, (only_skip,) = run(lambda x: F.norm_split(x, branch_scale=0.6, skip_scale=0.8)[1], x)
    _, (want,) = run(lambda x: scale_bwd(x, 0.8), x)
    torch.testing.assert_close(only_skip, want)
    torch.testing.assert_close(out, x)


def test_gradcheck_where_factors_agree() -> None:
    """With equal factors both ways the ops are ordinary functions, so finite differences must agree."""
    x = n(3, 6, dtype=D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.norm_split(x)[0], x)
    assert torch.autograd.gradcheck(lambda x: scale(x, 0.3, 0.3), x)
    assert torch.autograd.gradcheck(lambda x: F.silu(x, 2.0), x)
    assert torch.autograd.gradcheck(lambda x: F.softmax(x, -1), x)
    weight = n(5, 6, dtype=D).requires_grad_()
    layer = Linear(6, 5, dtype=D)
    layer.weight = torch.nn.Parameter(weight.detach().clone())
    assert torch.autograd.gradcheck(lambda x: layer(x, pending=1.3), x)


def test_gradcheck_fails_where_factors_differ() -> None:
    x = n(3, 6, dtype=D).requires_grad_()
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: scale(x, 0.3, 0.4), x)


def test_double_backward_of_the_linear() -> None:
    x = n(3, 6, dtype=D).requires_grad_()
    layer = Linear(6, 5, dtype=D)

    def penalty(out: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    assert layer.weight is not None
    want = penalty(slow_linear(x, layer.weight, None, 6**-0.5, 6**-0.5, 3))
    torch.testing.assert_close(penalty(layer(x)), want)


def test_weights_are_not_copied() -> None:
    """No tensor of the weight's size is saved or made in the forward but the weight itself."""
    layer = Linear(64, 64)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True), pending=2.0)
    assert layer.weight is not None
    assert layer.weight.data_ptr() in saved
