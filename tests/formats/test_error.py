"""What a cast loses, against plain numpy."""

import math

import numpy as np
import pytest
import torch
from oracles import INF, NAN, engine  # noqa: F401

from isoscale import formats as F


def test_sqnr_clipped_and_flushed_against_numpy(engine):  # noqa: F811
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 128)
    for name in ("mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "nvfp4", "mxfp4/rceil", "fp8_tensor_e5m2", "e2m1"):
        y = F.fake_cast(x, name).double().numpy()
        a = x.double().numpy()
        found = F.error(x, name)
        assert found.sqnr_db == pytest.approx(10 * math.log10((a**2).sum() / ((a - y) ** 2).sum()), rel=1e-12)
        assert found.flushed == ((a != 0) & (y == 0)).mean()
        assert found.special == 0
        clipped, flushed = F.cast_stats(x, name)
        assert found.clipped == pytest.approx(float(clipped), rel=1e-6)
        assert found.flushed == pytest.approx(float(flushed), rel=1e-6)
    assert F.error(x, "mxfp4/floor").clipped > 0
    assert F.error(x, "mxfp4/rceil").clipped == 0


def test_per_block():
    x = torch.zeros(2, 70)
    x[0, :32] = torch.tensor([7.9] + [0.01] * 31)
    x[0, 64:] = 1.0
    found = F.error(x, "mxfp4")
    assert found.block_clipped.shape == (1, 2, 3)
    assert found.block_clipped[0, 0].tolist() == [1 / 32, 0, 0]
    assert found.block_flushed[0, 0].tolist() == [31 / 32, 0, 0]
    want = 10 * math.log10((7.9**2 + 31e-4) / (1.9**2 + 31e-4))
    assert found.block_sqnr_db[0, 0, 0] == pytest.approx(want, rel=1e-4)
    assert found.block_sqnr_db[0, 0, 2] == math.inf
    assert found.block_sqnr_db[0, 1].isnan().all()


def test_more_bits_lose_less():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    sqnr = [F.error(x, name).sqnr_db for name in ("mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8", "bf16")]
    assert sqnr[0] < sqnr[1] < sqnr[2]
    assert sqnr[3] < sqnr[4] < sqnr[5]
    assert 17 < sqnr[0] < 20


def test_special_blocks_are_counted_apart(engine):  # noqa: F811
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    clean = F.error(x[:, 32:], "mxfp6_e3m2")
    x[:, 3], x[1, 4] = NAN, INF
    found = F.error(x, "mxfp6_e3m2")
    assert found.special == 0.5
    assert found.sqnr_db == pytest.approx(clean.sqnr_db)
    assert "NaN 50.00%" in str(found)
    plain = F.error(x, "e4m3")
    assert plain.special == 4 / 256
    assert plain.clipped == 1 / 256


def test_exact_empty_and_zero():
    assert F.error(torch.ones(32), "mxfp4").sqnr_db == math.inf
    assert math.isnan(F.error(torch.zeros(32), "mxfp4").sqnr_db)
    empty = F.error(torch.ones(0, 4), "mxfp4")
    assert math.isnan(empty.sqnr_db)
    assert (empty.clipped, empty.flushed) == (0, 0)


def test_the_expected_sqnr_of_a_uniform_grid():
    """INT8 of a full-scale uniform signal: 6.02 dB a bit, to a tenth."""
    x = torch.rand(1000, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    x[:, 0] = 127 / 128
    step = 2.0**-7
    want = 10 * np.log10(float((x.double() ** 2).mean()) / (step**2 / 12))
    assert F.error(x, "mxint8").sqnr_db == pytest.approx(want, abs=0.15)
