"""Casts are nearest-even and saturating, bit for bit, against ml_dtypes and gfloat."""

import gfloat
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from gfloat.formats import format_info_bfloat16, format_info_binary16, format_info_ocp_e4m3, format_info_ocp_e5m2
from oracles import engine  # noqa: F401

from isoscale import formats
from isoscale._base.errors import ConfigError
from isoscale.formats import BF16, E4M3, E5M2, FP16, FP32, ElementFormat, cast_stats, fake_cast, saturating_cast

ML = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2, BF16: ml_dtypes.bfloat16, FP16: np.float16}
GF = {E4M3: format_info_ocp_e4m3, E5M2: format_info_ocp_e5m2, BF16: format_info_bfloat16, FP16: format_info_binary16}
FORMATS = pytest.mark.parametrize("fmt", ML, ids=lambda fmt: fmt.name)
EIGHT = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
INF, NAN = float("inf"), float("nan")


def all_words(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def fp32_inputs(fmt, count=1_000_000):
    """Random bit patterns, normals, and every place where a cast goes wrong: ties and their neighbours, edges."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, count // 2, dtype=np.uint64).astype(np.uint32).view(np.float32)
    normal = (rng.standard_normal(count // 2) * np.exp2(rng.uniform(-20, 17, count // 2))).astype(np.float32)
    values = fmt.values()
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact: one bit more than the format has
    edges = np.array([fmt.max, fmt.max * (1 + 2.0**-20), fmt.min_subnormal / 2, 0, 1e-45, INF, NAN], np.float32)
    special = np.concatenate([values.astype(np.float32), ties, edges])
    with np.errstate(all="ignore"):
        near = [np.nextafter(special, np.float32(to)) for to in (-INF, INF)]
    every = np.concatenate([bits, normal, special, *near])
    return np.concatenate([every, -every])


def same(found, want):
    """Equal bit for bit, NaN equal to NaN, -0 different from 0."""
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    wrong = ~((found == want) & (np.signbit(found) == np.signbit(want)) | np.isnan(found) & np.isnan(want))
    assert wrong.sum() == 0, (found[wrong][:5], want[wrong][:5])


def by_ml_dtypes(x, fmt):
    """Overflow saturated first, since these types turn it into NaN or inf."""
    with np.errstate(all="ignore"):
        return np.clip(x, -fmt.max, fmt.max).astype(x.dtype).astype(ML[fmt]).astype(np.float64)


def by_gfloat(x, fmt):
    return gfloat.round_ndarray(GF[fmt], x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)


@FORMATS
def test_a_million_fp32_inputs_against_ml_dtypes(fmt):
    x = fp32_inputs(fmt)
    same(fake_cast(torch.from_numpy(x), fmt), by_ml_dtypes(x, fmt))


@FORMATS
def test_fp32_inputs_against_gfloat(fmt):
    x = fp32_inputs(fmt, 100_000)
    same(fake_cast(torch.from_numpy(x), fmt), by_gfloat(x, fmt))


@EIGHT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_inputs(fmt, dtype):
    x = all_words(dtype)
    wide = x.double().numpy()
    same(fake_cast(x, fmt).double(), by_gfloat(wide, fmt))
    same(fake_cast(x, fmt).double(), by_ml_dtypes(x.float().numpy(), fmt))


SMALL = [fmt for fmt in formats.ELEMENTS if fmt.bits <= 8 and fmt.layout != "scale"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_all_16_bit_inputs_by_table_search(fmt, dtype, engine):  # noqa: F811
    x = all_words(dtype)
    number = ~x.isnan()
    same(fake_cast(x, fmt)[number].double(), oracles.round_elements(x[number].double().numpy(), fmt))
    assert fake_cast(x, fmt)[~number].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_ten_million_fp32_inputs_by_table_search(fmt, engine):  # noqa: F811
    x = fp32_inputs(fmt, 5_000_000)  # and as many negatives
    number = ~np.isnan(x)
    assert number.sum() > 9_900_000
    same(fake_cast(torch.from_numpy(x[number]), fmt), oracles.round_elements(x[number].astype(np.float64), fmt))


@EIGHT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_codes_are_those_of_the_values(fmt, dtype):
    x = (all_words(dtype) if dtype.itemsize == 2 else torch.from_numpy(fp32_inputs(fmt, 10_000))).to(dtype)
    codes = saturating_cast(x, fmt)
    assert codes.dtype == getattr(torch, fmt.torch_dtype)
    same(codes.double(), fake_cast(x, fmt).double())
    table = np.array([fmt.value(code) for code in range(256)])
    same(table[codes.view(torch.uint8).numpy()], fake_cast(x, fmt).double())


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_the_format_are_fixed_points(fmt, dtype):
    values = torch.from_numpy(fmt.values())
    held = values[values.to(dtype).double() == values].to(dtype)
    assert torch.equal(fake_cast(held, fmt), held)
    once = fake_cast(all_words(dtype), fmt)
    same(fake_cast(once, fmt).double(), once.double())
    assert np.isin(once[~once.isnan()].double().numpy(), fmt.values()).all()


def test_16_bit_formats_of_16_bit_inputs():
    x = all_words(torch.bfloat16)
    inside = x.abs() <= 65280  # the largest value that fp16 and bf16 share
    same(fake_cast(x, FP16)[inside].double(), by_gfloat(x[inside].double().numpy(), FP16))
    assert fake_cast(torch.tensor([INF, 1e30]).bfloat16(), FP16).tolist() == [65280, 65280]
    assert fake_cast(torch.tensor([INF, 65504]).half(), BF16).tolist() == [65280, 65280]
    finite = x[x.isfinite()]
    assert torch.equal(fake_cast(finite, BF16), finite)
    assert fake_cast(torch.tensor(INF), FP32).item() == FP32.max
    assert torch.equal(fake_cast(finite, FP32), finite)


@FORMATS
def test_float64_is_rounded_once(fmt):
    values = fmt.values()
    ties = (values[1:] + values[:-1]) / 2
    x = np.concatenate([ties, np.nextafter(ties, INF), np.nextafter(ties, -INF), [1e300, -1e300, INF, NAN, 5e-324]])
    with np.errstate(over="ignore"):
        same(fake_cast(torch.from_numpy(x), fmt), by_gfloat(x, fmt))


def test_control_float64_through_float32_is_rounded_twice():
    x = torch.tensor([1.0625 * (1 + 2.0**-50)], dtype=torch.float64)  # just above the tie of 1 and 1.125
    assert fake_cast(x, E4M3).item() == 1.125
    assert fake_cast(x.float(), E4M3).item() == 1.0


def test_float64_to_fp32_is_the_native_cast():
    x = np.random.default_rng(1).integers(0, 2**64, 200_000, dtype=np.uint64).view(np.float64)
    x = np.concatenate([x, np.random.default_rng(2).standard_normal(200_000) * 2.0**-135])
    with np.errstate(all="ignore"):
        same(fake_cast(torch.from_numpy(x), FP32), np.clip(x, -FP32.max, FP32.max).astype(np.float32))


def test_a_new_format_needs_one_row():
    e2m1 = ElementFormat("e2m1", 2, 1, 1, "none")
    x = fp32_inputs(e2m1, 100_000)
    with np.errstate(all="ignore"):
        want = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    same(fake_cast(torch.from_numpy(x), e2m1), np.where(np.isnan(x), np.nan, want))
    with pytest.raises(ConfigError, match="no dtype"):
        saturating_cast(torch.ones(1), e2m1)


def test_special_values():
    x = torch.tensor([INF, -INF, 0.0, -0.0, 500.0, -464.0, 2.0**-10, -(2.0**-10), 2.0**-10 * 1.01])
    found = fake_cast(x, "e4m3")
    assert found.tolist() == [448, -448, 0, 0, 448, -448, 0, 0, 2.0**-9]
    assert found.signbit().tolist() == [False, True, False, True, False, True, False, True, False]
    assert fake_cast(torch.tensor(NAN), "e4m3").isnan()
    assert saturating_cast(torch.tensor(NAN), "e4m3").float().isnan()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_any_shape(shape):
    x = torch.full(shape, 1.06)
    assert fake_cast(x, E4M3).shape == saturating_cast(x, E4M3).shape == shape
    assert all(0 <= share.item() <= 1 for share in cast_stats(x, E4M3))


def test_strides_do_not_matter():
    x = torch.randn(64, 48) * 100
    assert torch.equal(fake_cast(x.T, E5M2), fake_cast(x, E5M2).T)
    assert torch.equal(fake_cast(x[:, ::3], E5M2), fake_cast(x, E5M2)[:, ::3])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("function", [fake_cast, saturating_cast, cast_stats])
def test_other_dtypes_are_refused(function, dtype):
    with pytest.raises(ConfigError, match="floating-point"):
        function(torch.ones(2).to(dtype), E4M3)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no such format"):
        fake_cast(torch.ones(1), "e4m4")


def test_stats_count_the_clipped_and_the_flushed():
    x = torch.tensor([449.0, -INF, 448.0, 0.0, 2.0**-10, -1e-8, 1.0, NAN])
    assert [share.item() for share in cast_stats(x, E4M3)] == [2 / 8, 2 / 8]
    assert [share.item() for share in cast_stats(x.double(), "e5m2")] == [1 / 8, 1 / 8]
    assert [share.item() for share in cast_stats(x[:0], E4M3)] == [0, 0]
    assert [share.item() for share in cast_stats(torch.tensor([INF, 1.0]).half(), BF16)] == [0.5, 0]


def test_the_derivative_is_the_identity_everywhere():
    x = torch.tensor([0.3, 1e-9, 1e9, INF, -0.0], requires_grad=True)
    weight = torch.arange(1.0, 6.0)
    (fake_cast(x, E4M3) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert not saturating_cast(x, E4M3).requires_grad


def test_torch_func():
    x = torch.randn(5, 7) * 300
    cast = lambda one: fake_cast(one, E4M3)  # noqa: E731
    assert torch.equal(torch.func.vmap(cast)(x), cast(x))
    assert torch.equal(torch.func.vmap(cast, in_dims=1, out_dims=1)(x), cast(x))
    assert torch.equal(torch.func.grad(lambda one: cast(one).sum())(x), torch.ones(5, 7))
    value, tangent = torch.func.jvp(cast, (x,), (x * 2,))
    assert torch.equal(value, cast(x))
    assert torch.equal(tangent, x * 2)
    per_sample = torch.func.vmap(torch.func.grad(lambda one: (cast(one) * 3).sum()))(x)
    assert torch.equal(per_sample, torch.full((5, 7), 3.0))


CASES = [(fmt, torch.float32) for fmt in ML] + [(E4M3, torch.bfloat16), (BF16, torch.float64)]


@pytest.mark.parametrize(("fmt", "dtype"), CASES, ids=lambda case: getattr(case, "name", str(case)))
def test_compiled_equals_eager(fmt, dtype):
    """One graph per format and dtype: gradients, dynamic shapes and the codes."""
    x = torch.from_numpy(fp32_inputs(fmt, 20_000)).to(dtype)

    def both(one):
        codes = saturating_cast(one, fmt).to(torch.float64)
        return fake_cast(one * 1.0, fmt), fake_cast(one, fmt.name), codes, *cast_stats(one, fmt)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for size in (len(x), 1001):
        for found, want in zip(compiled(x[:size]), both(x[:size]), strict=True):
            same(found.double(), want.double())
    leaf = torch.ones(9, dtype=dtype, requires_grad=True)
    compiled(leaf)[0].sum().backward()
    assert torch.equal(leaf.grad, torch.ones(9, dtype=dtype))


def test_a_compiled_function_notices_another_format():
    """Two formats of one name: guards compare all fields."""
    torch.compiler.reset()
    compiled = torch.compile(fake_cast, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.tensor([1.1, 300.0])
    for mantissa_bits, want in ((3, [1.125, 240]), (2, [1, 224]), (3, [1.125, 240])):
        assert compiled(x, ElementFormat("mine", 4, mantissa_bits, 7, "ieee")).tolist() == want


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@FORMATS
def test_a_gpu_gives_the_same_bits(fmt, dtype):
    x = torch.from_numpy(fp32_inputs(fmt)).to(dtype)
    want = fake_cast(x, fmt)
    same(fake_cast(x.cuda(), fmt).cpu().double(), want.double())
    same(saturating_cast(x.cuda(), fmt).cpu().double(), saturating_cast(x, fmt).double())
    compiled = torch.compile(lambda one: (fake_cast(one, fmt), saturating_cast(one, fmt)), fullgraph=True)
    found, codes = compiled(x.cuda())
    same(found.cpu().double(), want.double())
    same(codes.cpu().double(), saturating_cast(x, fmt).double())
