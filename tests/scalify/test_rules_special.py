"""Zeros and infinities under any scale, NaN, masks, empty tensors, single numbers."""

from __future__ import annotations

from typing import Any

import pytest
import rule_cases_basic  # noqa: F401
import rule_cases_nn  # noqa: F401
import torch
from rule_cases import CASES, Caller, Case, Inputs, op_named
from torch import Tensor

from isoscale.scalify import registry
from isoscale.scalify.pair import Pair, value

INF, NAN = float("inf"), float("nan")


def rule(name: str, *args: Any, **kwargs: Any) -> Any:
    row = registry.TABLE[op_named(name)]
    return row.function(*args, **kwargs)


def run(case: Case, pairs: bool, special: str) -> list[Any]:
    torch.manual_seed(5)
    out = case.run(Caller(pairs, []), Inputs(span=case.span, pairs=pairs, tensors=True, special=special))
    return list(out) if isinstance(out, (tuple, list)) else [out]


def plain(x: Any) -> Any:
    return value(x) if isinstance(x, Pair) else x


@pytest.mark.parametrize("special", ["zeros", "any", "some"])
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_special_values_are_the_operators(case: Case, special: str) -> None:
    if "empty" in case.name:
        return
    try:
        want = run(case, False, special)
    except RuntimeError:
        return  # the operator itself refuses
    found = run(case, True, special)
    for i, (a, b) in enumerate(zip(want, found)):
        if not isinstance(a, Tensor) or a.numel() == 0:
            continue
        b = plain(b)
        if special != "zeros" and any(name in case.name for name in ("norm", "nan_to_num")):
            # inf - inf or inf: torch's kernels differ among themselves; nan_to_num fills with the data's largest
            assert torch.equal(torch.isfinite(b), torch.isfinite(a)) or special == "any"
            continue
        scale = a[torch.isfinite(a)].abs().max() if a.is_floating_point() and torch.isfinite(a).any() else 0.0
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10 * float(scale), equal_nan=True, msg=lambda m: f"output {i}: {m}", check_dtype=False)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_any_scale_adopts_the_others(tensors: bool) -> None:
    def pair(x: float, scale: float) -> Pair:
        return Pair(torch.full((3,), x), torch.tensor(scale) if tensors else scale)

    zeros, x = pair(0.0, 0.0), pair(1.5, 2.0**-20)
    for out in (
        rule("add.Tensor", zeros, x), rule("add.Tensor", x, zeros), rule("maximum", x, zeros), rule("lerp.Scalar", zeros, x, 0.1),
        rule("where.self", torch.tensor([True, False, True]), x, zeros), rule("cat", [zeros, x]), rule("add.Tensor", x, 0.0),
        rule("masked_fill.Scalar", x, torch.tensor([True, False, True]), -INF), rule("add.Tensor", x, INF),
    ):  # fmt: skip
        assert float(out.scale) == 2.0**-20
    assert float(rule("add.Tensor", zeros, zeros).scale) == 0
    assert float(rule("mul.Tensor", zeros, x).scale) == 0
    for name, want in {"exp": 1.0, "cos": 1.0, "sigmoid": 0.5}.items():
        out = rule(name, zeros)
        assert float(out.scale) != 0
        assert float(value(out)[0]) == want


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fill", [-INF, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("exponent", [-20, 0, 2])
def test_a_masks_constant_leaves_the_scores_alone(dtype: torch.dtype, fill: float, exponent: int) -> None:
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.triu(torch.ones(4, 6), 2).bool()
    masked = rule("masked_fill.Scalar", Pair(scores, torch.tensor(2.0**exponent)), mask, fill)
    least = -20 if fill == -INF else -5  # a finite mask of 1024 stays below fp16's top
    assert float(masked.scale) == 2.0 ** max(exponent, least)
    kept = (scores.float() * 2.0 ** min(0, exponent - least))[~mask].to(dtype)
    assert torch.equal(masked.data[~mask], kept)
    found = value(rule("_softmax", masked, 1, False), torch.float32)
    want = torch.softmax((scores.float() * 2.0**exponent).masked_fill(mask, -INF), 1)
    torch.testing.assert_close(found, want, rtol=2e-3, atol=1e-6)


def test_a_constant_of_like_size_is_a_value() -> None:
    """Control for the above: 8 beside data under 1/8 raises the scale."""
    out = rule("masked_fill.Scalar", Pair(torch.ones(2), 2.0**-3), torch.tensor([True, False]), 8.0)
    assert out.scale == 8.0
    assert value(out).tolist() == [8.0, 2.0**-3]


def test_rows_that_are_masked_whole() -> None:
    x = Pair(torch.full((2, 3), -INF), 4.0)
    assert torch.isnan(rule("_softmax", x, 1, False).data).all()
    assert torch.equal(rule("_safe_softmax", x, 1).data, torch.zeros(2, 3))


EMPTY = {
    "add.Tensor": lambda e: (e, e), "mul.Tensor": lambda e: (e, 2.0), "sum": lambda e: (e,), "exp": lambda e: (e,), "gelu": lambda e: (e,),
    "mm": lambda e: (e, Pair(torch.zeros(4, 3), 2.0)), "_softmax": lambda e: (e, 1, False), "sum.dim_IntList": lambda e: (e, [0]),
    "native_layer_norm": lambda e: (e, [4], None, None, 1e-5), "cat": lambda e: ([e, e],), "prod": lambda e: (e,), "eq.Scalar": lambda e: (e, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(name: str) -> None:
    found = rule(name, *EMPTY[name](Pair(torch.zeros(0, 4), 2.0)))
    values = [
        x.data if isinstance(x, Pair) else [e.data if isinstance(e, Pair) else e for e in x] if isinstance(x, list) else x
        for x in EMPTY[name](Pair(torch.zeros(0, 4), 2.0))
    ]
    want = op_named(name)(*values)
    found, want = (x[0] if isinstance(x, tuple) else x for x in (found, want))
    torch.testing.assert_close(plain(found), want)


def test_an_empty_part_has_no_say_in_the_scale() -> None:
    out = rule("cat", [torch.zeros(0), Pair(torch.ones(3), 2.0**-9)])
    assert out.scale == 2.0**-9


@pytest.mark.parametrize("name", ["add.Tensor", "mul.Tensor", "div.Tensor", "maximum"])
def test_single_numbers_keep_their_dtype(name: str) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = Pair(torch.tensor(1.5, dtype=dtype), torch.tensor(2.0**-20))
        for other in (x, 0.3, torch.tensor(0.25, dtype=dtype)):
            if name == "maximum" and other == 0.3:
                continue
            out = rule(name, x, other)
            assert out.data.dtype == dtype
            want = op_named(name)(value(x, torch.float64), value(other, torch.float64) if isinstance(other, Pair) else torch.as_tensor(other, dtype=torch.float64))
            torch.testing.assert_close(value(out, torch.float64), want, rtol=2e-3, atol=0)


def test_running_statistics_are_moved_under_their_own_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = Pair(torch.randn(8, 4, 5, generator=generator), torch.tensor(2.0**-15))
    mean, var = Pair(torch.zeros(4), torch.tensor(0.0)), Pair(torch.ones(4), torch.tensor(1.0))
    plain_mean, plain_var = torch.zeros(4), torch.ones(4)
    for _ in range(3):
        rule("native_batch_norm", x, None, None, mean, var, True, 0.1, 1e-5)
        torch.native_batch_norm(value(x), None, None, plain_mean, plain_var, True, 0.1, 1e-5)
    torch.testing.assert_close(value(mean), plain_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(value(var), plain_var)
    assert float(mean.scale) == 2.0**-15


def test_random_numbers_written_into_a_part_keep_its_scale() -> None:
    scale = torch.tensor(8.0)
    whole = torch.zeros(4, 2)
    rule("bernoulli_.float", Pair(whole[1], scale), 0.5)
    assert float(scale) == 8.0
    assert set((whole[1] * 8).tolist()) <= {0.0, 1.0}
    assert torch.equal(whole[0], torch.zeros(2))
