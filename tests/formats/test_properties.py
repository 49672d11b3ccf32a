"""What must hold for every format, block, axis and input (hypothesis looks for a counterexample)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoscale import formats as F

POWERS = [f"{fmt.name}/{rule}" for fmt in F.BLOCKS if fmt.scale == "e8m0" for rule in ("floor", "ceil", "even", "rceil")]
ANY = [*POWERS, "nvfp4", "fp8_tensor_e4m3", "fp8_row_e5m2", "fp8_1x128_e4m3", "mxfp4/16x16", "mxfp6_e3m2/4x8", "e3m2", "int4"]
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, -0.0, 1.0, 6.0, 7.5, 448.0, 2.0**-60])


@st.composite
def tensors(draw, dims=(1, 3), side=70):
    shape = draw(st.lists(st.integers(1, side), min_size=dims[0], max_size=dims[1]))
    while np.prod(shape) > 4096:
        shape[int(np.argmax(shape))] //= 2
    count = int(np.prod(shape))
    some = draw(st.lists(FLOATS, min_size=1, max_size=24))
    seed = draw(st.integers(0, 2**31))
    values = np.random.default_rng(seed).choice(np.array(some, np.float32), count)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


quick = settings(max_examples=80, deadline=None, derandomize=True)


@quick
@given(tensors(), st.sampled_from(ANY), st.data())
def test_codes_hold_the_values(x, name, data):
    axis = data.draw(st.integers(-x.dim(), x.dim() - 1))
    assert torch.equal(F.encode(x, name, axis=axis).decode(), F.fake_cast(x, name, axis=axis))


@quick
@given(tensors(), st.sampled_from(POWERS), st.data())
def test_a_second_cast_changes_nothing(x, name, data):
    axis = data.draw(st.integers(-x.dim(), x.dim() - 1))
    once = F.fake_cast(x, name, axis=axis)
    assert torch.equal(F.fake_cast(once, name, axis=axis), once)


@quick
@given(tensors(), st.sampled_from(ANY), st.integers(-30, 30))
def test_signs_and_powers_of_two_pass_through(x, name, power):
    x[x.abs() < 2.0**-60] = 0.0  # no scale at its limit
    y = F.fake_cast(x, name)
    assert torch.equal(F.fake_cast(-x, name), -y)
    if name in POWERS:
        assert torch.equal(F.fake_cast(x * 2.0**power, name), y * 2.0**power)


@quick
@given(tensors((1, 1)), st.sampled_from(POWERS))
def test_order_is_kept_within_a_block(x, name):
    x = x[:32]
    y = F.fake_cast(x, name)
    order = x.argsort()
    assert (y[order].diff() >= 0).all()


@quick
@given(tensors((1, 1)), st.sampled_from(POWERS), st.randoms(use_true_random=False))
def test_a_block_does_not_know_the_order_of_its_values_nor_its_neighbours(x, name, random):
    x = x[:32]
    order = torch.tensor(random.sample(range(len(x)), len(x)))
    assert torch.equal(F.fake_cast(x[order], name), F.fake_cast(x, name)[order])
    padded = torch.nn.functional.pad(x, (0, 32 - len(x)))
    both = torch.cat([padded, torch.full((32,), 1e30)])
    assert torch.equal(F.fake_cast(both, name)[: len(x)], F.fake_cast(x, name))


@quick
@given(tensors(), st.sampled_from(POWERS))
def test_the_error_is_at_most_half_a_step_or_the_clip(x, name):
    fmt = F.by_name(name)
    y = F.fake_cast(x, name)
    codes = F.encode(x, name)
    scale = torch.exp2(codes.scales.double() - 127).repeat_interleave(32, -1)[..., : x.shape[-1]]
    v = (x.double() / scale).abs()
    exponent = torch.floor(torch.log2(v.clamp(min=fmt.element.min_normal, max=fmt.element.max)))
    half = torch.exp2(exponent - fmt.element.mantissa_bits) / 2
    error = (x.double() - y.double()).abs() / scale
    assert (error <= torch.maximum(half, v - fmt.element.max)).all()


@quick
@given(tensors(), st.sampled_from(ANY), st.integers(0, 2**63 - 1), st.integers(1, 23))
def test_stochastic_rounding_gives_a_neighbour_and_repeats(x, name, seed, bits):
    rounding = F.Stochastic(seed, bits)
    y = F.fake_cast(x, name, rounding=rounding)
    low, high = F.fake_cast(x, name, rounding="down"), F.fake_cast(x, name, rounding="up")
    assert ((y == low) | (y == high)).all()
    assert torch.equal(F.fake_cast(x, name, rounding=rounding), y)


@quick
@given(st.integers(1, 6), st.integers(0, 5), st.integers(-3, 20), st.sampled_from(["ieee", "fn", "fnuz", "none"]))
def test_any_format_that_can_be_made_casts_to_its_own_values(exponent_bits, mantissa_bits, bias, specials):
    from isoscale._base.errors import ConfigError

    try:
        fmt = F.ElementFormat("mine", exponent_bits, mantissa_bits, bias, specials)
    except ConfigError:
        return
    values = torch.from_numpy(fmt.values())
    assert torch.equal(F.fake_cast(values, fmt), values)
    middle = (values[1:] + values[:-1]) / 2
    y = F.fake_cast(middle, fmt)
    assert ((y == values[1:]) | (y == values[:-1])).all()
    if fmt.bits in (4, 6, 8):
        assert torch.equal(F.encode(values, fmt).decode(torch.float64), values)
