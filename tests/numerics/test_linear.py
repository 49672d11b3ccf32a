"""`numerics.matmul` beside torch.matmul: shapes, derivatives, transforms, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap

from isoscale._base.errors import ConfigError
from isoscale.formats import fake_cast
from isoscale.formats.recipes import LayerFormats
from isoscale.numerics import Linear, matmul

SHAPES = [((5, 40), (40, 7)), ((2, 5, 40), (40, 7)), ((2, 5, 40), (2, 40, 7)), ((5, 40), (3, 40, 7)), ((40,), (40, 7)),
          ((5, 40), (40,)), ((40,), (40,)), ((2, 1, 5, 40), (3, 40, 7)), ((0, 40), (40, 7)), ((5, 0), (0, 7))]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_shapes_and_values_are_those_of_torch_matmul_of_the_casts(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(left, generator=draw), torch.randn(right, generator=draw)
    ours = matmul(a, b, "mxfp8_e4m3")
    axis = 0 if b.dim() == 1 else -2
    theirs = torch.matmul(fake_cast(a, "mxfp8_e4m3"), fake_cast(b, "mxfp8_e4m3", axis=axis))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_uncast_derivatives_are_those_of_torch_matmul(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = (torch.randn(s, requires_grad=True) for s in (left, right))
    ours, theirs = matmul(a, b, LayerFormats()), torch.matmul(a, b)
    weights = torch.randn_like(theirs)
    for mine, its in zip(torch.autograd.grad(ours, (a, b), weights), torch.autograd.grad(theirs, (a, b), weights)):
        assert mine.shape == its.shape
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_batched_gradients_are_cast_along_their_own_contraction() -> None:
    """dA: blocks along n. dB: along m, which for a matrix B runs over the whole batch of A."""
    a, b, g = torch.randn(2, 24, 40), torch.randn(2, 40, 36), torch.randn(2, 24, 36)
    name = "mxfp4/rceil"

    def q(x: torch.Tensor, axis: int) -> torch.Tensor:
        return fake_cast(x, name, axis=axis)

    left, right = a.clone().requires_grad_(), b.clone().requires_grad_()
    da, db = torch.autograd.grad(matmul(left, right, name), (left, right), g)
    torch.testing.assert_close(da, q(g, -1) @ q(b, -1).mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(db, q(a, -2).mT @ q(g, -2), rtol=1e-5, atol=1e-5)
    matrix = b[0].clone().requires_grad_()
    (db,) = torch.autograd.grad(matmul(a, matrix, name), matrix, g)
    rows, tops = a.reshape(48, 40), g.reshape(48, 36)
    torch.testing.assert_close(db, q(rows, 0).t() @ q(tops, 0), rtol=1e-5, atol=1e-5)
    apart = sum(q(a[i], 0).t() @ q(g[i], 0) for i in range(2))
    assert not torch.allclose(db, apart, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["e4m3", "mxfp8_e4m3", "nvfp4", "fp8_tensor_e4m3"])
def test_torch_func(name: str) -> None:
    """vmap of grad is a loop of grads; jvp is the straight-through derivative, and one of a linear map of the casts."""

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return matmul(a, b, name).square().sum()

    a, b = torch.randn(3, 8, 40), torch.randn(40, 20)
    many = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(a, b)
    for i in range(3):
        for found, wanted in zip((many[0][i], many[1][i]), grad(loss, argnums=(0, 1))(a[i], b)):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    da = torch.randn(8, 40)
    out, tangent = jvp(lambda x: matmul(x, b, name), (a[0],), (da,))
    assert torch.equal(out, matmul(a[0], b, name))
    torch.testing.assert_close(tangent, da @ fake_cast(b, name, axis=0), rtol=1e-5, atol=1e-4)


def test_compiles() -> None:
    """fullgraph, forward and backward."""
    torch._dynamo.reset()
    a, b = torch.randn(8, 40, requires_grad=True), torch.randn(40, 20, requires_grad=True)
    formats = LayerFormats("mxfp8_e4m3", "mxfp6_e3m2", "mxfp4/rceil")
    call = torch.compile(lambda x, y: matmul(x, y, formats), backend="aot_eager", fullgraph=True)
    ours, theirs = call(a, b), matmul(a, b, formats)
    torch.testing.assert_close(ours, theirs)
    for mine, its in zip(torch.autograd.grad(ours.sum(), (a, b)), torch.autograd.grad(theirs.sum(), (a, b))):
        torch.testing.assert_close(mine, its)


def test_linear_is_a_torch_linear_with_formats() -> None:
    layer = Linear(40, 20, formats="mxfp8_e4m3")
    assert isinstance(layer, torch.nn.Linear)
    x = torch.randn(2, 3, 40)
    wanted = fake_cast(x, "mxfp8_e4m3") @ fake_cast(layer.weight, "mxfp8_e4m3").t() + layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert "w mxfp8_e4m3/floor" in repr(layer)
    assert "emulated" in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wanted, rtol=0.05, atol=0.05)


def test_refusals() -> None:
    a = torch.randn(4, 8)
    with pytest.raises(ConfigError, match="cannot be multiplied"):
        matmul(a, a, "e4m3")
    with pytest.raises(ConfigError, match="one floating-point dtype"):
        matmul(a, a.t().double(), "e4m3")
    with pytest.raises(ConfigError, match="one floating-point dtype"):
        matmul(a.int(), a.t().int(), "e4m3")
    with pytest.raises(ConfigError) as caught:
        matmul(a, a.t(), "mxfp8_e4m4")
    assert "mxfp8_e4m3" in caught.value.hint
    with pytest.raises(ConfigError, match="at least one feature"):
        Linear(0, 4, formats="e4m3")
