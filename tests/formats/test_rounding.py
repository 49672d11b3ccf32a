"""The six roundings against gfloat, and stochastic rounding: unbiased, reproducible, indifferent to how a tensor is cut."""

import gfloat
import numpy as np
import pytest
import torch
from oracles import GF, INF, engine, same  # noqa: F401
from scipy import stats

from isoscale import formats as F
from isoscale._base.errors import ConfigError
from isoscale.formats import noise

MODES = {
    "nearest-even": gfloat.RoundMode.TiesToEven, "nearest-away": gfloat.RoundMode.TiesToAway,
    "toward-zero": gfloat.RoundMode.TowardZero, "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}  # fmt: skip
FLOATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "bf16", "fp16")


def inputs(element):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(50_000) * np.exp2(rng.uniform(-12, 6, 50_000))
    if element.bits <= 8:
        grid = element.values()
        ties = (grid[1:] + grid[:-1]) / 2
        x = np.concatenate([x, grid, ties])
    x = np.concatenate([x, [0.0, -0.0, INF, -INF, 1e-45, -1e-45]]).astype(np.float32)
    return np.concatenate([x, np.nextafter(x, np.float32(INF)), np.nextafter(x, np.float32(-INF))])


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("name", FLOATS)
def test_every_rounding_against_gfloat(name, rounding, engine):  # noqa: F811
    x = inputs(F.by_name(name))
    want = gfloat.round_ndarray(GF[name], x.astype(np.float64), MODES[rounding], sat=True)
    same(F.fake_cast(torch.from_numpy(x), name, rounding=rounding), want)


@pytest.mark.parametrize("rounding", MODES)
def test_roundings_in_blocks(rounding, engine):  # noqa: F811
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.exp2(torch.floor(torch.log2(x.abs().amax(1, keepdim=True))) - 2)
    want = gfloat.round_ndarray(GF["e2m1"], (x / scale).double().numpy(), MODES[rounding], sat=True)
    same(F.fake_cast(x, "mxfp4", rounding=rounding), want * scale.numpy())


def test_neighbours_bracket_and_roundings_differ(engine):  # noqa: F811
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    low, high = F.fake_cast(x, "e3m2", rounding="down"), F.fake_cast(x, "e3m2", rounding="up")
    assert (low <= x).all()
    assert (x <= high).all()
    assert (low < high).any()
    for seed in range(5):
        y = F.fake_cast(x, "e3m2", rounding="stochastic", seed=seed)
        assert ((y == low) | (y == high)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8", "int4", "bf16", "mxfp8_e4m3", "mxfp6_e3m2",
                                  "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "fp8_row_e4m3"])  # fmt: skip
def test_stochastic_rounding_is_unbiased_over_ten_million_draws(name, engine):  # noqa: F811
    """The mean error over 10^7 draws is within four standard deviations of zero."""
    block = F.by_name(name)
    draws, n = 10_000_000, 1_000_000
    x = torch.rand(n // 32, 32, generator=torch.Generator().manual_seed(2)) * 1.7 + 0.1
    x *= 0.5
    x[:, ::16] = 1.0  # pins the scales, so that nothing clips
    total = variance = 0.0
    for seed in range(draws // n):
        y = F.fake_cast(x, block, rounding="stochastic", seed=seed)
        total += float((y.double() - x.double()).sum())
    low = F.fake_cast(x, block, rounding="down").double()
    high = F.fake_cast(x, block, rounding="up").double()
    variance = float(((x - low) * (high - x)).sum()) * draws / n
    assert variance > 0
    assert abs(total) < 4 * variance**0.5
    nearest = float((F.fake_cast(x, block).double() - x.double()).sum()) * draws / n
    cut = float((F.fake_cast(x, block, rounding="toward-zero").double() - x.double()).sum()) * draws / n
    assert abs(cut) > 4 * variance**0.5, nearest  # the control: truncation is biased


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 23])
def test_the_probability_is_the_fraction_rounded_to_the_random_bits(bits, engine):  # noqa: F811
    n = 400_000
    for fraction in (0.25, 0.3, 0.5, 1 / 64):
        x = torch.full((n,), 1.0 + fraction / 2)  # between 1 and 1.5 of E2M1
        up = float((F.fake_cast(x, "e2m1", rounding=F.Stochastic(3, bits)) > 1.25).float().mean())
        cut = fraction * 2**bits
        want = np.ceil(cut - 0.5) / 2**bits  # how many R satisfy cut > R + 1/2
        assert abs(up - want) <= 4 * (want * (1 - want) / n) ** 0.5, (fraction, up, want)


def test_values_on_the_grid_never_move(engine):  # noqa: F811
    x = torch.from_numpy(F.E2M1.values()).float().repeat(1000)
    assert torch.equal(F.fake_cast(x, "e2m1", rounding="stochastic", seed=1), x)


def test_a_seed_gives_the_same_bits_and_another_seed_others(engine):  # noqa: F811
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    first = F.fake_cast(x, "mxfp4", rounding="stochastic", seed=7)
    assert torch.equal(first, F.fake_cast(x, "mxfp4", rounding="stochastic", seed=7))
    assert torch.equal(first, F.fake_cast(x, "mxfp4", rounding="stochastic", seed=torch.tensor(7)))
    for other in (8, -7, 7 + 2**32, 2**63 - 1):
        assert not torch.equal(first, F.fake_cast(x, "mxfp4", rounding="stochastic", seed=other))
    assert torch.equal(F.encode(x, "mxfp4", rounding="stochastic", seed=7).decode(), first)


def test_kernel_and_reference_draw_the_same_bits():
    x = torch.randn(7, 96, 33, generator=torch.Generator().manual_seed(4))
    x64 = x.double()  # float64 is always the reference
    for axis in (0, 1, 2):
        for name in ("mxfp4", "mxfp8_e5m2", "e3m2"):
            a = F.fake_cast(x, name, axis=axis, rounding="stochastic", seed=5)
            b = F.fake_cast(x64, name, axis=axis, rounding="stochastic", seed=5)
            assert torch.equal(a.double(), b)


def test_the_way_a_tensor_is_cut_does_not_matter(engine):  # noqa: F811
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    whole = F.fake_cast(x, "mxfp4", rounding="stochastic", seed=9)
    for cut in ((slice(0, 10), slice(None)), (slice(10, 64), slice(None)), (slice(3, 50), slice(32, 96))):
        start = (cut[0].start or 0, cut[1].start or 0)
        piece = F.fake_cast(x[cut], "mxfp4", rounding=F.Stochastic(9, whole=(64, 128), start=start))
        assert torch.equal(piece, whole[cut])
    alone = F.fake_cast(x[10:], "mxfp4", rounding="stochastic", seed=9)
    assert not torch.equal(alone, whole[10:])  # the control


def test_the_bits_are_random():
    """Uniform bytes, fair bits, and no correlation between neighbours, seeds, or index and bits."""
    index = torch.arange(1_000_000)
    word = noise.bits32(noise.keys(11), index)
    assert int(word.min()) >= 0
    assert int(word.max()) < 2**32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(word >> shift & 255, minlength=256).double().numpy()
        assert stats.chisquare(counts).pvalue > 1e-4
    unit = word.double() / 2**32

    def correlation(a, b):
        return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))

    limit = 4.5 / 1000
    for lag in (1, 2, 16, 32, 4096):
        assert correlation(unit[:-lag], unit[lag:]) < limit
    for seed in (12, 10, 11 + 2**32, 11 ^ 2**31):
        assert correlation(unit, noise.bits32(noise.keys(seed), index).double() / 2**32) < limit
    assert correlation(unit, index.double()) < limit
    far = noise.bits32(noise.keys(11), index + 2**40).double() / 2**32
    assert correlation(unit, far) < limit
    assert correlation(unit, unit.roll(0)) > 0.99  # the control


def test_tensor_keys_are_the_keys():
    for seed in (0, 1, -1, 2**40 + 3, 2**63 - 1):
        assert [int(key) for key in noise.tensor_keys(torch.tensor(seed))] == list(noise.keys(seed))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rounding": "nearest"}, "nearest-even"), ({"rounding": "stochastic"}, "wants a seed"),
        ({"seed": 3}, "takes no seed"), ({"rounding": 3}, "no such rounding"),
        ({"rounding": "stochastic", "seed": 1.5}, "one integer"),
        ({"rounding": "stochastic", "seed": torch.tensor([1, 2])}, "one integer"),
        ({"rounding": F.Stochastic(1, whole=(2, 2), start=(0, 1))}, "does not lie in the whole"),
    ],
)  # fmt: skip
def test_wrong_roundings_are_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        F.fake_cast(torch.ones(2, 2), "e4m3", **arguments)


@pytest.mark.parametrize("bits", [0, 24, 1.5, True])
def test_wrong_numbers_of_random_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="1 to 23"):
        F.Stochastic(1, bits)
    with pytest.raises(ConfigError, match="needs both"):
        F.Stochastic(1, whole=(2, 2))
