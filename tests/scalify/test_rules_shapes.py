"""Shapes, dtypes and scales drawn at random: the value is right and the result keeps the operator's dtype and shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import op_named
from torch import Tensor

import isoscale.scalify  # noqa: F401  fills the table
from isoscale.scalify import registry
from isoscale.scalify.pair import Pair, value

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PRECISION = {torch.float16: 8e-3, torch.bfloat16: 6e-2, torch.float32: 1e-5, torch.float64: 1e-11}
EXPONENTS = st.integers(-40, 40)
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
Draw = Callable[..., Pair]
Build = Callable[[Draw, Any], tuple[Any, ...]]

CASES: dict[str, Build] = {
    "add.Tensor": lambda d, s: (d(s), d(s)), "sub.Tensor": lambda d, s: (d(s), d((s[-1],))), "mul.Tensor": lambda d, s: (d(s), d(s)),
    "maximum": lambda d, s: (d(s), d(s)), "where.self": lambda d, s: (torch.ones(s).bool().tril() if len(s) > 1 else torch.tensor(True), d(s), d(s)),
    "sum.dim_IntList": lambda d, s: (d(s), [-1]), "mean.dim": lambda d, s: (d(s), [0], True), "mm": lambda d, s: (d((s[0], s[-1])), d((s[-1], s[0]))),
    "addmm": lambda d, s: (d((s[0],)), d((3, s[-1])), d((s[-1], s[0]))), "bmm": lambda d, s: (d((2, s[0], s[-1])), d((2, s[-1], 3))),
    "cat": lambda d, s: ([d(s), d(s), d(s)], -1), "lerp.Scalar": lambda d, s: (d(s), d(s), 0.25), "amax": lambda d, s: (d(s), [-1]),
    "addcmul": lambda d, s: (d(s), d(s), d(s)), "relu": lambda d, s: (d(s),), "linalg_vector_norm": lambda d, s: (d(s), 2, [0]),
    "cumsum": lambda d, s: (d(s), -1), "_to_copy": lambda d, s: (d(s),), "native_layer_norm": lambda d, s: (d((5, 8)), [8], d((8,)), d((8,)), 0.0),
}  # fmt: skip


def error(want: Tensor, found: Tensor) -> float:
    return float((want - found).abs().max() / want.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(shape=SHAPES, exponents=st.lists(EXPONENTS, min_size=3, max_size=3), tensors=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_dtype_and_scale(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], exponents: list[int], tensors: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Pair] = []

    def draw(size: tuple[int, ...]) -> Pair:
        scale = 2.0 ** exponents[len(drawn) % 3]
        data = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        drawn.append(Pair(data, torch.tensor(scale) if tensors else scale))
        return drawn[-1]

    args = CASES[name](draw, shape)

    def replaced(x: Any, change: Callable[[Pair], Tensor]) -> Any:
        if isinstance(x, list):
            return [replaced(part, change) for part in x]
        return change(x) if isinstance(x, Pair) else x

    op = op_named(name)
    want = op(*(replaced(a, lambda p: p.data.double() * float(p.scale)) for a in args))
    shape_and_dtype = op(*(replaced(a, lambda p: p.data) for a in args))
    found = registry.TABLE[op].function(*args)
    want, found, meta = (x[0] if isinstance(x, tuple) else x for x in (want, found, shape_and_dtype))
    assert found.data.shape == meta.shape
    assert found.data.dtype == meta.dtype
    assert error(want, value(Pair(found.data.double(), found.scale))) <= PRECISION[dtype]


def test_control_the_precision_is_tight() -> None:
    """A result that is off by the last two digits of fp16 fails."""
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(x, (x * 1.01)) > PRECISION[torch.float16]


def test_mixed_dtypes_promote_as_in_torch() -> None:
    """Half weights, float32 moments: an optimiser's products."""
    a, b = Pair(torch.randn(4).half(), torch.tensor(2.0)), Pair(torch.randn(4), torch.tensor(4.0))
    for name, args in {"add.Tensor": (a, b), "mul.Tensor": (a, b), "addcdiv": (a, b, b), "addcmul": (b, a, b), "where.self": (torch.ones(4).bool(), a, b)}.items():
        row = registry.TABLE[op_named(name)]
        assert row.function(*args).data.dtype == torch.float32
