"""What a norm kernel must give: r in float64, and the codes and values that the torch reference has for x (1 / r)."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from cast_oracle import same, spec_of

from isoscale import formats
from isoscale.formats.block import BlockFormat
from isoscale.kernels.spec import NormSpec

LARGEST = 3.4028234663852886e38
AMAX = 24.0  # static bound of the tensor, for formats that want one: some rows are above it


def norm_spec(kind: str, width: int, fmt: BlockFormat, eps: float = 1e-5, clamp: float = math.inf, ride: bool = False) -> NormSpec:
    """Weights n / D a^p with some a that depends on n, so that a short block has another one."""
    cols = fmt.block[1] or width
    last = (width - 1) % cols + 1

    def weight(n: int) -> float:
        a = 1 / (1 + 0.4 * math.log(n))
        return n / width * a ** (2 if kind == "mx2" else 1)

    return NormSpec(kind, eps, weight(cols), weight(last), clamp, ride)


def exact_rms(x: torch.Tensor, fmt: BlockFormat, norm: NormSpec) -> np.ndarray:
    """r in float64 [R], from the float32 numbers that a kernel has; NaN for rows that hold inf or NaN."""
    v = x.double().numpy()
    rows, width = v.shape
    eps, w_full, w_last = (float(np.float32(part)) for part in (norm.eps, norm.w_full, norm.w_last))
    with np.errstate(all="ignore"):
        if norm.kind == "rms":
            r = np.sqrt((v * v).mean(1) + eps)
        else:
            cols = fmt.block[1] or width
            count = -(-width // cols)
            m = np.abs(np.pad(v, ((0, 0), (0, count * cols - width)))).reshape(rows, count, cols).max(2)
            w = np.full(count, w_full)
            w[-1] = w_last
            r = (m @ w if norm.kind == "mx1" else np.sqrt((m * m) @ w)) + eps
        return np.where(np.isfinite(v).all(1), r, np.nan)


def ulps(found: torch.Tensor, exact: np.ndarray) -> float:
    """The largest distance in units of the last place of float32; inf where only one of the two is NaN."""
    got = found.double().numpy()
    if (np.isnan(got) != np.isnan(exact)).any():
        return math.inf
    got, exact = got[~np.isnan(exact)], exact[~np.isnan(exact)]
    place = np.spacing(np.maximum(np.abs(exact), 2.0**-126).astype(np.float32)).astype(np.float64)
    return float((np.abs(got - exact) / place).max(initial=0.0))


def divided(x: torch.Tensor, rms: torch.Tensor, norm: NormSpec) -> torch.Tensor:
    """y: what is cast."""
    if norm.ride:
        return x.float()
    back = torch.where(rms == 0, 0.0, rms.reciprocal().clamp(max=LARGEST))
    y = x.float() * back[:, None]
    return y.clamp(-norm.clamp, norm.clamp) if norm.clamp < math.inf else y


def check(
    kernel: ModuleType, x: torch.Tensor, fmt: BlockFormat, norm: NormSpec, *, residual: torch.Tensor | None = None,
    device: str = "cpu", limit: float = 4.0, out_dtypes: tuple[torch.dtype | None, ...] = (None, torch.float32),
) -> torch.Tensor:  # fmt: skip
    """r within `limit` ulp; codes, scales and values equal to the reference's in all bits. Gives r."""
    spec = spec_of(fmt)
    amax = AMAX if fmt.scale == "e4m3" else None
    nan_code = -1 if fmt.element.nan_code is None else fmt.element.nan_code
    there = (x.to(device), None if residual is None else residual.to(device))
    got = kernel.norm_encode(there[0], spec, norm, residual=there[1], tensor_amax=amax, nan_code=nan_code)
    codes, scales, tensor, rms, summed = (None if part is None else part.cpu() for part in got)
    assert codes is not None
    assert rms is not None
    assert scales is not None
    assert (summed is None) == (residual is None)
    h = x
    if residual is not None:
        h = x + residual
        assert same(summed, h)
    assert ulps(rms, exact_rms(h, fmt, norm)) <= limit
    y = divided(h, rms, norm)
    known = None if amax is None else torch.tensor(amax)
    want = formats.encode(y, fmt, tensor_amax=known)
    assert same(scales, want.scales)
    assert same(codes, want.codes)
    if tensor is not None:
        assert same(tensor, want.tensor_scale)
    values = formats.fake_cast(y, fmt, tensor_amax=known)
    for dtype in out_dtypes:
        fake = kernel.norm_fake(there[0], spec, norm, residual=there[1], tensor_amax=amax, out_dtype=dtype)
        assert same(fake.values.cpu(), values.to(dtype or x.dtype))
        assert same(fake.rms.cpu(), rms)
    return rms


def hard_rows(width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of all kinds: plain, spread, tiny, huge, zero, -0, an outlier, a zero block, inf, NaN; [15, width]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(15, width, generator=g).double()
    x[1] *= torch.exp2(torch.randint(-30, 30, (width,), generator=g).double())
    x[2] *= 2.0**-140  # subnormal in float32, zero in float16
    x[3] *= 2.0**-127
    x[4] *= 2.0**-80
    x[5] *= 1e38 / 6
    x[6] = 0.0
    x[7] = -0.0
    x[8, 0] *= 1000
    x[9, : width // 2] = 0.0
    x[10, width // 2] = math.inf
    x[11, -1] = math.nan
    x[12] = (x[12] * 8).round() / 8
    x[12, ::2] *= -0.0
    x[13] = 2.0**-149
    top = torch.finfo(dtype).max
    finite = x.isfinite()
    return torch.where(finite, x.clamp(-top, top), x).to(dtype)
