"""The estimate of the RMS from block maxima: constants, bias and spread, bounds, rows that no Gaussian ever drew."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.formats import BlockFormat, by_name
from isoscale.nn import mxnorm_bound, mxnorm_constant
from isoscale.nn.mxnorm_estimate import Estimator, block_weights, reciprocal, rounded_table, rounding_cut

# arXiv 2603.13180's constants by sampling have four digits; six come from the integrals.
TABLE = {16: (0.481416, 0.468834), 32: (0.426061, 0.418505), 64: (0.385192, 0.380311), 128: (0.353662, 0.350322)}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def true_rms(x: Tensor) -> Tensor:
    return x.double().square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("block", "p"), [(block, p) for block in TABLE for p in (1, 2)])
def test_constants_have_six_digits(block: int, p: int) -> None:
    assert mxnorm_constant(p, block) == pytest.approx(TABLE[block][p - 1], abs=5e-7)


@pytest.mark.parametrize("block", [1, 2, 3, 17, 100, 1000, 10**6])
def test_constants_of_any_block_are_the_integrals(block: int) -> None:
    def tail(t: float) -> float:
        return -math.expm1(block * math.log1p(-special.erfc(t / math.sqrt(2)))) if t > 0 else 1.0

    for p, weight in ((1, lambda t: 1.0), (2, lambda t: 2 * t)):
        want = sum(integrate.quad(lambda t, w=weight: w(t) * tail(t), a, a + 2, epsabs=1e-13)[0] for a in range(0, 40, 2))
        assert mxnorm_constant(p, block) == pytest.approx(want ** (-1 / p), rel=1e-10)


def test_constants_of_one_element_are_known() -> None:
    assert mxnorm_constant(1, 1) == pytest.approx(math.sqrt(math.pi / 2), rel=1e-12)
    assert mxnorm_constant(2, 1) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("blocks", [32, 128])
def test_gaussian_rows_are_estimated_without_bias(p: int, blocks: int) -> None:
    x = torch.randn(20000, 32 * blocks, generator=draw())[: 4000 * 128 // blocks]
    ratio = Estimator(32 * blocks, 32, p, eps=0.0).rms(x).double() / true_rms(x)
    spread = 0.154 / math.sqrt(blocks)
    assert abs(float(ratio.mean()) - 1) < 2e-3
    assert float(ratio.std()) == pytest.approx(spread, rel=0.12)
    wrong = float(ratio.mean()) * mxnorm_constant(p, 16) / mxnorm_constant(p, 32)  # control: the constant of NVFP4
    assert abs(wrong - 1) > 0.1


def laplace(shape: tuple[int, int]) -> Tensor:
    u = torch.rand(shape, generator=draw(), dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs())).float()


def student(shape: tuple[int, int]) -> Tensor:
    chi = torch.randn(*shape, 4, generator=draw(1)).square().sum(-1)
    return torch.randn(shape, generator=draw(2)) / (chi / 4).sqrt()


def outlier(shape: tuple[int, int]) -> Tensor:
    x = torch.randn(shape, generator=draw(3))
    x[:, 5] = 50.0
    return x


@pytest.mark.parametrize(
    ("rows", "p", "mean", "sd"),
    [(laplace, 1, 1.223, 0.021), (laplace, 2, 1.258, 0.025), (student, 1, 1.252, 0.029), (student, 2, 1.361, 0.068),
     (outlier, 1, 0.913, 0.011), (outlier, 2, 1.656, 0.009)],
)  # fmt: skip
def test_other_shapes_are_biased_as_known(rows: Callable[..., Tensor], p: int, mean: float, sd: float) -> None:
    x = rows((1000, 4096))
    ratio = Estimator(4096, 32, p, eps=0.0).rms(x).double() / true_rms(x)
    assert float(ratio.mean()) == pytest.approx(mean, abs=0.006)
    assert float(ratio.std()) == pytest.approx(sd, rel=0.3)


def test_bounds_of_the_output() -> None:
    assert mxnorm_bound(2, 32, 4096) == pytest.approx(27.03, abs=0.01)
    assert mxnorm_bound(1, 32, 4096) == pytest.approx(300.4, abs=0.1)
    for p in (1, 2):
        row = torch.zeros(1, 4096)
        row[0, 1234] = -3.7
        reached = Estimator(4096, 32, p, eps=0.0)
        out = reached.normed(row, reached.rms(row))
        assert float(out.abs().max()) == pytest.approx(mxnorm_bound(p, 32, 4096), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 300), p=st.sampled_from([1, 2]), block=st.sampled_from([16, 32]), seed=st.integers(0, 999),
       power=st.sampled_from([1, 3, 9]))  # fmt: skip
def test_bounds_are_never_passed(dim: int, p: int, block: int, seed: int, power: int) -> None:
    x = torch.randn(8, dim, generator=draw(seed)) ** power  # ever heavier tails
    own = Estimator(dim, block, p, eps=0.0)
    assert float(own.normed(x, own.rms(x)).abs().max()) <= own.bound * (1 + 1e-6)


@pytest.mark.parametrize("dim", [40, 33, 63, 20, 5])
@pytest.mark.parametrize("p", [1, 2])
def test_a_short_last_block_biases_nothing(dim: int, p: int) -> None:
    x = torch.randn(200000, dim, generator=draw(), dtype=torch.float64)
    estimate = Estimator(dim, 32, p, eps=0.0).rms(x)
    mean = float((estimate**p).mean()) ** (1 / p)
    assert mean == pytest.approx(1.0, abs=4e-3)
    if dim in (33, 40):  # control: counted as a whole block, padded with zeros
        full = block_weights(p, 32, 64)[0]
        most = torch.nn.functional.pad(x.abs(), (0, 64 - dim)).view(-1, 2, 32).amax(-1)
        naive = float(((most**p).sum(-1) * full).mean()) ** (1 / p)
        assert abs(naive - 1) > 10 * abs(mean - 1)
        assert abs(naive - 1) > 0.02


def test_rows_of_zeros_stay_zero() -> None:
    for eps in (0.0, 1e-5):
        own = Estimator(64, 32, eps=eps)
        rms = own.rms(torch.zeros(3, 64))
        assert rms.eq(eps).all()
        assert own.normed(torch.zeros(3, 64), rms).eq(0).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("estimate", ["raw", "rounded"])
def test_a_row_with_an_inf_or_a_nan_is_all_nan(bad: float, estimate: str) -> None:
    x = torch.randn(2, 64, generator=draw())
    x[0, 40] = bad
    own = Estimator(64, 32, 1, estimate=estimate)
    rms = own.rms(x)
    out = own.normed(x, rms)
    assert rms[0].isnan().all()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("log2", [-148, -140, -126, -80, 60, 100, 125])
def test_no_finite_row_over_or_underflows(p: int, log2: int) -> None:
    x = torch.randn(64, 96, generator=draw()).clamp(-3.9, 3.9)
    plain, own = x, Estimator(96, 32, p, eps=0.0)
    scaled = (plain.double() * 2.0**log2).float()
    tolerance = 2.0 ** max(-20, -148 - log2) if log2 < -120 else 1e-6  # subnormal rows have few bits
    torch.testing.assert_close(
        own.rms(scaled).double() / 2.0**log2, own.rms(plain).double(), rtol=4 * tolerance, atol=4 * tolerance
    )
    assert own.normed(scaled, own.rms(scaled)).isfinite().all()
    if log2 >= 100 and p == 2:  # control: squares overflow
        assert scaled.square().mean(-1).isinf().any()


def test_float16_rows_that_would_overflow_their_squares() -> None:
    x = (torch.randn(16, 128, generator=draw()) * 15000).clamp(-65504, 65504).half()
    assert x.square().mean(-1).isinf().any()
    rms = Estimator(128, 32, 2).rms(x)
    assert rms.dtype == torch.float32
    torch.testing.assert_close(rms.double(), true_rms(x), rtol=0.3, atol=0)


def test_a_tiny_estimate_has_a_finite_reciprocal() -> None:
    assert reciprocal(torch.tensor([1e-45, 0.0, 2.0])).tolist() == [torch.finfo(torch.float32).max, 0.0, 0.5]


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxfp6_e2m3"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("p", [1, 2])
def test_the_rounded_estimate_is_right_on_average(name: str, rule: str, p: int) -> None:
    fmt = by_name(f"{name}/{rule}")
    assert isinstance(fmt, BlockFormat)
    cut = rounding_cut(fmt)
    scale = torch.exp2(torch.rand(2000, 1, generator=draw(5)) * 8 - 4)
    x = torch.randn(2000, 1024, generator=draw()) * scale
    ratio = Estimator(1024, 32, p, 0.0, estimate="rounded", cut=cut).rms(x).double() / true_rms(x)
    assert abs(float(ratio.mean()) - 1) < 6e-3
    rounded = torch.exp2(torch.log2(x.view(2000, -1, 32).abs().amax(-1) / cut).floor()).double()
    plain = (rounded**p).mean(-1, keepdim=True) ** (1 / p) * mxnorm_constant(p, 32)  # control: no table
    assert abs(float((plain / true_rms(x)).mean()) - 1) > 0.012
    raw = Estimator(1024, 32, p, 0.0).rms(x).double() / true_rms(x)
    assert float(ratio.std()) > 1.5 * float(raw.std())


def test_the_cut_is_where_the_format_rounds() -> None:
    from isoscale.formats import encode

    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3"):
        for rule in ("floor", "ceil", "even", "rceil"):
            fmt = by_name(f"{name}/{rule}")
            assert isinstance(fmt, BlockFormat)
            cut = rounding_cut(fmt)
            below, above = cut * 2 * (1 - 1e-4), cut * 2 * (1 + 1e-4)
            codes = [int(encode(torch.full((1, 32), value), fmt).scales[0, 0]) for value in (below, above)]  # type: ignore[index]
            assert codes[1] == codes[0] + 1, (name, rule)


def test_why_the_rounded_estimate_is_unstable() -> None:
    """Blocks of like maxima, as a dominant feature in every block makes them: the estimate jumps by an octave."""
    steps = torch.linspace(0, 1, 257)[:-1].exp2()[:, None]
    row = torch.randn(1, 1024, generator=draw()).clamp(-2, 2)
    row[0, ::32] = 4.0  # the maximum of every block
    moved = row * steps
    raw = Estimator(1024, 32, 1, 0.0).rms(moved) / steps
    rounded = Estimator(1024, 32, 1, 0.0, estimate="rounded").rms(moved) / steps
    assert float(raw.max() / raw.min()) < 1 + 1e-5
    assert float(rounded.max() / rounded.min()) > 1.5
    near = torch.cat([row * (1 - 1e-6), row * (1 + 1e-6)])
    low, high = Estimator(1024, 32, 1, 0.0, estimate="rounded").rms(near)[:, 0].tolist()
    assert high / low > 1.5


def test_the_rounded_table_repeats_with_every_octave() -> None:
    table = rounded_table(1, 32, 1.0)
    assert len(table) == 256
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(table, (*table[1:], table[0])))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"dim": 64, "block": 32, "p": 3}, "p = 1"), ({"dim": 0, "block": 32}, "feature"), ({"dim": 64, "block": 0}, "element"),
     ({"dim": 64, "block": 32, "eps": -1.0}, "eps"), ({"dim": 64, "block": 32, "eps": math.nan}, "eps"),
     ({"dim": 64, "block": 32, "clamp": 0.0}, "clamp"), ({"dim": 64, "block": 32, "estimate": "rouded"}, "rounded"),
     ({"dim": 65, "block": 32, "estimate": "rounded"}, "whole blocks")],
)  # fmt: skip
def test_bad_settings_are_refused(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Estimator(**arguments)  # type: ignore[arg-type]


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="another size"):
        Estimator(64, 32).rms(torch.zeros(2, 96))
    with pytest.raises(ConfigError, match="power-of-two"):
        rounding_cut(by_name("nvfp4"))  # type: ignore[arg-type]
