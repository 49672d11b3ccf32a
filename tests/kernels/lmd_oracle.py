"""What a fused LMD step is held against: the torch reference, float64 for the weights, and which elements may differ."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from isoscale.kernels import lmd
from isoscale.kernels.lmd import Draw, Numbers, Spec
from isoscale.kernels.normals import Place, indices, normals, words

EPS = 2.0**-23
MEDIANS = {"fp32": torch.float32, "log16": torch.int16, "log8": torch.int8}
MOMENTA = {"fp32": torch.float32, "bf16": torch.bfloat16, "log8": torch.int8}
PAIRS = (((11, 1 << 31), (3, 4)), ((5, 0xFFFFFFFF), (7, 8)), ((9, 10), (11, 12)))  # keys: now, next, rounding


def numbers(spec: Spec, n: int, *, alpha: float = 0.02, sigma: float = 0.05, centre: float = -3.0, place: Place | None = None,
            lift: float = 0.0, decay: float = 0.1) -> Numbers:  # fmt: skip
    """Numbers of a step as an optimiser has them; the largest 8-bit momentum is 2^-6."""
    now, fresh, rounding = (pair[: spec.vectors] for pair in PAIRS)
    draws = Draw(sigma, 0.0, now), Draw(sigma, lift, fresh)
    return Numbers(alpha, decay, 0.9, 0.99, sigma, centre, -6.0, *draws, rounding, place or Place(0, n, n))


def tensors(
    spec: Spec, n: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Medians, momenta, given and out: logs around 0, some at their bounds; some gradients exactly zero."""
    draw = torch.Generator().manual_seed(seed)
    medians, momenta = [], []
    for _ in range(spec.vectors):
        a = torch.randn(n, generator=draw) * 1.5
        a[::97], a[5::101] = lmd.HIGH, lmd.LOW if spec.form == "split" else -lmd.HIGH
        dtype_of = MEDIANS[spec.medians]
        medians.append(lmd.grid_log(a, dtype_of, 0.5).to(dtype_of))
        v = torch.randn(n, generator=draw) * 1e-3 * torch.randn(n, generator=draw).exp()
        v[::89] = 0.0
        codes = lmd.grid_momentum(v, MOMENTA[spec.momentum], -6.0, torch.rand(n, generator=draw))
        momenta.append(codes.to(MOMENTA[spec.momentum]))
    given = []
    for _ in range(spec.vectors if spec.given else 1):
        g = torch.randn(n, generator=draw) * (1e-3 if spec.given else 2e-2)
        g[3::7], g[4::49] = 0.0, -0.0
        given.append(g.to(dtype))
    return tuple(medians), tuple(momenta), tuple(given), torch.zeros(n, dtype=dtype)


def exact_weights(spec: Spec, logs: tuple[Tensor, ...], centre: float, draw: Draw, index: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in float64, and the bound that a kernel promises for their error."""
    a = [x.double() for x in logs]
    z = [normals(words(keys, index)).double() for keys in draw.keys]
    if spec.form == "split":
        logp = [x + draw.sigma * noise + draw.lift + centre for x, noise in zip(a, z)]
        up, down = (x.exp() for x in logp)
        slack = sum(p * (6 + y.abs() + x.abs() + draw.sigma * noise.abs()) for p, x, y, noise in zip((up, down), a, logp, z))
        return up - down, slack * EPS
    up, down = (a[0] + centre).exp(), (centre - a[0]).exp()
    scale, spread = lmd.factors(draw)
    noise = spread * (up**2 + down**2).sqrt() * z[0]
    return scale * (up - down) + noise, (scale * (up + down) + noise.abs()) * (10 + 2 * a[0].abs() + abs(centre)) * EPS


def check_weights(spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], out: Tensor) -> None:
    """Weights against float64, at the medians as they are stored."""
    index = indices(out.shape, numbers.place, out.device)
    want, slack = exact_weights(spec, tuple(map(lmd.read_log, medians)), float(numbers.centre), numbers.next, index)
    if out.dtype == torch.bfloat16:
        slack = slack + want.abs() * 2.0**-8
    worst = ((out.double() - want).abs() / slack.clamp(min=1e-44)).max()
    assert worst <= 1, float(worst)


def check_step(kernel: ModuleType | Any, spec: Spec, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu",
               seed: int = 0, **how: Any) -> tuple[float, float]:  # fmt: skip
    """One step of a kernel against the reference. Returns the shares of stored medians and momenta that differ."""
    nums = numbers(spec, n, **how)
    medians, momenta, given, out = tensors(spec, n, dtype, seed)
    mine = tuple(tuple(x.clone().to(device) for x in group) for group in (medians, momenta))
    found = out.clone().to(device)
    u = tuple(x.float() for x in given)
    index = indices(out.shape, nums.place, out.device)
    logs = tuple(map(lmd.read_log, medians))
    if not spec.given:
        now = Draw(0.0, 0.0, nums.now.keys) if spec.at_median else nums.now
        u = lmd.gradients(spec._replace(at_median=False), logs, nums.centre, now, index, u[0])
    before = tuple(x.clone() for x in (*medians, *momenta))
    kernel.step(spec, nums, *mine, tuple(x.to(device) for x in given), found)
    lmd.step(spec, nums, medians, momenta, given, out)
    mine = tuple(tuple(x.cpu() for x in group) for group in mine)
    check_weights(spec, nums, mine[0], found.cpu())
    shares = [0.0, 0.0]
    for side in range(spec.vectors):
        was, v = before[side], lmd.read_momentum(before[spec.vectors + side], nums.range)
        a, a_ref, m, m_ref = mine[0][side], medians[side], mine[1][side], momenta[side]
        dead = u[side] == 0
        assert bool(dead.any()) or n < 8
        assert torch.equal(a[dead], was[dead])
        assert torch.equal(m[dead], before[spec.vectors + side][dead])
        terms = 0.9 * v.abs() + 0.1 * u[side].abs()
        t = 0.9 * v.double() + 0.1 * u[side].double()
        sure = spec.raw | (t.abs() > 1e-5 * terms)  # elsewhere the sign is left to rounding
        assert float(sure.float().mean()) > 0.99
        gap = (lmd.read_log(a) - lmd.read_log(a_ref)).abs()[sure]
        cell = {"fp32": 0.0, "log16": 2.0**-11, "log8": 1 / 16}[spec.medians]
        assert float(gap.max()) <= 1e-5 + cell
        shares[0] = max(shares[0], float((gap > (1e-5 if cell == 0 else 0)).float().mean()))
        b1, b2 = (0.9, 0.1) if spec.single else (0.99, 0.01)
        room = (b1 * v.abs() + b2 * u[side].abs()) * 1e-5 + 1e-37
        gap = (lmd.read_momentum(m, nums.range) - lmd.read_momentum(m_ref, nums.range)).abs()
        if spec.momentum == "fp32":
            assert bool((gap <= room).all())
        elif spec.momentum == "bf16":
            assert bool((gap <= room + m_ref.float().abs() * 2.0**-7).all())
        else:
            assert int((m.int() - m_ref.int()).abs().max()) <= 1
        shares[1] = max(shares[1], float((m != m_ref).float().mean()))
    return shares[0], shares[1]
