"""Every code of every format, against two libraries."""

import gfloat
import ml_dtypes
import numpy as np
import pytest
from oracles import GF, ML

import isoscale.formats as formats
from isoscale._base.errors import ConfigError
from isoscale.formats import BF16, E4M3, E5M2, E8M0, ELEMENTS, FP16, FP32, INT4, INT8, ElementFormat

ORACLES = [(fmt, ML[fmt.name]) for fmt in ELEMENTS if fmt.name in ML]
GFLOAT = [(fmt, GF[fmt.name]) for fmt in ELEMENTS if fmt.name in GF]
E2M1 = ElementFormat("e2m1", 2, 1, 1, "none")


def every_code(fmt):
    return np.array([fmt.value(code) for code in range(fmt.code_count)])


@pytest.mark.parametrize(("fmt", "dtype"), ORACLES, ids=str)
def test_all_codes_against_ml_dtypes(fmt, dtype):
    word = np.uint8 if fmt.bits <= 8 else np.uint16
    with np.errstate(invalid="ignore"):
        want = np.arange(fmt.code_count).astype(word).view(dtype).astype(np.float64)
    np.testing.assert_array_equal(every_code(fmt), want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(every_code(fmt))[number], np.signbit(want)[number])


@pytest.mark.parametrize(("fmt", "info"), GFLOAT, ids=str)
def test_all_codes_against_gfloat(fmt, info):
    want = gfloat.decode_ndarray(info, np.arange(fmt.code_count))
    np.testing.assert_array_equal(every_code(fmt), want)
    if fmt.layout != "sign":  # gfloat counts the lowest code of INT8 and calls fixed point subnormal
        return
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (info.max, info.smallest_normal, info.smallest_subnormal)


def test_published_limits():
    assert (E4M3.max, E4M3.min_normal, E4M3.min_subnormal, E4M3.emax) == (448.0, 2.0**-6, 2.0**-9, 8)
    assert (E5M2.max, E5M2.min_normal, E5M2.min_subnormal, E5M2.emax) == (57344.0, 2.0**-14, 2.0**-16, 15)
    assert (FP16.max, FP32.max) == (65504.0, float(np.finfo(np.float32).max))
    assert FP32.min_subnormal == 2.0**-149
    assert BF16.max == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def test_nan_codes_and_infinities():
    assert [list(half) for half in E4M3.nan_codes] == [[0x7F], [0xFF]]
    assert [list(half) for half in E5M2.nan_codes] == [[0x7D, 0x7E, 0x7F], [0xFD, 0xFE, 0xFF]]
    assert [list(half) for half in E2M1.nan_codes] == [[], []]
    assert [list(half) for half in E8M0.nan_codes] == [[0xFF], []]
    assert [list(half) for half in formats.E4M3_FNUZ.nan_codes] == [[], [0x80]]
    assert [fmt.has_inf for fmt in (E4M3, E5M2, BF16, FP16, FP32)] == [False, True, True, True, True]
    for fmt, *_ in ORACLES:
        codes = [code for half in fmt.nan_codes for code in half]
        assert np.isnan(every_code(fmt)[codes]).all()
        assert np.isnan(every_code(fmt)).sum() == len(codes)


def test_values_are_the_finite_codes():
    for fmt, *_ in ORACLES:
        codes = every_code(fmt)
        if fmt.layout == "scale":
            assert fmt.values().tolist() == codes[:-1].tolist()
            continue
        np.testing.assert_array_equal(fmt.values(), np.unique(codes[np.isfinite(codes)]))
    assert E2M1.values().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert len(E4M3.values()) == 253
    with pytest.raises(ConfigError):
        FP32.values()


def test_names():
    assert {"e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4"} < set(
        formats.names()
    )
    assert formats.by_name("E4M3") is E4M3
    for wrong, near in (("e4m4", "e4m3"), ("bfloat16", "bf16"), ("", "e4m3"), (None, "e4m3")):
        with pytest.raises(ConfigError) as caught:
            formats.by_name(wrong)
        assert near in caught.value.hint


def test_refusals():
    for code in (-1, 256):
        with pytest.raises(ConfigError):
            E4M3.value(code)
    for wrong in (
        {"exponent_bits": 0}, {"mantissa_bits": -1}, {"exponent_bits": 64}, {"specials": "iee"}, {"layout": "two"},
        {"layout": "twos"}, {"layout": "scale"}, {"exponent_bits": 1, "mantissa_bits": 0, "specials": "ieee"},
    ):  # fmt: skip
        given = {"name": "x", "exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "specials": "none"} | wrong
        with pytest.raises(ConfigError):
            ElementFormat(**given)


def test_fixed_point():
    """INT8 of the MX formats: k / 64; the lowest code decodes and is never a value of a cast."""
    assert (INT8.max, INT8.min_subnormal, INT8.bits, INT8.emax) == (127 / 64, 1 / 64, 8, 0)
    assert [INT8.value(code) for code in (0, 1, 127, 128, 129, 255)] == [0, 1 / 64, 127 / 64, -2, -127 / 64, -1 / 64]
    np.testing.assert_array_equal(INT8.values(), np.arange(-127, 128) / 64)
    np.testing.assert_array_equal(INT4.values(), np.arange(-7, 8) / 4)


def test_the_table_prints_every_code():
    lines = E2M1.table().splitlines()
    assert [line.split() for line in lines] == [
        ["0", "0", "0.5", "1", "1.5", "2", "3", "4", "6"],
        ["8", "-0", "-0.5", "-1", "-1.5", "-2", "-3", "-4", "-6"],
    ]
    assert len(E5M2.table().splitlines()) == 32
    assert "57344" in E5M2.table()
    with pytest.raises(ConfigError, match="8 bits"):
        FP16.table()
