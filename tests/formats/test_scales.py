"""The scale of a block, by every rule, against exact rational arithmetic."""

import numpy as np
import pytest
import torch
from oracles import INF, MX, NAN, RULES, blocks_exponent, engine, exact_exponent  # noqa: F401

from isoscale import formats as F


def magnitudes(element):
    """Where a rule can go wrong: powers of two, the largest value times powers of two, and their neighbours."""
    powers = np.exp2(np.arange(-149, 128)).astype(np.float32)
    with np.errstate(over="ignore"):
        full = (powers.astype(np.float64) * element.max).astype(np.float32)
        half = (powers.astype(np.float64) * (2 - 2.0 ** -(element.mantissa_bits + 1))).astype(np.float32)
    base = np.concatenate([powers, full, half])
    base = base[np.isfinite(base) & (base > 0)]
    near = [base, np.nextafter(base, np.float32(INF)), np.nextafter(base, np.float32(0))]
    near += [np.nextafter(near[1], np.float32(INF)), np.nextafter(near[2], np.float32(0))]
    every = np.concatenate([*near, [np.finfo(np.float32).max]])
    return every[np.isfinite(every) & (every > 0)].astype(np.float32)


def codes_of(amax, fmt):
    x = np.zeros((len(amax), fmt.block[1]), np.float32)
    x[:, 5] = -amax
    return F.encode(torch.from_numpy(x), fmt).scales[:, 0].numpy()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_scales_are_those_of_rational_arithmetic(name, rule, engine):  # noqa: F811
    fmt = F.by_name(f"{name}/{rule}")
    amax = magnitudes(fmt.element)
    want = np.array([exact_exponent(float(a), fmt.element, rule) for a in amax]) + 127
    assert len(amax) > 3000
    np.testing.assert_array_equal(codes_of(amax, fmt), want)


@pytest.mark.parametrize("rule", RULES)
def test_the_fast_oracle_is_the_rational_one(rule):
    for fmt in F.BLOCKS[:6]:
        amax = magnitudes(fmt.element)[::7]
        want = [exact_exponent(float(a), fmt.element, rule) for a in amax]
        np.testing.assert_array_equal(blocks_exponent(amax.astype(np.float64), fmt.element, rule), want)


def test_control_a_float_logarithm_is_wrong_just_below_a_power_of_two():
    amax = np.nextafter(np.exp2(np.arange(0, 60)).astype(np.float32), np.float32(0))
    right = codes_of(amax, F.by_name("mxfp8_e4m3"))
    with np.errstate(all="ignore"):
        wrong = np.floor(np.log2(amax)).astype(int) - 8 + 127
    assert (right != wrong).any()


@pytest.mark.parametrize("name", MX)
def test_no_block_clips_under_rceil_and_ceil(name, engine):  # noqa: F811
    element = F.by_name(name).element
    amax = magnitudes(element)
    amax = amax[amax < 2.0**126]
    x = torch.zeros(len(amax), 32)
    x[:, 0] = torch.from_numpy(amax)
    assert float(F.cast_stats(x, f"{name}/rceil")[0]) == 0
    assert float(F.cast_stats(x, f"{name}/floor")[0]) > 0  # the control
    if element.max >= 2**element.emax * (2 - 2.0**-element.mantissa_bits):  # not E4M3, whose top code is NaN
        assert float(F.cast_stats(x, f"{name}/ceil")[0]) == 0


def test_special_blocks_get_the_nan_scale_and_zero_blocks_the_smallest(engine):  # noqa: F811
    x = torch.zeros(5, 32)
    x[1, 3], x[2, 4], x[3, 5], x[4, 6] = INF, -INF, NAN, 1.0
    for name in MX:
        found = F.encode(x, name)
        assert found.scales[:4, 0].tolist() == [0, 255, 255, 255]
        values = found.decode()
        assert values[1:4].isnan().all()
        assert values[0].eq(0).all()
        assert values[4, 6] == 1
    assert F.encode(x, "nvfp4").scales[:, 0].tolist()[1:4] == [0x7F] * 3
    rows = F.encode(x, "fp8_row_e4m3")
    assert rows.scales[0, 0] == 1
    assert rows.scales[1:4, 0].isnan().all()


@pytest.mark.parametrize("rule", RULES)
def test_power_of_two_scales_stored_as_fp32(rule, engine):  # noqa: F811
    fmt = F.BlockFormat("mine", F.E4M3, (1, 128), "fp32", rule)
    amax = magnitudes(F.E4M3)[::11]
    want = [2.0 ** max(-126, exact_exponent(float(a), F.E4M3, rule)) for a in amax]
    np.testing.assert_array_equal(codes_of(amax, fmt), np.array(want, np.float32))


def test_amax_scales_are_one_ieee_division(engine):  # noqa: F811
    amax = magnitudes(F.E4M3)
    found = codes_of(amax, F.by_name("fp8_1x128_e4m3"))
    np.testing.assert_array_equal(found, np.maximum(amax / np.float32(448), np.float32(2.0**-126)))
