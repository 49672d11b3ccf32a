"""Every code of every format, against two libraries."""

import gfloat
import ml_dtypes
import numpy as np
import pytest
from gfloat.formats import format_info_bfloat16, format_info_binary16, format_info_ocp_e4m3, format_info_ocp_e5m2

import isoscale.formats as formats
from isoscale._base.errors import ConfigError
from isoscale.formats import BF16, E4M3, E5M2, FP16, FP32, ElementFormat

ORACLES = [
    (E4M3, ml_dtypes.float8_e4m3fn, format_info_ocp_e4m3),
    (E5M2, ml_dtypes.float8_e5m2, format_info_ocp_e5m2),
    (BF16, ml_dtypes.bfloat16, format_info_bfloat16),
    (FP16, np.float16, format_info_binary16),
]
E2M1 = ElementFormat("e2m1", 2, 1, 1, "none")


def every_code(fmt):
    return np.array([fmt.value(code) for code in range(fmt.code_count)])


@pytest.mark.parametrize(("fmt", "dtype", "_info"), ORACLES)
def test_all_codes_against_ml_dtypes(fmt, dtype, _info):
    word = np.uint8 if fmt.bits == 8 else np.uint16
    want = np.arange(fmt.code_count).astype(word).view(dtype).astype(np.float64)
    np.testing.assert_array_equal(every_code(fmt), want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(every_code(fmt))[number], np.signbit(want)[number])


@pytest.mark.parametrize(("fmt", "_dtype", "info"), ORACLES)
def test_all_codes_against_gfloat(fmt, _dtype, info):
    want = gfloat.decode_ndarray(info, np.arange(fmt.code_count))
    np.testing.assert_array_equal(every_code(fmt), want)
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
    assert [fmt.has_inf for fmt in (E4M3, E5M2, BF16, FP16, FP32)] == [False, True, True, True, True]
    for fmt, *_ in ORACLES:
        codes = [code for half in fmt.nan_codes for code in half]
        assert np.isnan(every_code(fmt)[codes]).all()
        assert np.isnan(every_code(fmt)).sum() == len(codes)


def test_values_are_the_finite_codes():
    for fmt, *_ in ORACLES:
        codes = every_code(fmt)
        np.testing.assert_array_equal(fmt.values(), np.unique(codes[np.isfinite(codes)]))
    assert E2M1.values().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert len(E4M3.values()) == 253
    with pytest.raises(ConfigError):
        FP32.values()


def test_names():
    assert formats.names() == ("e4m3", "e5m2", "bf16", "fp16", "fp32")
    assert formats.by_name("E4M3") is E4M3
    for wrong, near in (("e4m4", "e4m3"), ("bfloat16", "bf16"), ("", "e4m3"), (None, "e4m3")):
        with pytest.raises(ConfigError) as caught:
            formats.by_name(wrong)
        assert near in caught.value.hint


def test_refusals():
    for code in (-1, 256):
        with pytest.raises(ConfigError):
            E4M3.value(code)
    with pytest.raises(ConfigError):
        ElementFormat("x", 0, 3, 0, "none")
