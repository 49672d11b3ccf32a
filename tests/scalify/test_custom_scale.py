"""A function with a scale rule of its own."""

import pytest
import torch

from isoscale import scalify as sc
from isoscale._base.errors import ConfigError


def square_gate(x, y):
    return x * torch.sigmoid(y)


def forward(x, y):
    """s = s_x / 2: half of the gates are open."""
    plain = sc.value(sc.lift(y), torch.float32)
    return sc.Pair(x.data * torch.sigmoid(plain).to(x.data.dtype) * 2, x.scale * 0.5)


gate = sc.custom_scale(square_gate, forward, name="test_gate")


def backward(g, x, y):
    """The gate's gradient only; none for y."""
    return sc.Pair(g.data * torch.sigmoid(sc.value(y)) * 2, g.scale * 0.5), None


fixed = sc.custom_scale(square_gate, forward, backward, name="test_gate_fixed")


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)


def test_plain_tensors_go_through_the_function_with_its_gradient(pair):
    x, y = (p.clone().requires_grad_() for p in pair)
    out = gate(x, y)
    assert torch.equal(out, square_gate(x, y))
    out.sum().backward()
    assert torch.allclose(x.grad, torch.sigmoid(y))


def test_scaled_tensors_go_through_the_rule(pair):
    x, y = (sc.as_scaled(p, scale=s) for p, s in zip(pair, (2.0**-4, 2.0)))
    out = gate(x, y)
    assert float(out.scale) == 2.0**-5
    assert torch.allclose(sc.as_plain(out), square_gate(*pair), rtol=1e-6)


def test_without_a_backward_rule_the_operators_rules_differentiate(pair):
    x, y = (sc.as_scaled(p).requires_grad_() for p in pair)
    gate(x, y).sum().backward()
    a, b = (p.clone().requires_grad_() for p in pair)
    square_gate(a, b).sum().backward()
    assert torch.allclose(sc.as_plain(x.grad), a.grad, rtol=1e-6)
    assert torch.allclose(sc.as_plain(y.grad), b.grad, rtol=1e-5, atol=1e-8)


def test_a_backward_rule_of_ones_own_is_used(pair):
    x, y = (sc.as_scaled(p).requires_grad_() for p in pair)
    fixed(x, y).sum().backward()
    assert torch.allclose(sc.as_plain(x.grad), torch.sigmoid(pair[1]), rtol=1e-6)
    assert torch.count_nonzero(sc.as_plain(y.grad)) == 0


def test_bad_functions_and_taken_names_are_refused():
    with pytest.raises(ConfigError, match="is there"):
        sc.custom_scale(square_gate, forward, name="test_gate")
    with pytest.raises(ConfigError, match="fixed positions"):
        sc.custom_scale(lambda *xs: xs[0], forward, name="test_star")
    with pytest.raises(ConfigError, match="identifier"):
        sc.custom_scale(square_gate, forward, name="not a name")


def test_a_rule_is_registered_once_and_for_an_overload():
    with pytest.raises(ConfigError, match="has a rule already"):
        sc.rule(torch.ops.aten.tanh.default)(lambda x: x)
    with pytest.raises(ConfigError, match="one overload"):
        sc.rule(torch.ops.aten.tanh)(lambda x: x)
