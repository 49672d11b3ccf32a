"""torch.func and torch.compile work on every op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_claims import OPS, n
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from isoscale.nn import functional as F

NAMES = list(OPS)
# torch's CPU attention kernel has no batching rule and says so; the result is right.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def doubles(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    fn, make = OPS[name]
    return fn, [x.double() for x in make()]


@pytest.mark.parametrize("name", NAMES)
def test_grad_equals_backward(name: str) -> None:
    fn, inputs = doubles(name)
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = torch.autograd.grad(fn(*leaves).sin().sum(), leaves)
    got = torch.func.grad(lambda *a: fn(*a).sin().sum(), argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_jvp_is_the_derivative_of_the_forward(name: str) -> None:
    fn, inputs = doubles(name)
    tangents = [torch.randn_like(x) for x in inputs]
    out, moved = torch.func.jvp(fn, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(out, fn(*inputs))
    step = 1e-6
    ahead = fn(*(x + step * t for x, t in zip(inputs, tangents)))
    behind = fn(*(x - step * t for x, t in zip(inputs, tangents)))
    torch.testing.assert_close(moved, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_a_loop(name: str) -> None:
    fn, inputs = doubles(name)
    batch = [torch.stack([x, x.flip(0), 2 * x]) for x in inputs]
    want = torch.stack([fn(*row) for row in zip(*batch)])
    torch.testing.assert_close(torch.vmap(fn)(*batch), want)


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients(name: str) -> None:
    """vmap over grad, the whole point of torch.func for most users."""
    fn, inputs = doubles(name)
    batch = [torch.stack([x, x.flip(0)]) for x in inputs]
    every = torch.func.grad(lambda *a: fn(*a).sin().sum(), argnums=tuple(range(len(inputs))))
    want = [torch.stack(g) for g in zip(*(every(*row) for row in zip(*batch)))]
    for got, expected in zip(torch.vmap(every)(*batch), want):
        torch.testing.assert_close(got, expected)


def compiled(fn: Callable[..., Tensor], dynamic: bool | None) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=counter), counter


def check_equal(fast: Callable[..., Tensor], fn: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    results = []
    for call in (fast, fn):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = call(*leaves)
        results.append((out.detach(), torch.autograd.grad(out.sin().sum(), leaves)))
    (out, grads), (want, want_grads) = results
    torch.testing.assert_close(out, want)
    for grad, want_grad in zip(grads, want_grads):
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name: str) -> None:
    fn, make = OPS[name]
    fast, counter = compiled(fn, False)
    check_equal(fast, fn, make())
    assert counter.frame_count == 1


GROWING: dict[str, tuple[Callable[..., Tensor], Callable[[int, int], list[Tensor]]]] = {
    "linear": (F.linear, lambda b, t: [n(b, t, 8), n(6, 8)]),
    "matmul": (lambda x, y: F.matmul(x, y, None), lambda b, t: [n(b, t, 8), n(b, 8, t)]),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1, constraint=None), lambda b, t: [n(b, 4, t), n(6, 4, 3)]),
    "softmax": (lambda x: F.softmax(x, -1, constraint=None, mult=2.0), lambda b, t: [n(b, 3, t)]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda b, t: [n(b, 2, t, 8) for _ in range(3)],
    ),
    "rms_norm": (lambda x, w: F.rms_norm(x, 8, w), lambda b, t: [n(b, t, 8), n(8)]),
    "layer_norm": (lambda x, w: F.layer_norm(x, 8, w), lambda b, t: [n(b, t, 8), n(8)]),
    "add": (lambda x, y: F.add(x, y, None), lambda b, t: [n(b, t, 8), n(8)]),
    "embedding": (
        lambda x, w: F.embedding((x > 0).long(), w).sum(-1) * x,
        lambda b, t: [n(b, t), n(7, 8)],
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, x.detach().argmin(-1)), lambda b, t: [n(b, t, 8)]),
    "mse_loss": (F.mse_loss, lambda b, t: [n(b, t), n(b, t)]),
}


@pytest.mark.parametrize("name", list(GROWING))
@pytest.mark.parametrize(("dynamic", "more"), [(True, 0), (None, 1)])
def test_new_sizes_do_not_recompile(name: str, dynamic: bool | None, more: int) -> None:
    """None when told, one when Dynamo finds out by itself: the factors follow the sizes inside the graph.

    No two sizes coincide, as Dynamo would take them for one size and specialise on that. The first call may trace
    twice (Dynamo restarts to turn float arguments into tensors), so later calls are what is counted.
    """
    fn, make = GROWING[name]
    fast, counter = compiled(fn, dynamic)
    check_equal(fast, fn, make(21, 10))
    first = counter.frame_count
    for batch, length in ((22, 13), (25, 17), (27, 31)):
        check_equal(fast, fn, make(batch, length))
    assert counter.frame_count <= first + more


def test_a_factor_baked_into_the_graph_does_recompile() -> None:
    """The control: what a factor from math.log of a size does."""
    fast, counter = compiled(lambda x: x * math.log(x.shape[0]), True)
    fast(n(21, 2))
    first = counter.frame_count
    for batch in (22, 25, 27):
        fast(n(batch, 2))
    assert counter.frame_count > first + 1
