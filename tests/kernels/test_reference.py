"""Kernel and torch reference give the same bits, on ten million values."""

from __future__ import annotations

import pytest
import torch
from cast_oracle import draw, same

from isoscale import formats
from isoscale.formats import dispatch
from isoscale.formats.block import BLOCKS
from isoscale.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())


@pytest.mark.parametrize("fmt", [pytest.param(f, id=f.name) for f in BLOCKS])
def test_ten_million_values_agree(fmt: formats.BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 10_000_000 // len(BLOCKS) // (1024 * 3) + 1
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        x = draw((count, 1024), seed, dtype, special=True, wide=dtype != torch.float16)
        assert dispatch.kernel_for("cpu") == "cpp"
        fast = formats.fake_cast(x, fmt), formats.encode(x, fmt)
        across = formats.fake_cast(x, fmt, axis=0, rounding="stochastic", seed=seed)
        monkeypatch.setenv("ISOSCALE_KERNELS", "off")
        assert dispatch.kernel_for("cpu") == "torch"
        slow = formats.fake_cast(x, fmt), formats.encode(x, fmt)
        assert same(fast[0], slow[0])
        assert same(across, formats.fake_cast(x, fmt, axis=0, rounding="stochastic", seed=seed))
        assert same(fast[1].codes, slow[1].codes)
        assert same(fast[1].scales, slow[1].scales)
        monkeypatch.delenv("ISOSCALE_KERNELS")
