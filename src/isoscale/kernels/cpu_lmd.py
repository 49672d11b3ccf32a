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
import struct
from collections.abc import Iterable, Sequence
from functools import cache
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

# `struct Lmd` of lmd.cpp: seven addresses, the place, numbers, both draws, keys of rounding, what is done
_LMD = struct.Struct("@7P 4q 12f 4f4I 4f4I 4I 12i")


def covers(spec: Spec, tensors: Iterable[Tensor]) -> bool:
    """Whether the kernels take such tensors: contiguous, on the CPU, gradients and weights in float32 or bfloat16.

    Args:
        spec: what is done.
        tensors: all that `step` or `sample` would be given, in any order.
    """
    known = spec.form in FORMS and spec.regulariser in REGULARISERS and (spec.medians in MEDIANS)
    return known and all(x.is_cpu and x.dtype in _TYPES and x.is_contiguous() for x in tensors)


@cache
def _known(spec: Spec) -> None:
    for key, known in (("form", FORMS), ("regulariser", REGULARISERS), ("medians", MEDIANS), ("momentum", MOMENTA)):
        value = getattr(spec, key)
        if value not in known:
            raise ConfigError("no such form of a step", key=key, value=value, hint=did_you_mean(value, known))
    if spec.regulariser == "constant" and spec.form == "hypentropy":
        raise ConfigError("theta has no constant pull", key="regulariser", value="constant", hint="log-normal")


def check(
    spec: Spec, numbers: Numbers, medians: Sequence[Tensor], momenta: Sequence[Tensor] | None, given: Sequence[Tensor],
    out: Tensor,
) -> None:  # fmt: skip
    """Refuses what no kernel can do; the Triton kernels use it too.

    Raises:
        ConfigError: says what is wrong.
    """
    _known(spec)
    groups: list[tuple[str, Sequence[Tensor], int, tuple[torch.dtype, ...]]] = [
        ("medians", medians, spec.vectors, (MEDIANS[spec.medians],)), ("out", (out,), 1, FLOATS),
    ]  # fmt: skip
    if momenta is not None:
        groups.append(("momenta", momenta, spec.vectors, (MOMENTA[spec.momentum],)))
        groups.append(("given", given, spec.vectors if spec.given else 1, FLOATS))
    shape, device = out.shape, out.device
    for key, tensors, count, dtypes in groups:
        if len(tensors) != count:
            raise ConfigError(f"such a step has {count} of these", key=key, value=len(tensors))
        for x in tensors:
            if x.dtype not in dtypes or x.shape != shape or x.device != device or not x.is_contiguous():
                want = f"contiguous, {tuple(shape)}, {' or '.join(map(str, dtypes))}, on {device}"
                value = (tuple(x.shape), x.dtype)
                raise ConfigError("a tensor that the kernels cannot take", key=key, value=value, hint=want)
    if len(given) == 2 and given[0].dtype != given[1].dtype:
        raise ConfigError("both gradients must have one dtype", key="given", value=[x.dtype for x in given])
    if spec.momentum == "log8" and momenta is not None and not abs(float(numbers.range)) <= _WIDEST:
        message = f"the largest 8-bit momentum lies within 2^-{_WIDEST} to 2^{_WIDEST}"
        raise ConfigError(message, key="range", value=float(numbers.range))


def _keys(keys: Sequence[Keys]) -> tuple[int, ...]:
    """Four words: of two vectors, or of one and zeros."""
    (a, b), (c, d) = (*keys, (0, 0), (0, 0))[:2]
    return int(a) & WORD, int(b) & WORD, int(c) & WORD, int(d) & WORD


def _draw(spec: Spec, draw: Draw, centre: float) -> tuple[float | int, ...]:
    """A draw as the kernel takes it: logs to base 2, and the factor of the normals inside theirs."""
    sigma, lift = float(draw.sigma), float(draw.lift)
    if spec.form == "split":
        return sigma * _LOG2E * UNIT, (lift + centre) * _LOG2E, 1.0, 0.0, *_keys(draw.keys)
    scale, spread = factors(Draw(sigma, lift, ()))
    size = math.exp(centre)
    return 0.0, 0.0, float(scale) * size, float(spread) * size * UNIT, *_keys(draw.keys)


def _tame(spec: Spec, alpha: float, decay: float, centre: float, draws: Sequence[Draw]) -> bool:
    """Whether the kernel need not look: no turn is longer than 1 for logs within LOW to HIGH (and of others no result
    depends on it), and no part is beyond the range of float32."""
    if spec.raw or spec.regulariser != "log-normal":
        return False
    reach = max(abs(centre + float(draw.lift)) + 5 * float(draw.sigma) for draw in draws)
    return alpha * (1 - LOW * abs(decay)) <= 1 and reach <= _REACH


def _packed(
    spec: Spec, numbers: Numbers, medians: Sequence[Tensor], momenta: Sequence[Tensor], given: Sequence[Tensor],
    out: Tensor,
) -> bytes:  # fmt: skip
    """A step, or a sample where there are no momenta, as the kernel takes it."""
    if out.device.type != "cpu":
        raise ConfigError("a tensor on another device than the CPU", key="device", value=str(out.device))
    alpha, decay, beta1, beta2, sigma, centre, range_ = map(float, numbers[:7])
    _, cell, top = GRIDS.get(spec.medians, (None, 1.0, 0))
    split, rate = spec.form == "split", 2.0 if spec.regulariser == "half-normal" else 1.0
    now = Draw(0.0, 0.0, numbers.now.keys) if spec.at_median else numbers.now
    place = numbers.place
    return _LMD.pack(
        *_pair(medians), *_pair(momenta), *_pair(given), out.data_ptr(),
        out.numel(), place.start, max(place.inner, 1), place.stride,
        alpha, alpha * decay, 1 - beta1, 1 - beta2, LOW if split else -HIGH, HIGH,
        sigma**2 * (2 if rate == 2 else 0.5) * _LOG2E, rate * _LOG2E, cell, top, range_,
        2.0**-range_ if spec.momentum == "log8" else 1.0,
        *_draw(spec, now, centre), *_draw(spec, numbers.next, centre), *_keys(numbers.rounding),
        not split, REGULARISERS.index(spec.regulariser), _TYPES[MEDIANS[spec.medians]], _TYPES[MOMENTA[spec.momentum]],
        _TYPES[given[0].dtype] if given else 0, _TYPES[out.dtype], spec.raw, spec.single, spec.given, bool(momenta),
        _tame(spec, alpha, decay, centre, (numbers.now, numbers.next)), torch.get_num_threads(),
    )  # fmt: skip


def _pair(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Two addresses; of what is not there 0."""
    if not tensors:
        return 0, 0
    return tensors[0].data_ptr(), tensors[1].data_ptr() if len(tensors) == 2 else 0


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
    library().isoscale_lmd(_packed(spec, numbers, medians, momenta, given, out))


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
    library().isoscale_lmd(_packed(spec, numbers, medians, (), (), out))


def _noise(keys: Keys, n: int, place: Any) -> tuple[Tensor, Tensor]:
    """Words int32 [n] and normals float32 [n], by the code that the steps run: for tests."""
    bits, z = torch.empty(n, dtype=torch.int32), torch.empty(n)
    draw = Draw(0.0, 0.0, (keys,))
    numbers = Numbers(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, draw, draw, (), place)
    job = _packed(Spec(form="hypentropy"), numbers, (), (), (), z)
    library().isoscale_lmd_noise(job, ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(z.data_ptr()))
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
