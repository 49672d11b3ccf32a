"""The roundings, and how a caller names one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats import noise

ROUNDINGS = ("nearest-even", "toward-zero", "up", "down", "nearest-away", "stochastic")


@dataclass(frozen=True, eq=False)
class Stochastic:
    """Stochastic rounding: up in magnitude with a probability equal to the cut-off fraction.

    With n random bits R, a fraction f rounds up where f 2^n > R + 1/2: the probability is f rounded to n bits, so the
    expectation is exact where f has n bits at most, and off by less than 2^-(n+1) of a step otherwise.

    Args:
        seed: 64 bits; a Python number, or a 0-d integer tensor (then compiled code does not depend on its value).
        bits: n, random bits used for each element, 1 to 23.
        whole: shape of the tensor that x is a piece of; x itself by default. Pieces cast apart get the same bits
            as the whole tensor.
        start: index of the piece's first element in it, one number for each dimension.
    """

    seed: int | Tensor
    bits: int = 23
    whole: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 23:
            raise ConfigError("stochastic rounding uses 1 to 23 random bits", key="bits", value=self.bits)
        if isinstance(self.seed, Tensor):
            if self.seed.dim() or self.seed.is_floating_point() or self.seed.is_complex():
                raise ConfigError("a seed is one integer", key="seed", value=tuple(self.seed.shape))
        elif isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError("a seed is one integer", key="seed", value=self.seed)
        if (self.whole is None) != (self.start is None):
            raise ConfigError("a piece needs both: the shape of the whole, and where it starts", key="whole")


class Noise(NamedTuple):
    """A resolved `Stochastic`: keys, number of bits, shape of the whole and start of the piece."""

    key: tuple[int, int] | tuple[Tensor, Tensor]
    bits: int
    whole: tuple[int, ...]
    start: tuple[int, ...]

    def offset(self, shape: tuple[int, ...]) -> int | None:
        """Index of the piece's first element, if its elements lie side by side in the whole; else None."""
        if len(shape) and shape[1:] != self.whole[1:]:
            return None
        stride = 1
        for n in self.whole[1:]:
            stride *= n
        return self.start[0] * stride if len(shape) else 0


def resolve(rounding: str | Stochastic, seed: int | Tensor | None, shape: tuple[int, ...]) -> tuple[str, Noise | None]:
    """The name of a rounding, and its noise if it has one.

    Raises:
        ConfigError: unknown rounding; a seed without, or none with, stochastic rounding; a piece outside the whole.
    """
    if isinstance(rounding, str) and rounding not in ROUNDINGS:
        hint = did_you_mean(rounding, ROUNDINGS)
        raise ConfigError("no such rounding", key="rounding", value=rounding, hint=hint)
    if not isinstance(rounding, str | Stochastic):
        raise ConfigError("no such rounding", key="rounding", value=rounding, hint="one of: " + ", ".join(ROUNDINGS))
    if rounding == "stochastic":
        if seed is None:
            raise ConfigError("stochastic rounding wants a seed", key="seed", hint="seed=0, or another for each step")
        rounding = Stochastic(seed)
    elif seed is not None:
        raise ConfigError("this rounding takes no seed", key="seed", value=seed, hint='rounding="stochastic"')
    if isinstance(rounding, str):
        return rounding, None
    whole, start = rounding.whole or shape, rounding.start or (0,) * len(shape)
    fits = len(whole) == len(start) == len(shape)
    if not fits or any(a < 0 or a + n > b for a, n, b in zip(start, shape, whole)):
        raise ConfigError("the piece does not lie in the whole", key="start", value=start, place=f"{shape} in {whole}")
    own = rounding.seed
    key = noise.tensor_keys(own) if isinstance(own, Tensor) else noise.keys(own)
    return "stochastic", Noise(key, rounding.bits, whole, start)
