"""A step of log-normal multiplicative dynamics on a CPU: `lmd.step` and `lmd.sample`, compiled, one pass over memory.

The words and normals are those of `normals`, to the bit, and so are random bits of grids. An exponential is 2^y of a
fused product y, within 2 ulp, so that p = exp(a + n z + ...) has a relative error of at most

    (6 + |ln p| + |a| + n |z|) 2^-23     and a sample of theta, against gross + |noise|, (10 + 2 |theta| + |mu|) 2^-23

beside exact arithmetic. A stored number differs from the reference's by a few ulp, or by a step of its grid where that
moves it over a boundary; a sign where the two terms of t cancel to 1e-5 of their size. Gradients must be finite
(`all_finite`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.kernels.build import available, library, why_not
from isoscale.kernels.lmd import GRIDS, HIGH, LOW, Draw, Keys, Numbers, Spec, factors
from isoscale.kernels.normals import UNIT, WORD

__all__ = ["all_finite", "available", "check", "covers", "sample", "step", "why_not"]

FORMS = ("split", "hypentropy")
REGULARISERS = ("log-normal", "constant", "half-normal", "exponential")
MEDIANS = {"fp32": torch.float32, **{name: dtype for name, (dtype, _, _) in GRIDS.items()}}
MOMENTA = {"fp32": torch.float32, "bf16": torch.bfloat16, "log8": torch.int8}
FLOATS = (torch.float32, torch.bfloat16)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int16: 2, torch.int8: 3}
_LOG2E = 1 / math.log(2)
_WIDEST = 126  # log2 of momenta
_REACH = 50.0  # |ln| of what is added to a log


class _Draw(ctypes.Structure):
    """`struct LmdDraw` of lmd.cpp."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("noise", "offset", "scale", "spread")), ("keys", ctypes.c_uint32 * 4),
    )  # fmt: skip


class _Lmd(ctypes.Structure):
    """`struct Lmd` of lmd.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p * 2) for name in ("medians", "momenta", "given")), ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "start", "inner", "stride")),
        *((name, ctypes.c_float) for name in (
            "alpha", "pulled", "rest1", "rest2", "low", "high", "lift", "rate", "cell", "top", "range", "shrink",
        )),
        ("now", _Draw), ("next", _Draw), ("rounding", ctypes.c_uint32 * 4),
        *((name, ctypes.c_int32) for name in (
            "hyper", "rule", "median", "momentum", "grad", "weight", "raw", "single", "direct", "step", "tame",
            "threads",
        )),
    )  # fmt: skip


def covers(spec: Spec, tensors: Iterable[Tensor]) -> bool:
    """Whether the kernels take such tensors: contiguous, on the CPU, gradients and weights in float32 or bfloat16.

    Args:
        spec: what is done.
        tensors: all that `step` or `sample` would be given, in any order.
    """
    known = spec.form in FORMS and spec.regulariser in REGULARISERS and (spec.medians in MEDIANS)
    return known and all(x.device.type == "cpu" and x.dtype in _TYPES and x.is_contiguous() for x in tensors)


def check(
    spec: Spec, numbers: Numbers, medians: Sequence[Tensor], momenta: Sequence[Tensor] | None, given: Sequence[Tensor],
    out: Tensor,
) -> None:  # fmt: skip
    """Refuses what no kernel can do; the Triton kernels use it too.

    Raises:
        ConfigError: says what is wrong.
    """
    for key, known in (("form", FORMS), ("regulariser", REGULARISERS), ("medians", MEDIANS), ("momentum", MOMENTA)):
        value = getattr(spec, key)
        if value not in known:
            raise ConfigError("no such form of a step", key=key, value=value, hint=did_you_mean(value, known))
    if spec.regulariser == "constant" and spec.form == "hypentropy":
        raise ConfigError("theta has no constant pull", key="regulariser", value="constant", hint="log-normal")
    groups: list[tuple[str, Sequence[Tensor], int, tuple[torch.dtype, ...]]] = [
        ("medians", medians, spec.vectors, (MEDIANS[spec.medians],)), ("out", (out,), 1, FLOATS),
    ]  # fmt: skip
    if momenta is not None:
        groups.append(("momenta", momenta, spec.vectors, (MOMENTA[spec.momentum],)))
        groups.append(("given", given, spec.vectors if spec.given else 1, FLOATS))
    for key, tensors, count, dtypes in groups:
        if len(tensors) != count:
            raise ConfigError(f"such a step has {count} of these", key=key, value=len(tensors))
        for x in tensors:
            if x.dtype not in dtypes or x.shape != out.shape or x.device != out.device or not x.is_contiguous():
                want = f"contiguous, {tuple(out.shape)}, {' or '.join(map(str, dtypes))}, on {out.device}"
                value = (tuple(x.shape), x.dtype)
                raise ConfigError("a tensor that the kernels cannot take", key=key, value=value, hint=want)
    if len({x.dtype for x in given}) > 1:
        raise ConfigError("both gradients must have one dtype", key="given", value=[x.dtype for x in given])
    if spec.momentum == "log8" and momenta is not None and not abs(float(numbers.range)) <= _WIDEST:
        message = f"the largest 8-bit momentum lies within 2^-{_WIDEST} to 2^{_WIDEST}"
        raise ConfigError(message, key="range", value=float(numbers.range))


def _keys(keys: Sequence[Keys]) -> Any:
    flat = [int(word) & WORD for pair in keys for word in pair]
    return (ctypes.c_uint32 * 4)(*flat)


def _draw(spec: Spec, draw: Draw, centre: float) -> _Draw:
    """A draw as the kernel takes it: logs to base 2, and the factor of the normals inside theirs."""
    if spec.form == "split":
        offset = (draw.lift + centre) * _LOG2E
        return _Draw(noise=draw.sigma * _LOG2E * UNIT, offset=offset, scale=1.0, spread=0.0, keys=_keys(draw.keys))
    scale, spread = factors(Draw(float(draw.sigma), float(draw.lift), ()))
    size = math.exp(centre)
    return _Draw(noise=0.0, offset=0.0, scale=scale * size, spread=spread * size * UNIT, keys=_keys(draw.keys))


def _tame(spec: Spec, numbers: Numbers) -> bool:
    """Whether the kernel need not look: no turn is longer than 1 for logs within LOW to HIGH (and of others no result
    depends on it), and no part is beyond the range of float32."""
    if spec.raw or spec.regulariser != "log-normal":
        return False
    draws = (numbers.now, numbers.next)
    reach = max(abs(float(numbers.centre + draw.lift)) + 5 * float(draw.sigma) for draw in draws)
    return float(numbers.alpha) * (1 - LOW * abs(float(numbers.decay))) <= 1 and reach <= _REACH


def _common(spec: Spec, numbers: Numbers, medians: Sequence[Tensor], out: Tensor) -> _Lmd:
    """What a step and a sample share."""
    if out.device.type != "cpu":
        raise ConfigError("a tensor on another device than the CPU", key="device", value=str(out.device))
    _, cell, top = GRIDS.get(spec.medians, (None, 1.0, 0))
    job = _Lmd(
        out=out.data_ptr(), n=out.numel(), start=numbers.place.start, inner=max(numbers.place.inner, 1),
        stride=numbers.place.stride, cell=cell, top=top, hyper=spec.form == "hypentropy",
        median=_TYPES[MEDIANS[spec.medians]], weight=_TYPES[out.dtype], threads=torch.get_num_threads(),
        tame=_tame(spec, numbers), next=_draw(spec, numbers.next, float(numbers.centre)),
    )  # fmt: skip
    for i, stored in enumerate(medians):
        job.medians[i] = stored.data_ptr()
    return job


def step(
    spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], momenta: tuple[Tensor, ...], given: tuple[Tensor, ...],
    out: Tensor,
) -> None:  # fmt: skip
    """One update and the next sample, in place; see `lmd.step`.

    Args:
        spec: as there.
        numbers: as there.
        medians: as there; contiguous.
        momenta: as there; contiguous.
        given: as there; contiguous, float32 or bfloat16.
        out: as there; contiguous, float32 or bfloat16.

    Raises:
        ConfigError: an unknown name; tensors of another shape, dtype, layout or device; no compiler.
    """
    check(spec, numbers, medians, momenta, given, out)
    job = _common(spec, numbers, medians, out)
    alpha, beta1, beta2, sigma = (float(x) for x in (numbers.alpha, numbers.beta1, numbers.beta2, numbers.sigma))
    twice = spec.regulariser == "half-normal"
    decay, job.range = float(numbers.decay), float(numbers.range)
    job.alpha, job.pulled = alpha, alpha * decay
    job.rest1, job.rest2 = 1 - beta1, 1 - beta2
    job.low, job.high = LOW if spec.form == "split" else -HIGH, HIGH
    job.lift, job.rate = sigma**2 * (2 if twice else 0.5) * _LOG2E, (2 if twice else 1) * _LOG2E
    job.shrink = 2.0**-job.range if spec.momentum == "log8" else 1.0
    now = Draw(0.0, 0.0, numbers.now.keys) if spec.at_median else numbers.now
    job.now = _draw(spec, now, float(numbers.centre))
    job.rounding = _keys(numbers.rounding)
    job.rule, job.momentum = REGULARISERS.index(spec.regulariser), _TYPES[MOMENTA[spec.momentum]]
    job.grad, job.raw, job.single, job.direct, job.step = _TYPES[given[0].dtype], spec.raw, spec.single, spec.given, 1
    for i, momentum in enumerate(momenta):
        job.momenta[i] = momentum.data_ptr()
    for i, u in enumerate(given):
        job.given[i] = u.data_ptr()
    library().isoscale_lmd(ctypes.byref(job))


def sample(spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], out: Tensor) -> None:
    """Writes the draw `numbers.next` into the weights, in place; see `lmd.sample`.

    Args:
        spec: as for `step`, as all that follow.
        numbers: see there.
        medians: see there.
        out: see there.

    Raises:
        ConfigError: as `step`.
    """
    check(spec, numbers, medians, None, (), out)
    library().isoscale_lmd(ctypes.byref(_common(spec, numbers, medians, out)))


def _noise(keys: Keys, n: int, place: Any) -> tuple[Tensor, Tensor]:
    """Words int32 [n] and normals float32 [n], by the code that the steps run: for tests."""
    bits, z = torch.empty(n, dtype=torch.int32), torch.empty(n)
    job = _Lmd(n=n, start=place.start, inner=max(place.inner, 1), stride=place.stride, next=_Draw(keys=_keys((keys,))))
    call = library().isoscale_lmd_noise
    call(ctypes.byref(job), ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(z.data_ptr()))
    return bits, z


def all_finite(grads: Iterable[Tensor]) -> bool:
    """Whether no tensor holds an inf or a NaN: one pass at the speed of memory.

    Args:
        grads: contiguous CPU tensors in float32 or bfloat16; any others are asked of torch.

    Raises:
        ConfigError: no compiler.
    """
    call, threads = library().isoscale_finite, torch.get_num_threads()
    for x in grads:
        if x.device.type == "cpu" and x.dtype in FLOATS and x.is_contiguous():
            size = ctypes.c_int64(x.element_size())
            if not call(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), size, threads):
                return False
        elif not bool(torch.isfinite(x).all()):
            return False
    return True
