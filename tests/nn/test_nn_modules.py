"""Modules: defaults, roles, reported factors, refusals."""

from __future__ import annotations

import pytest
import torch
from nn_claims import n, rms
from torch import nn

from isoscale import nn as iso
from isoscale._base.errors import ConfigError
from isoscale.nn.constraints import CONSTRAINTS, apply_constraint

ROLES = {"embedding", "hidden", "readout", "gain", "bias"}
WITH_PARAMETERS = [
    lambda: iso.Linear(16, 8, bias=True),
    lambda: iso.LinearReadout(16, 8, bias=True),
    lambda: iso.Conv1d(4, 8, 3, bias=True),
    lambda: iso.Conv2d(4, 8, 3, bias=True),
    lambda: iso.Embedding(9, 16),
    lambda: iso.RMSNorm(16, elementwise_affine=True),
    lambda: iso.LayerNorm(16, elementwise_affine=True),
]


@pytest.mark.parametrize("make", WITH_PARAMETERS)
def test_every_parameter_has_a_role_and_factors(make: object) -> None:
    assert callable(make)
    module = make()
    assert {name for name, _ in module.named_parameters()} == set(module.roles)
    assert set(module.roles.values()) <= ROLES
    assert module.factors().weight_grad is None
    told = module.factors(100)
    assert told.weight_grad is not None
    assert told.weight_grad > 0
    module.reset_parameters()


def test_defaults_are_those_of_unit_scaling() -> None:
    assert iso.Linear(4, 3).bias is None
    assert not list(iso.RMSNorm(4).parameters())
    assert not list(iso.LayerNorm(4).parameters())
    assert rms(iso.Linear(256, 256).weight) == pytest.approx(1, abs=0.02)
    assert rms(iso.Linear(4, 3, bias=True).bias) == 0
    assert rms(iso.Linear(256, 256, scaling="plain").weight) == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("make", [lambda: iso.Linear(16, 8, constraint=None), lambda: iso.LinearReadout(16, 8)])
def test_reported_factors_are_those_used(make: object) -> None:
    assert callable(make)
    layer = make()
    x = n(10, 16).requires_grad_()
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    told = layer.factors(10)
    torch.testing.assert_close(out, told.forward * (x @ layer.weight.t()))
    torch.testing.assert_close(x.grad, told.input_grad * (grad @ layer.weight))
    torch.testing.assert_close(layer.weight.grad, told.weight_grad * (grad.t() @ x))


def test_reported_embedding_factor() -> None:
    layer, ids = iso.Embedding(9, 4), torch.randint(0, 9, (5, 6))
    layer(ids).sum().backward()
    told = layer.factors(30).weight_grad
    assert told is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad[:, 0], told * torch.bincount(ids.flatten(), minlength=9).float())


def test_padding_row() -> None:
    layer = iso.Embedding(9, 4, padding_idx=2)
    layer(torch.tensor([2, 3])).sum().backward()
    assert layer.weight.grad is not None
    assert rms(layer.weight[2]) == rms(layer.weight.grad[2]) == 0


def test_refusals() -> None:
    for make in (
        lambda: iso.Linear(0, 3),
        lambda: iso.Linear(3, 3, scaling="unti"),  # type: ignore[arg-type]
        lambda: iso.Conv1d(4, 6, 3, groups=3),
        lambda: iso.Dropout(1.0),
        lambda: iso.SiLU(-1.0),
        lambda: iso.RMSNorm(4)(n(2, 5)),
        lambda: iso.LinearReadout(4, 3, tied=True)(n(2, 4)),
        lambda: iso.MSELoss()(n(2), n(3)),
        lambda: iso.CrossEntropyLoss()(n(2, 3), torch.zeros(3, dtype=torch.long)),
    ):
        with pytest.raises(ConfigError):
            make()


def test_tied_readout() -> None:
    table, head = iso.Embedding(9, 4), iso.LinearReadout(4, 9, tied=True)
    assert not list(head.parameters())
    head(n(2, 4), weight=table.weight).sum().backward()
    assert table.weight.grad is not None


def test_constraints() -> None:
    assert apply_constraint("gmean", 2.0, 8.0) == (4.0, 4.0)
    assert apply_constraint("hmean", 2.0, 2.0) == (2.0, 2.0)
    assert apply_constraint("amean", 2.0, 4.0, 6.0) == (4.0, 4.0, 4.0)
    assert apply_constraint("to_left_grad_scale", 1.0, 2.0, 3.0)[0] == 2.0
    assert apply_constraint("to_right_grad_scale", 1.0, 2.0, 3.0)[0] == 3.0
    assert apply_constraint(None, 1.0, 2.0) == (1.0, 2.0)
    assert len(CONSTRAINTS) == 7


def test_modules_without_parameters_are_modules() -> None:
    x = n(4, 8)
    stack = nn.Sequential(iso.GELU(), iso.SiLU(2.0), iso.Softmax(-1), iso.Dropout(0.5))
    assert stack(x).shape == x.shape
    stack.eval()
    assert torch.equal(iso.Dropout(0.5).eval()(x), x)
    assert iso.CrossEntropyLoss(label_smoothing=0.1)(x, torch.zeros(4, dtype=torch.long)) > 0
