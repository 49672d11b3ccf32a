"""Every row of the rule table: its value is the operator's, its scale a power of two, its data near unit RMS."""

from __future__ import annotations

import math
from typing import Any

import pytest
import rule_cases_basic  # noqa: F401
import rule_cases_nn  # noqa: F401
import torch
from rule_cases import CASES, Caller, Case, Inputs
from torch import Tensor

from isoscale.scalify import registry
from isoscale.scalify.pair import Pair, value
from isoscale.scalify.rules import attention

ALL = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
BANDED = pytest.mark.parametrize("case", [c for c in CASES.values() if c.band], ids=lambda case: case.name)
# Operators whose kernels this machine lacks, or that need a second library; each has its own test.
ELSEWHERE = {
    "aten.mkldnn_rnn_layer.default", "aten.mkldnn_rnn_layer_backward.default", "prims.fma.default",
    "aten._transformer_encoder_layer_fwd.default", "aten._native_multi_head_attention.default",
} | {
    f"aten.{kernel}{tail}.default" for kernel in attention.KERNELS[1:] for tail in ("", "_backward")
}
RANDOM = ("rand_like", "randn_like", "bernoulli", "multinomial", "empty", "uniform", "normal", "dropout")


def run(case: Case, **inputs: Any) -> list[Any]:
    g = Inputs(span=case.span, **inputs)
    torch.manual_seed(5)
    out = case.run(Caller(g.pairs, []), g)
    return list(out) if isinstance(out, (tuple, list)) else [out]


def plain(x: Any) -> Any:
    if isinstance(x, Pair):
        return value(Pair(x.data.double(), x.scale))
    return x


def error(want: Any, found: Any) -> float:
    """The largest difference over the largest element; infinities and NaN must be in the same places."""
    if want is None or (isinstance(want, Tensor) and want.numel() == 0):
        return 0.0
    if not isinstance(want, Tensor):
        assert want == found or math.isclose(float(want), float(found), rel_tol=1e-9)
        return 0.0
    assert want.shape == found.shape
    if not want.is_floating_point():
        assert torch.equal(want, found)
        return 0.0
    want, found = want.double(), found.double()
    fine = torch.isfinite(want)
    assert torch.equal(want.nan_to_num(0, 1, -1)[~fine], found.nan_to_num(0, 1, -1)[~fine])
    if not fine.any():
        return 0.0
    return float((want - found)[fine].abs().max() / want[fine].abs().max().clamp(min=1e-300))


def pairs_of(case: Case, found: list[Any]) -> list[Pair]:
    chosen = found if case.outputs is None else [found[i] for i in case.outputs]
    return [x for x in chosen if isinstance(x, Pair)]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@ALL
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_the_value_is_the_operators_in_float64(case: Case, tensors: bool) -> None:
    if any(name in case.name for name in ("empty_like", "new_empty")):
        assert all(x.scale == 0 for x in run(case, pairs=True, tensors=tensors))
        return
    for seed in range(3):
        want = run(case, seed=seed)
        found = run(case, seed=seed, pairs=True, tensors=tensors)
        assert len(found) >= len(want)
        for i, (a, b) in enumerate(zip(want, found)):
            assert error(a, plain(b)) <= case.tolerance, f"output {i}, seed {seed}"


@ALL
def test_tensor_and_number_scales_are_the_same_powers_of_two(case: Case) -> None:
    numbers, tensors = run(case, pairs=True, seed=4), run(case, pairs=True, tensors=True, seed=4)
    for a, b in zip(pairs_of(case, numbers), pairs_of(case, tensors)):
        for scale in (float(a.scale), float(b.scale)):
            assert scale == 0 or math.frexp(scale)[0] == 0.5
        if case.late or "empty" in case.name:
            continue
        assert float(a.scale) == float(b.scale)
        assert not isinstance(a.scale, Tensor), "a number became a tensor"
        torch.testing.assert_close(a.data, b.data, rtol=1e-12, atol=0, equal_nan=True)


@BANDED
def test_data_are_near_unit_rms(case: Case) -> None:
    assert case.band is not None
    for correlated, (low, high) in ((False, case.band), (True, case.wide)):
        for exponent in case.exponents:
            found = run(case, pairs=True, tensors=True, n=32, correlated=correlated, exponent=exponent)
            for pair in pairs_of(case, found):
                measured = rms(pair.data)
                assert low <= measured <= high, f"correlated={correlated}, 2^{exponent}: {measured:.3g}"


@pytest.mark.parametrize("name", ["mm", "sum.dim_IntList", "native_layer_norm:affine", "mul.Tensor", "gelu", "convolution:2d"])
def test_a_wrong_scale_leaves_the_band(name: str) -> None:
    """Control: the same value under a scale that is off by 2^6."""
    case = CASES[name]
    assert case.band is not None
    pair = pairs_of(case, run(case, pairs=True, n=32, exponent=0))[0]
    low, high = case.band
    assert low <= rms(pair.data) <= high
    for factor in (2.0**-6, 2.0**6):
        assert not low <= rms(pair.data * factor) <= high


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.half], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_data_are_fine_where_half_values_are_not(case: Case, dtype: torch.dtype) -> None:
    """Values from 2^-30 to 2^30 where the mathematics permits: finite, and right to the precision of the data."""
    bound = {torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    for exponent in (-30, 30):
        want = run(case, exponent=exponent, dtype=dtype)
        found = run(case, exponent=exponent, dtype=dtype, pairs=True, tensors=True)
        if any(name in case.name for name in RANDOM):
            assert found
            continue
        for i, (a, b) in enumerate(zip(want, found)):
            if not isinstance(b, Pair):
                continue
            assert b.data.dtype in (dtype, torch.float32, torch.float64)
            assert error(a, plain(b)) <= bound, f"output {i}, 2^{exponent}"


@pytest.mark.parametrize("name", ["add.Tensor", "mm", "sum", "native_layer_norm:none", "mul.Tensor", "convolution:2d"])
def test_plain_fp16_fails_there(name: str) -> None:
    """Control: the same operators on fp16 values."""
    case = CASES[name]
    failed = 0
    for exponent in (-30, 30):
        want = run(case, exponent=exponent, dtype=torch.float16)[0]
        try:
            found = run(case, exponent=exponent, dtype=torch.float16, plain_dtype=torch.float16)[0]
        except RuntimeError:
            continue
        wrong = (want - found.double()).abs().max() / want.abs().max()
        failed += not bool(torch.isfinite(found).all()) or float(wrong) > 0.5
    assert failed


def shipped() -> dict[Any, Any]:
    """The rows of the rule files; steering operators and what other tests registered have tests of their own."""
    return {op: row for op, row in registry.TABLE.items() if row.function.__module__.startswith("isoscale.scalify.rules")}


def test_every_row_has_a_case() -> None:
    called: list[Any] = []
    for case in CASES.values():
        g = Inputs(span=case.span, pairs=True)
        case.run(Caller(True, called), g)
    seen = {str(op) for op in called}
    missing = {str(op) for op in shipped()} - seen - ELSEWHERE
    assert not missing, f"no case for {sorted(missing)}"


def test_every_rule_says_its_formula() -> None:
    for op, row in shipped().items():
        if op.namespace == "isoscale":
            continue
        first = row.formula
        assert first.startswith(("s = ", "plain", "any scale")), f"{op}: {first}"
        stated = "ssumes" in (row.function.__doc__ or "") or ":" in first or first == "s = 1" or "nearest power of two" in first
        assert row.kind == "layout" or stated or first.startswith(("plain", "any")), f"{op} states no assumption"
