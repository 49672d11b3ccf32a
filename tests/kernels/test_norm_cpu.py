"""The compiled norm kernels: r beside float64, and all bits behind it against the torch reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cast_oracle import same, spec_of
from norm_oracle import AMAX, check, divided, exact_rms, hard_rows, norm_spec, ulps

from isoscale import formats
from isoscale._base.errors import ConfigError
from isoscale.formats.block import BlockFormat
from isoscale.kernels import build, cpu_norm

pytestmark = pytest.mark.skipif(not cpu_norm.available(), reason=cpu_norm.why_not())
NAMES = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "fp8_1x128_e4m3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("floor", "ceil", "even", "rceil")


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are held against is torch alone."""
    monkeypatch.setenv("ISOSCALE_KERNELS", "off")


def block(name: str) -> BlockFormat:
    found = formats.by_name(name)
    assert isinstance(found, BlockFormat)
    return found


@pytest.mark.parametrize("width", [1, 7, 16, 32, 100, 256, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_every_format_dtype_and_width(name: str, width: int) -> None:
    for dtype in DTYPES:
        for kind in cpu_norm.KINDS:
            for eps in (0.0, 1e-5):
                norm = norm_spec(kind, width, block(name), eps)
                check(cpu_norm, hard_rows(width, dtype), block(name), norm)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxint8", "fp8_1x128_e4m3"])
def test_every_scale_rule(name: str, rule: str) -> None:
    fmt = block(name).with_(scale_rule=rule)
    for dtype in DTYPES[:2]:
        x = torch.cat([hard_rows(320, dtype, seed) for seed in range(6)])
        check(cpu_norm, x, fmt, norm_spec("mx2", 320, fmt, 0.0))


@pytest.mark.parametrize("cols", [1, 4, 8, 16, 24, 64, 0])
def test_other_blocks(cols: int) -> None:
    for name in ("mxfp8_e4m3", "mxfp6_e2m3", "nvfp4", "mxint8"):
        fmt = block(name).with_(block=(1, cols))
        x = hard_rows(192, torch.bfloat16)
        check(cpu_norm, x, fmt, norm_spec("mx2", 192, fmt))


@pytest.mark.parametrize("name", NAMES)
def test_clamp_residual_and_output_types(name: str) -> None:
    fmt = block(name)
    for dtype in DTYPES:
        x, other = hard_rows(160, dtype), hard_rows(160, dtype, 1).flip(0)
        check(cpu_norm, x, fmt, norm_spec("mx2", 160, fmt, clamp=1.5), out_dtypes=DTYPES)
        for kind in ("mx1", "rms"):
            check(cpu_norm, x, fmt, norm_spec(kind, 160, fmt), residual=other, limit=6, out_dtypes=DTYPES)


@pytest.mark.parametrize("name", NAMES)
def test_riding_casts_the_row_as_it_is(name: str) -> None:
    fmt = block(name)
    for dtype in DTYPES:
        for width in (33, 256, 5000):  # 5000: several pieces of a row
            x = hard_rows(width, dtype)
            rms = check(cpu_norm, x, fmt, norm_spec("mx2", width, fmt, ride=True), limit=6)
            plain = check(cpu_norm, x, fmt, norm_spec("mx2", width, fmt), limit=6)
            assert same(rms, plain)
    norm = norm_spec("mx1", 64, fmt, ride=True)
    check(cpu_norm, hard_rows(64, torch.bfloat16), fmt, norm, residual=hard_rows(64, torch.bfloat16, 2))


@pytest.mark.parametrize("blocks", [1, 2, 16, 17, 100, 512, 4099])
def test_the_estimate_is_within_4_ulp_whatever_the_width(blocks: int) -> None:
    fmt, width = block("mxfp8_e4m3"), 32 * blocks - 5
    g = torch.Generator().manual_seed(blocks)
    x = torch.randn(24, width, generator=g) * torch.exp2(torch.randint(-140, 120, (24, 1), generator=g).double()).float()
    x[:4] *= torch.exp2(torch.randint(-9, 3, (4, width), generator=g).double()).float()
    for kind, limit in (("mx2", 4), ("mx1", 4), ("rms", 8 if width < 1 << 14 else 16)):
        norm = norm_spec(kind, width, fmt, 0.0)
        got = cpu_norm.norm_fake(x, spec_of(fmt), norm).rms
        assert ulps(got, exact_rms(x, fmt, norm)) <= limit
        wrong = norm._replace(w_full=norm.w_full * 1.000001, w_last=norm.w_last * 1.000001)
        if kind != "rms":  # the control: a weight that is off by a millionth
            assert ulps(got, exact_rms(x, fmt, wrong)) > limit


def test_no_order_of_the_blocks_changes_the_estimate() -> None:
    """And the control: the sum of squares of RMSNorm does change."""
    fmt, g = block("mxfp8_e4m3"), torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=g) * torch.exp2(torch.randint(-6, 6, (64, 1024), generator=g).float())
    order = torch.cat([torch.randperm(31, generator=g), torch.tensor([31])])  # the last one has a weight of its own
    turned = x.view(64, 32, 32)[:, order].reshape(64, 1024)
    for kind, equal in (("mx2", True), ("mx1", True), ("rms", False)):
        norm = norm_spec(kind, 1024, fmt)
        a, b = (cpu_norm.norm_fake(rows, spec_of(fmt), norm).rms for rows in (x, turned))
        assert same(a, b) == equal


def test_another_order_of_operations_gives_other_bits() -> None:
    """A control: equal bits mean something. Dividing by r, or casting before the norm, is another function."""
    fmt, x = block("mxfp8_e4m3"), torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    norm = norm_spec("mx2", 512, fmt)
    got = cpu_norm.norm_fake(x, spec_of(fmt), norm)
    assert same(got.values, formats.fake_cast(divided(x, got.rms, norm), fmt))
    assert not same(got.values, formats.fake_cast(x / (got.rms * (1 + 2.0**-10))[:, None], fmt))
    assert not same(got.values, formats.fake_cast(x, fmt) / got.rms[:, None])
    assert not same(got.values, formats.fake_cast(divided(x, got.rms, norm).bfloat16(), fmt).float())
    other = cpu_norm.norm_fake(x, spec_of(fmt), norm._replace(w_full=norm.w_full * 1.01, w_last=norm.w_last * 1.01))
    assert not same(got.values, other.values)


def test_the_largest_finite_rows_do_not_overflow() -> None:
    fmt = block("mxfp8_e4m3")
    x = torch.full((2, 64), 3.4e38)
    x[1] = 2.0**-149
    for kind in cpu_norm.KINDS:
        rms = check(cpu_norm, x, fmt, norm_spec(kind, 64, fmt, 0.0))
        assert rms.isfinite().all()
        assert (rms[0] > 1e38) | (kind != "rms")


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e3m2", "nvfp4"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    fmt, before = block(name), torch.get_num_threads()
    x = torch.cat([hard_rows(1024, torch.float32, seed) for seed in range(20)])
    assert x.numel() >= 4 * 65536
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for kind in cpu_norm.KINDS:
                norm = norm_spec(kind, 1024, fmt)
                parts = cpu_norm.norm_encode(x, spec_of(fmt), norm, residual=x.flip(0), tensor_amax=AMAX)
                found.append([part for part in parts if part is not None])
    finally:
        torch.set_num_threads(before)
    for at in range(3):
        for other in (found[3 + at], found[6 + at]):
            assert all(same(a, b) for a, b in zip(found[at], other, strict=True))


def test_no_rows_and_views_of_storage() -> None:
    fmt = block("mxfp4")
    norm = norm_spec("mx2", 32, fmt)
    empty = cpu_norm.norm_encode(torch.empty(0, 32), spec_of(fmt), norm)
    assert empty.codes.shape == (0, 16)
    assert empty.rms.shape == (0,)
    x = torch.randn(10, 32)
    check(cpu_norm, x[3:7], fmt, norm)  # contiguous, not at the start of its storage


def test_refusals() -> None:
    fmt = block("mxfp8_e4m3")
    spec, norm, x = spec_of(fmt), norm_spec("mx2", 64, fmt), torch.ones(4, 64)
    with pytest.raises(ConfigError, match="no such norm") as caught:
        cpu_norm.norm_encode(x, spec, norm._replace(kind="mx3"))
    assert "mx" in str(caught.value)
    for bad in (x.t(), x[:, :32], x.view(2, 2, 64), x.double(), x.to("meta")):
        with pytest.raises(ConfigError):
            cpu_norm.norm_encode(bad, spec, norm)
    with pytest.raises(ConfigError, match="blocks"):
        cpu_norm.norm_fake(x, spec._replace(rows=2), norm)
    with pytest.raises(ConfigError, match="tensor_amax"):
        cpu_norm.norm_fake(x, spec_of(block("nvfp4")), norm)
    with pytest.raises(ConfigError, match="clamp"):
        cpu_norm.norm_fake(x, spec, norm._replace(ride=True, clamp=3.0))
    with pytest.raises(ConfigError, match="eps"):
        cpu_norm.norm_fake(x, spec, norm._replace(eps=-1.0))
    for other in (x[:2], x.bfloat16(), torch.ones(64, 4).t()):
        with pytest.raises(ConfigError, match="residual"):
            cpu_norm.norm_fake(x, spec, norm, residual=other)
    with pytest.raises(ConfigError, match="out_dtype"):
        cpu_norm.norm_fake(x, spec, norm, out_dtype=torch.float64)


def test_statistic_blocks_that_cannot_be_are_refused() -> None:
    spec = spec_of(block("mxfp8_e4m3"))
    for stat, kind in ((5, "mx2"), (-8, "mx2"), (8, "rms")):
        with pytest.raises(ConfigError, match="statistic blocks"):
            cpu_norm.norm_encode(torch.ones(1, 64), spec, norm_spec(kind, 64, block("mxfp8_e4m3"))._replace(stat=stat))


def test_the_struct_is_the_same_on_both_sides() -> None:
    assert build.library().isoscale_norm_size() == ctypes.sizeof(cpu_norm._Norm)
