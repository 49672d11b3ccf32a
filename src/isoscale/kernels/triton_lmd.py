"""A step of log-normal multiplicative dynamics on a GPU by a Triton kernel: the calls and the promises of `cpu_lmd`.

One read and one write. With `TRITON_INTERPRET=1` set before Triton is first imported the kernel runs on CPU tensors,
slowly: that is how it is tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoscale.kernels.cpu_lmd import FORMS, MEDIANS, REGULARISERS, check
from isoscale.kernels.lmd import GRIDS, HIGH, LOW, Draw, Keys, Numbers, Spec, factors
from isoscale.kernels.normals import Place, _signed
from isoscale.kernels.triton_cast import _on, available

__all__ = ["available", "covers", "sample", "step"]

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int16: "log16", torch.int8: "log8"}
_PIECE = 1024  # elements of a program


def covers(spec: Spec, tensors: Iterable[Tensor]) -> bool:
    """Whether the kernel takes such tensors: contiguous, gradients and weights in float32 or bfloat16.

    Args:
        spec: what is done.
        tensors: all that `step` or `sample` would be given, in any order.
    """
    known = spec.form in FORMS and spec.regulariser in REGULARISERS and spec.medians in MEDIANS
    return known and all(x.dtype in _TYPES and x.is_contiguous() for x in tensors)


def _words(x: Tensor) -> Tensor:
    """Floats as integers of their size."""
    return x.view(torch.int32) if x.dtype == torch.float32 else x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _keys(name: str, keys: Sequence[Keys]) -> dict[str, int]:
    """Two pairs of 32-bit keys as the kernel names them."""
    pairs = [*keys, (0, 0)][:2]
    return {f"{name}{i}{j}": _signed(int(word)) for i, pair in enumerate(pairs) for j, word in enumerate(pair)}


def _draw(spec: Spec, name: str, draw: Draw, centre: float) -> dict[str, float]:
    """A draw as the kernel names it; scale and spread are theta's, offset is the split's."""
    sigma, lift = float(draw.sigma), float(draw.lift)
    scale, spread = factors(Draw(sigma, lift, ())) if spec.form == "hypentropy" else (1.0, 0.0)
    values = {"sigma": sigma, "offset": lift + centre, "scale": float(scale), "spread": float(spread)}
    return {f"{name}_{key}": value for key, value in values.items()}


def _launch(
    spec: Spec, numbers: Numbers, medians: Sequence[Tensor], momenta: Sequence[Tensor], given: Sequence[Tensor],
    out: Tensor,
) -> None:  # fmt: skip
    """A step, or a sample where there are no momenta."""
    from isoscale.kernels import triton_lmd_kernels

    n = out.numel()
    if not n:
        return
    alpha, decay, beta1, beta2 = (float(x) for x in (numbers.alpha, numbers.decay, numbers.beta1, numbers.beta2))
    sigma, centre = float(numbers.sigma), float(numbers.centre)
    twice = spec.regulariser == "half-normal"
    now = Draw(0.0, 0.0, numbers.now.keys) if spec.at_median else numbers.now
    _, cell, top = GRIDS.get(spec.medians, (None, 1.0, 0))
    place: Place = numbers.place
    # where there is no second one, or none at all, another stands in: it is not read
    a, v, g = (tuple(_words(x) for x in (*group, *medians)[:2]) for group in (medians, momenta, given))
    values: dict[str, Any] = {
        "alpha": alpha, "decay": decay, "beta1": beta1, "rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2,
        "low": float(LOW if spec.form == "split" else -HIGH), "rate": 2.0 if twice else 1.0,
        "lift": sigma**2 * (2 if twice else 0.5), "range": float(numbers.range), "centre": centre,
        **_draw(spec, "now", now, centre), **_draw(spec, "next", numbers.next, centre), **_keys("n", numbers.now.keys),
        **_keys("x", numbers.next.keys), **_keys("r", numbers.rounding),
    }  # fmt: skip
    with _on(out):
        triton_lmd_kernels.lmd[(math.ceil(n / _PIECE),)](
            a[0], a[-1], v[0], v[-1], g[0], g[-1], _words(out), n, place.start, max(place.inner, 1), place.stride,
            **values, HYPER=spec.form == "hypentropy", RULE=spec.regulariser, MEDIAN=spec.medians,
            MOMENTUM=spec.momentum, GRAD=_TYPES[given[0].dtype] if given else "fp32", WEIGHT=_TYPES[out.dtype],
            RAW=spec.raw, SINGLE=spec.single, GIVEN=spec.given, STEP=bool(momenta),
            PLAIN=place.inner == place.stride, CELL=cell, TOP=float(top), BLOCK=_PIECE, enable_fp_fusion=False,
            num_warps=4,
        )  # fmt: skip


def step(
    spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], momenta: tuple[Tensor, ...], given: tuple[Tensor, ...],
    out: Tensor,
) -> None:  # fmt: skip
    """One update and the next sample, in place; see `cpu_lmd.step`. 0-d tensors among the numbers are waited for."""
    check(spec, numbers, medians, momenta, given, out)
    _launch(spec, numbers, medians, momenta, given, out)


def sample(spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], out: Tensor) -> None:
    """Writes the draw `numbers.next` into the weights, in place; see `cpu_lmd.sample`."""
    check(spec, numbers, medians, None, (), out)
    _launch(spec, numbers, medians, (), (), out)


def _noise(keys: Keys, n: int, place: Place, device: str) -> tuple[Tensor, Tensor]:
    """Words int32 [n] and normals float32 [n], by the code that the steps run: for tests."""
    from isoscale.kernels import triton_lmd_kernels

    bits, z = torch.empty(n, dtype=torch.int32, device=device), torch.empty(n, device=device)
    with _on(bits):
        triton_lmd_kernels.noise[(math.ceil(n / _PIECE),)](
            bits, z, n, place.start, max(place.inner, 1), place.stride, _signed(int(keys[0])), _signed(int(keys[1])),
            BLOCK=_PIECE, enable_fp_fusion=False,
        )  # fmt: skip
    return bits, z
