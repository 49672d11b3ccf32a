"""One step of log-normal multiplicative dynamics on one tensor, in plain torch: the reference of the fused kernels.

Notation (arXiv 2506.17768; what could not be read there is marked in `isoscale.optim.LMD`): m a median, b the tensor's
own scale, mu = ln b, r = m / b, a = ln r (what is stored), v the momentum, z a normal number, n the sigma that a sample
is drawn with (0: the mean), l = sigma^2 / 2 for the mean and 0 for a sample.

`split` holds two medians per weight. A sample is w = p+ - p-, p = exp(a + n z + l + mu); with the gradient g at it

    u = +- g p    t = beta1 v + (1 - beta1) u    v <- beta2 v + (1 - beta2) u    a <- a - alpha (sign t + lambda R(r))

and the next sample is drawn. `hypentropy` holds theta, where m+ m- = b^2 is kept: w0 = 2 b sinh theta; a sample with
the same mean and variance is w = e^(n^2/2 + l) w0 + sqrt(e^(n^2) (e^(n^2) - 1) (w0^2 + 2 b^2)) z; u = g dw/dtheta.

A weight moves by at most a factor e a step. An element whose gradient is exactly zero does not move, nor does its
momentum: rows of an embedding that no token used stay. Logs live on a grid of 8 or 16 bits or in float32, momenta in
float32, bfloat16 or on a grid of their logs; grids round stochastically, since a step is smaller than theirs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isoscale.kernels.normals import Place, indices, normals, uniform, words

Scalar = float | Tensor
Keys = tuple[int | Tensor, int | Tensor]

GRIDS = {"log8": (torch.int8, 1 / 16, 127), "log16": (torch.int16, 2.0**-11, 32767)}
"""Storage of logs -> dtype, width of a cell in nats, largest code."""
OCTAVE = 4  # cells of an 8-bit momentum to a factor of 2
_RATIO = 2.0 ** (1 / OCTAVE)
LOW, HIGH = -20.0, 12.0  # where ln r is held
_TINY = 1.1754943508222875e-38


class Spec(NamedTuple):
    """What does not change from step to step.

    Args:
        form: `split` or `hypentropy`.
        regulariser: R: `log-normal` ln r; `constant` 1; `half-normal` r^2 e^(2 sigma^2) - 1; `exponential`
            r e^(sigma^2/2) - 1; for theta half the difference of both medians' R.
        medians: `fp32`, `log16` or `log8`.
        momentum: `fp32`, `bf16` or `log8`.
        raw: move by t itself, not by its sign.
        single: one beta; v <- t.
        at_median: g times the median's positive part, not the sample's.
        given: the gradients given are u, not g.
    """

    form: str = "split"
    regulariser: str = "log-normal"
    medians: str = "fp32"
    momentum: str = "fp32"
    raw: bool = False
    single: bool = False
    at_median: bool = False
    given: bool = False

    @property
    def vectors(self) -> int:
        """Medians per weight."""
        return 2 if self.form == "split" else 1

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded by chance."""
        return self.medians != "fp32" or self.momentum == "log8"


class Draw(NamedTuple):
    """A sample: its sigma and lift (n and l above), and the keys of each vector's normals."""

    sigma: Scalar
    lift: Scalar
    keys: tuple[Keys, ...]


class Numbers(NamedTuple):
    """What a step takes.

    Args:
        alpha: log units.
        decay: lambda.
        beta1, beta2: of the momentum.
        sigma: of the noise, for R.
        centre: mu.
        range: log2 of the largest 8-bit momentum.
        now: the sample that the gradient was taken at.
        next: the sample to draw.
        rounding: keys of each vector's stochastic rounding.
        place: of the piece in its whole tensor.
    """

    alpha: Scalar
    decay: Scalar
    beta1: Scalar
    beta2: Scalar
    sigma: Scalar
    centre: Scalar
    range: Scalar
    now: Draw
    next: Draw
    rounding: tuple[Keys, ...]
    place: Place


def read_log(stored: Tensor) -> Tensor:
    """float32 ln r of what is stored."""
    if stored.dtype == torch.float32:
        return stored
    cell = next(cell for dtype, cell, _ in GRIDS.values() if dtype == stored.dtype)
    return stored.to(torch.float32) * cell


def grid_log(a: Tensor, dtype: torch.dtype, u: Tensor | float) -> Tensor:
    """ln r as it is stored: itself, or codes of a grid, float32; stochastically with u in [0, 1), nearest with 1/2."""
    if dtype == torch.float32:
        return a
    _, cell, top = next(grid for grid in GRIDS.values() if grid[0] == dtype)
    return torch.floor(a * (1 / cell) + u).clamp(-top - 1, top)


def read_momentum(stored: Tensor, range: Scalar) -> Tensor:
    """float32 momenta of what is stored."""
    code = stored.to(torch.float32)
    if stored.dtype != torch.int8:
        return code
    return torch.sign(code) * torch.exp2((code.abs() - 127) * (1 / OCTAVE) + range)


def grid_momentum(v: Tensor, dtype: torch.dtype, range: Scalar, u: Tensor) -> Tensor:
    """Momenta as they are stored; on the grid stochastically between neighbours, without bias."""
    if dtype != torch.int8:
        return v
    size = v.abs().clamp(min=_TINY)
    below = torch.floor((torch.log2(size) - range) * OCTAVE + 127).clamp(0, 127)
    low = torch.exp2((below.clamp(min=1) - 127) * (1 / OCTAVE) + range)
    share = torch.where(below == 0, size / low, (size / low - 1) * (1 / (_RATIO - 1)))
    code = (below + (u < share).to(torch.float32)).clamp(max=127)
    return torch.where(v < 0, -code, code)


def _pull(spec: Spec, a: Tensor, sigma: Scalar) -> Tensor | float:
    """R."""
    square = sigma * sigma
    if spec.regulariser == "log-normal":
        return a
    if spec.regulariser == "constant":
        return 1.0
    twice = spec.regulariser == "half-normal"
    lift, rate = (2 * square, 2.0) if twice else (square * 0.5, 1.0)
    if spec.form == "hypentropy":
        return (torch.exp(rate * a + lift) - torch.exp(lift - rate * a)) * 0.5
    return torch.exp(rate * a + lift) - 1.0


def _exp(x: Scalar) -> Scalar:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def _expm1(x: Scalar) -> Scalar:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def _sqrt(x: Scalar) -> Scalar:
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def factors(draw: Draw) -> tuple[Scalar, Scalar]:
    """Of a hypentropy sample: the factor of w0 and that of z."""
    square = draw.sigma * draw.sigma
    return _exp(square * 0.5 + draw.lift), _sqrt(_exp(square) * _expm1(square))


def _hyper(theta: Tensor, centre: Scalar) -> tuple[Tensor, Tensor, Tensor]:
    """m+ - m-, m+ + m- and sqrt(m+^2 + m-^2) = sqrt(w0^2 + 2 b^2)."""
    up, down = torch.exp(theta + centre), torch.exp(centre - theta)
    return up - down, up + down, torch.sqrt(up * up + down * down)


def weights(spec: Spec, logs: tuple[Tensor, ...], centre: Scalar, draw: Draw, index: Tensor) -> Tensor:
    """float32 weights of one draw.

    Args:
        spec: the form.
        logs: float32 ln r of both medians, or theta.
        centre: mu.
        draw: which sample.
        index: of `indices`.
    """
    z = [normals(words(keys, index)) for keys in draw.keys]
    if spec.form == "split":
        up, down = (torch.exp(a + draw.sigma * noise + (draw.lift + centre)) for a, noise in zip(logs, z))
        return up - down
    net, _, wide = _hyper(logs[0], centre)
    scale, spread = factors(draw)
    return scale * net + spread * wide * z[0]


def gradients(
    spec: Spec, logs: tuple[Tensor, ...], centre: Scalar, draw: Draw, index: Tensor, g: Tensor
) -> tuple[Tensor, ...]:
    """u of each vector: the gradient in the log-medians (or theta) of a gradient g taken at a sample."""
    if spec.form == "split":
        if spec.at_median:
            up, down = (g * torch.exp(a + centre) for a in logs)
            return up, -down
        z = [normals(words(keys, index)) for keys in draw.keys]
        up, down = (g * torch.exp(a + draw.sigma * noise + (draw.lift + centre)) for a, noise in zip(logs, z))
        return up, -down
    net, gross, wide = _hyper(logs[0], centre)
    if spec.at_median:
        return (g * gross,)
    scale, spread = factors(draw)
    return (g * gross * (scale + spread * net / wide * normals(words(draw.keys[0], index))),)


def step(
    spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], momenta: tuple[Tensor, ...], given: tuple[Tensor, ...],
    out: Tensor,
) -> None:  # fmt: skip
    """One update and the next sample, in place.

    Args:
        spec: see `Spec`.
        numbers: see `Numbers`; Python numbers, or 0-d tensors where a graph is captured.
        medians: stored ln r of m+ and m-, or theta.
        momenta: theirs, stored.
        given: the gradient g in any float dtype, or u of each vector (`spec.given`).
        out: the weights, any float dtype; of the shape of all the others.
    """
    index = indices(out.shape, numbers.place, out.device)
    logs = tuple(read_log(stored) for stored in medians)
    parts = tuple(u.to(torch.float32) for u in given)
    if not spec.given:
        parts = gradients(spec, logs, numbers.centre, numbers.now, index, parts[0])
    moved = []
    for a, u, stored, momentum, keys in zip(logs, parts, medians, momenta, numbers.rounding):
        v = read_momentum(momentum, numbers.range)
        t = numbers.beta1 * v + (1 - numbers.beta1) * u
        kept = t if spec.single else numbers.beta2 * v + (1 - numbers.beta2) * u
        turn = numbers.alpha * ((t if spec.raw else torch.sign(t)) + numbers.decay * _pull(spec, a, numbers.sigma))
        new = (a - turn.clamp(-1, 1)).clamp(LOW if spec.form == "split" else -HIGH, HIGH)
        bits = words(keys, index)
        new = grid_log(new, stored.dtype, uniform(bits, 0))
        kept = grid_momentum(kept, momentum.dtype, numbers.range, uniform(bits, 1))
        alive = u != 0
        stored.copy_(torch.where(alive, new.to(stored.dtype), stored))
        momentum.copy_(torch.where(alive, kept.to(momentum.dtype), momentum))
        moved.append(read_log(stored))
    out.copy_(weights(spec, tuple(moved), numbers.centre, numbers.next, index))


def sample(spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], out: Tensor) -> None:
    """Writes the draw `numbers.next` into the weights, in place."""
    logs = tuple(read_log(stored) for stored in medians)
    out.copy_(weights(spec, logs, numbers.centre, numbers.next, indices(out.shape, numbers.place, out.device)))
