"""Format advice: shares and SQNR are those of `formats.error`, ranges those of the block that holds the maximum."""

from __future__ import annotations

import math

import pytest
import torch

from isoscale.formats import by_name, encode, error
from isoscale.probe.advice import DEFAULT, Loss, advise, recommend


def draw() -> torch.Tensor:
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 0.01


def test_losses_are_those_of_error_and_the_histogram_counts_all() -> None:
    x = draw()
    x[0, :7] = 0
    found = advise("w", x, axis=0)
    for loss in found.losses:
        told = error(x, loss.format, axis=0)
        assert (loss.sqnr_db, loss.clipped, loss.flushed) == (told.sqnr_db, told.clipped, told.flushed)
    assert sum(found.histogram.values()) + found.zeros == x.numel()
    assert found.zeros == 7
    wanted = torch.floor(torch.log2(x[x != 0].abs())).int()
    assert found.histogram == {int(b): int((wanted == b).sum()) for b in wanted.unique()}


@pytest.mark.parametrize("name", [n for n in DEFAULT if "/" in n] + ["mxfp4/rceil", "mxfp4/ceil", "mxfp8_e4m3/rceil"])
@pytest.mark.parametrize("scale", [1.0, 1.9])
def test_the_range_is_that_of_the_block_with_the_maximum(name: str, scale: float) -> None:
    """The largest scale that `encode` gives, times the element's ends."""
    x = draw() * scale
    (loss,) = advise("w", x, [name]).losses
    block = encode(x, name)
    stored = block.scales.max()
    if stored.dtype == torch.float32:
        top = math.log2(float(stored))
    elif block.tensor_scale is None:
        top = int(stored) - 127
    else:
        top = math.log2(by_name("e4m3").value(int(stored)) * float(block.tensor_scale))  # type: ignore[union-attr]
    element = by_name(name).element  # type: ignore[union-attr]
    assert loss.high == pytest.approx(math.log2(element.max) + top, abs=0.02)
    assert loss.low == pytest.approx(math.log2(element.min_subnormal) + top, abs=0.02)
    if "floor" not in name:
        assert 2**loss.high >= float(x.abs().max()) * (1 - 1e-6)


def test_element_formats_have_one_range_whatever_the_values() -> None:
    for scale in (1.0, 1e-3):
        (loss,) = advise("w", draw() * scale, ["e4m3"]).losses
        assert (loss.low, loss.normal, loss.high) == (-9, -6, math.log2(448))


def loss(name: str, bits: float, sqnr: float) -> Loss:
    return Loss(name, bits, sqnr, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_fewest_bits_then_the_highest_sqnr() -> None:
    found = [loss("wide", 8.25, 40.0), loss("a", 6.25, 26.0), loss("b", 6.25, 28.0), loss("small", 4.25, 19.0)]
    assert recommend(found, 25.0) == "b"
    assert recommend(found, 18.0) == "small"
    assert recommend(found, 30.0) == "wide"
    assert recommend(found, 50.0) == ""
    assert recommend([loss("nothing known", 4.0, math.nan)], 10.0) == ""


def test_no_advice_on_what_is_not_finite() -> None:
    x = draw()
    x[0, 0] = math.inf
    found = advise("w", x)
    assert found.format == ""
    assert found.special == 1
