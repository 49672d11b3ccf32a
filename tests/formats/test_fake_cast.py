"""Block casts, bit for bit against other implementations: every 16-bit input, ten million fp32 inputs, the hard blocks."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import (  # noqa: F401
    INF,
    ML,
    MX,
    NAN,
    RULES,
    adversarial,
    blocks_exponent,
    cast_blocks,
    cast_nvfp4,
    engine,
    exact_exponent,
    exact_round,
    same,
)

from isoscale import formats as F
from isoscale._base.errors import ConfigError

EVERY = [f"{name}/{rule}" for name in MX for rule in RULES]


def all_words(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("name", EVERY)
def test_hard_blocks(name, engine):  # noqa: F811
    fmt = F.by_name(name)
    x = adversarial(fmt.element, np.random.default_rng(1), 20_000)
    want, codes = cast_blocks(x, fmt)
    with np.errstate(invalid="ignore"):
        same(F.fake_cast(torch.from_numpy(x), fmt), want)
    found = F.encode(torch.from_numpy(x), fmt)
    np.testing.assert_array_equal(found.scales[:, 0], codes)
    same(found.decode(), want)


@pytest.mark.parametrize("name", ["mxfp8_e4m3/floor", "mxfp6_e3m2/rceil", "mxfp6_e2m3/even", "mxfp4/ceil", "mxint8/floor"])
def test_hard_blocks_in_rational_arithmetic(name, engine):  # noqa: F811
    """No float in the oracle at all."""
    fmt = F.by_name(name)
    x = adversarial(fmt.element, np.random.default_rng(2), 96)
    x = x[np.isfinite(x).all(1)]
    found = F.fake_cast(torch.from_numpy(x), fmt).numpy()
    for row, got in zip(x, found):
        amax = float(np.abs(row).max())
        e = exact_exponent(amax, fmt.element, fmt.scale_rule) if amax else -127
        scale = Fraction(2) ** e
        want = [exact_round(Fraction(float(v)) / scale, fmt.element) * scale for v in row]
        ok = [Fraction(float(g)) == w if np.isfinite(g) else abs(w) >= 2**128 for g, w in zip(got, want)]
        assert all(ok), (row, got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MX)
def test_every_16_bit_input_in_blocks(name, dtype, engine):  # noqa: F811
    """Every word three times: sorted, so that a block holds neighbours; and shuffled; and alone with zeros."""
    words = all_words(dtype)
    shuffled = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
    alone = torch.zeros(len(words), 32, dtype=dtype)
    alone[:, 7] = words
    x = torch.cat([words.view(-1, 32), shuffled.view(-1, 32), alone])
    fmt = F.by_name(name)
    want, _ = cast_blocks(x.float().numpy(), fmt)
    with np.errstate(over="ignore"):
        want = torch.from_numpy(want).to(dtype)
    same(F.fake_cast(x, fmt).double(), want.double())


@pytest.mark.slow
@pytest.mark.parametrize("name", MX)
def test_ten_million_fp32_inputs_against_ml_dtypes(name, engine):  # noqa: F811
    fmt = F.by_name(name)
    rng = np.random.default_rng(3)
    count = 10_000_000 // 32
    for kind in ("bits", "normal"):
        if kind == "bits":
            x = rng.integers(0, 2**32, (count // 2, 32), dtype=np.uint64).astype(np.uint32).view(np.float32)
            with np.errstate(invalid="ignore"):
                x[rng.random(len(x)) < 0.5] *= np.float32(2.0**-100)
        else:
            x = rng.standard_normal((count // 2 + 1, 32), dtype=np.float32)
            x *= np.exp2(rng.integers(-140, 120, (len(x), 1))).astype(np.float32)
        found = F.fake_cast(torch.from_numpy(x), fmt).numpy()
        with np.errstate(all="ignore"):
            amax = np.abs(x.astype(np.float64)).max(1)
            special = ~np.isfinite(amax)
            e = blocks_exponent(np.where(special, 0, amax), fmt.element, fmt.scale_rule)[:, None]
            v = np.clip(np.ldexp(x.astype(np.float64), -e), -fmt.element.max, fmt.element.max)
            if fmt.element.layout == "twos":
                q = np.rint(v * 64) / 64 + 0.0
            else:
                q = v.astype(np.float32).astype(ML[fmt.element.name]).astype(np.float64)
            want = np.ldexp(q, e)
        assert np.isnan(found[special]).all()
        good = ~special
        same(found[good], want[good])


def nvfp4_inputs():
    rng = np.random.default_rng(4)
    x = adversarial(F.E2M1, rng, 4000).reshape(-1, 64)
    yield x
    yield np.zeros((3, 32), np.float32)
    yield rng.standard_normal((256, 64)).astype(np.float32)
    yield (rng.standard_normal((256, 64)) * np.exp2(rng.uniform(-12, 4, (256, 64)))).astype(np.float32)
    yield (rng.standard_normal((256, 64)) * 1e-38).astype(np.float32)
    yield np.full((2, 16), 1e-45, np.float32)


def test_nvfp4_step_by_step(engine):  # noqa: F811
    for x in nvfp4_inputs():
        want, codes, tensor = cast_nvfp4(x)
        same(F.fake_cast(torch.from_numpy(x), "nvfp4"), want)
        found = F.encode(torch.from_numpy(x), "nvfp4")
        np.testing.assert_array_equal(found.scales, codes)
        assert found.tensor_scale == tensor
        same(found.decode(), want)


def test_nvfp4_with_a_known_amax(engine):  # noqa: F811
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    own = F.fake_cast(x, "nvfp4")
    top = x.abs().max()
    assert torch.equal(F.fake_cast(x, "nvfp4", tensor_amax=top), own)
    assert torch.equal(F.fake_cast(x, "nvfp4", tensor_amax=float(top)), own)
    low = F.fake_cast(x, "nvfp4", tensor_amax=float(top) / 4)
    assert low.abs().max() <= top / 4 * (1 + 2.0**-20)  # saturates, and never overflows
    for wrong in (-1.0, INF, NAN):
        with pytest.raises(ConfigError, match="finite"):
            F.fake_cast(x, "nvfp4", tensor_amax=wrong)
    with pytest.raises(ConfigError, match="takes no tensor amax"):
        F.fake_cast(x, "mxfp4", tensor_amax=1.0)


@pytest.mark.parametrize("name", ["fp8_tensor_e4m3", "fp8_row_e5m2", "fp8_1x128_e4m3", "fp8_128x128_e4m3"])
def test_fp8_with_fp32_scales(name, engine):  # noqa: F811
    fmt = F.by_name(name)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 256)[:, None]
    a = x.numpy()
    rows = fmt.block[0] or 256
    cols = fmt.block[1] or 256
    blocks = a.reshape(256 // rows, rows, 256 // cols, cols)
    scale = np.abs(blocks).max((1, 3), keepdims=True) / np.float32(fmt.element.max)
    v = np.clip(blocks * (np.float32(1) / scale), -fmt.element.max, fmt.element.max)
    want = v.astype(ML[fmt.element.name]).astype(np.float32) * scale
    same(F.fake_cast(x, fmt), want.reshape(256, 256))
    same(F.encode(x, fmt).decode(), want.reshape(256, 256))
    assert F.cast_stats(x, fmt)[0] == 0


def test_blocks_along_any_axis_and_odd_tails(engine):  # noqa: F811
    x = torch.randn(3, 37, 5, 70, generator=torch.Generator().manual_seed(2))
    for axis in range(-4, 4):
        moved = x.movedim(axis, -1)
        padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % 32))
        want, _ = cast_blocks(padded.reshape(-1, 32).numpy(), F.by_name("mxfp6_e3m2"))
        want = torch.from_numpy(want).view(padded.shape)[..., : moved.shape[-1]].movedim(-1, axis)
        assert torch.equal(F.fake_cast(x, "mxfp6_e3m2", axis=axis), want)
        assert torch.equal(F.encode(x, "mxfp6_e3m2", axis=axis).decode(), want)
    wrong_axis = F.fake_cast(x, "mxfp6_e3m2", axis=1)
    assert not torch.equal(wrong_axis, F.fake_cast(x, "mxfp6_e3m2", axis=3))  # the control


def test_tiles_and_whole_blocks(engine):  # noqa: F811
    x = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(3))
    fmt = F.by_name("mxfp4/rceil/16x16")
    y = F.fake_cast(x, fmt)
    for i in range(0, 40, 16):
        for j in range(0, 50, 16):
            tile = x[0, i : i + 16, j : j + 16]
            want = F.fake_cast(tile.reshape(-1), "mxfp4/rceil/1x0").view(tile.shape)
            assert torch.equal(y[0, i : i + 16, j : j + 16], want)
    turned = F.fake_cast(x.mT, fmt, axis=-2).mT
    assert torch.equal(turned, y)
    assert torch.equal(F.encode(x.mT, fmt, axis=-2).decode().mT, y)
    assert torch.equal(F.fake_cast(x.mT, fmt).mT, y)  # a square tile quantises a matrix and its transpose alike
    assert not torch.equal(F.fake_cast(x.mT, "mxfp4/rceil").mT, F.fake_cast(x, "mxfp4/rceil"))  # the control
    whole = F.fake_cast(x, "mxfp4/0x0")
    assert torch.equal(whole, F.fake_cast(x.reshape(-1), "mxfp4/1x0").view(x.shape))


def test_float64_is_rounded_once():
    x = torch.full((32,), 0.0, dtype=torch.float64)
    x[0], x[1] = 448.0, 1.0625 * (1 + 2.0**-50)  # just above the tie of 1 and 1.125
    assert F.fake_cast(x, "mxfp8_e4m3")[1].item() == 1.125
    assert F.fake_cast(x.float(), "mxfp8_e4m3")[1].item() == 1.0  # the control
    assert F.encode(x, "mxfp8_e4m3").decode(torch.float64)[1].item() == 1.125


def test_element_formats_by_ml_dtypes(engine):  # noqa: F811
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(200_000) * np.exp2(rng.uniform(-18, 17, 200_000))).astype(np.float32)
    for element in F.ELEMENTS:
        if element.name not in ML or element.layout == "scale":
            continue
        same(F.fake_cast(torch.from_numpy(x), element), np.clip(x, -element.max, element.max).astype(ML[element.name]))


def test_scales_as_elements_against_gfloat(engine):  # noqa: F811
    import gfloat
    from gfloat.formats import format_info_ocp_e8m0

    x = np.abs(np.random.default_rng(6).standard_normal(50_000)) * np.exp2(np.random.default_rng(7).uniform(-120, 120, 50_000))
    x = np.concatenate([x, 1.5 * np.exp2(np.arange(-120, 120))]).astype(np.float32)
    x = x[x > 2.0**-126]  # below its smallest power gfloat rounds to powers that E8M0 has not
    want = gfloat.round_ndarray(format_info_ocp_e8m0, x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    same(F.fake_cast(torch.from_numpy(x), "e8m0"), want)
    found = F.fake_cast(torch.tensor([0.0, -1.0, INF, NAN, 1e-45]), "e8m0")
    assert found.tolist()[0] == found.tolist()[4] == 2.0**-127
    assert found[1:4].isnan().all()


def test_a_user_s_own_formats(engine):  # noqa: F811
    e2m2 = F.ElementFormat("e2m2", 2, 2, 1, "none")
    fmt = F.BlockFormat("mine", F.ElementFormat("e5m2_wide", 5, 2, 15, "none"), (1, 48), scale_rule="rceil")
    x = torch.randn(10, 100, generator=torch.Generator().manual_seed(4))
    assert set(F.fake_cast(x, e2m2).unique().tolist()) <= set(e2m2.values().tolist())
    assert torch.equal(F.encode(x, fmt).decode(), F.fake_cast(x, fmt))
    with pytest.raises(ConfigError, match="4-, 6- and 8-bit"):
        F.encode(x, e2m2)


def test_overflow_of_the_tensor_s_own_dtype_is_inf():
    """The scale rounds up and so does the largest value: 65504 becomes 65536, which float16 has not."""
    assert F.fake_cast(torch.tensor([65504.0] + [0.0] * 31).half(), "mxfp4/rceil")[0] == INF
    assert F.fake_cast(torch.tensor([65504.0] + [0.0] * 31), "mxfp4/rceil")[0] == 65536


def test_clip_gradient(engine):  # noqa: F811
    x = torch.tensor([7.9, 1.0, -7.5, 5.9] + [0.1] * 28, requires_grad=True)
    F.fake_cast(x, "mxfp4").sum().backward()
    assert x.grad.tolist() == [1.0] * 32
    x.grad = None
    F.fake_cast(x, "mxfp4", clip_gradient="zero").sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 1.0] + [1.0] * 28
    with pytest.raises(ConfigError, match="clip gradient"):
        F.fake_cast(x, "mxfp4", clip_gradient="none")


def test_ml_dtypes_is_an_oracle_that_can_disagree():
    """The control: without the clamp E4M3 overflows to NaN there."""
    with np.errstate(all="ignore"):
        assert np.isnan(np.float32(500).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_bf16_of_float32_by_torch_s_own_cast_has_the_reference_s_bits() -> None:
    from isoscale.formats import fake_cast, reference
    from isoscale.formats.cast import cast_of, facts_of

    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (200000,), generator=draw).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4028235e38, 3.3961775e38, 1e-45, -1e-40])])
    cast = cast_of(x, facts_of(x, "bf16", None), -1, "nearest-even", None)
    want, got = reference.cast_values(x, cast, None), fake_cast(x, "bf16")
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.view(torch.int32)[~got.isnan()], want.view(torch.int32)[~want.isnan()])
