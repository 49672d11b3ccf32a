"""Element formats as data: how many bits go where, and what the top codes mean.

One row describes a format; every number (max, smallest normal, all values) follows from it. Encodings: OCP 8-bit
Floating Point Specification 1.0 for E4M3 and E5M2, IEEE 754 for FP16 and FP32; BF16 is the top half of FP32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from isoscale._base.errors import ConfigError, did_you_mean

Specials = Literal["ieee", "fn", "none"]


@dataclass(frozen=True)
class ElementFormat:
    """A sign bit, an exponent and a mantissa, with subnormals.

    Attributes:
        name: the short name, lower case.
        exponent_bits: width of the exponent field, in bits.
        mantissa_bits: width of the mantissa field without the hidden bit, in bits.
        bias: what is subtracted from the exponent field.
        specials: `ieee` keeps the top exponent for inf and NaN, `fn` keeps the all-ones code for NaN, `none` keeps
            no code, so that every code is a number.
        torch_dtype: name of the dtype in torch that holds the codes, or "" when there is none.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    torch_dtype: str = ""

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 64:
            raise ConfigError("no such format: 1 or more exponent bits, at most 64 bits in all", key=self.name)

    @property
    def bits(self) -> int:
        """Width of a code, in bits."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def code_count(self) -> int:
        """How many codes there are: 2**bits."""
        return 1 << self.bits

    @property
    def has_inf(self) -> bool:
        """Whether some code is infinity."""
        return self.specials == "ieee"

    @property
    def _max_code(self) -> int:
        """The largest positive code that is a finite number."""
        top = 1 << (self.bits - 1)
        return top - {"ieee": (1 << self.mantissa_bits) + 1, "fn": 2, "none": 1}[self.specials]

    @property
    def nan_codes(self) -> tuple[range, range]:
        """The codes that are NaN, positive and negative half."""
        top = 1 << (self.bits - 1)
        first = self._max_code + (2 if self.has_inf else 1)
        return range(first, top), range(top + first, 2 * top)

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.value(self._max_code)

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value: floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        """The smallest positive normal value."""
        return math.ldexp(1.0, self.emin)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value, which is also the spacing of values below twice `min_normal`."""
        return math.ldexp(1.0, self.emin - self.mantissa_bits)

    def value(self, code: int) -> float:
        """The number that a code stands for; NaN and infinities included.

        Raises:
            ConfigError: the code is not in [0, code_count).
        """
        if not 0 <= code < self.code_count:
            raise ConfigError(f"{self.name} has codes 0 to {self.code_count - 1}", key="code", value=code)
        half = 1 << (self.bits - 1)
        sign, rest = (-1.0 if code >= half else 1.0), code % half
        if rest > self._max_code:
            return sign * math.inf if self.has_inf and rest == self._max_code + 1 else math.nan
        exponent, mantissa = rest >> self.mantissa_bits, rest & ((1 << self.mantissa_bits) - 1)
        if exponent == 0:
            return sign * math.ldexp(mantissa, self.emin - self.mantissa_bits)
        return sign * math.ldexp(mantissa + (1 << self.mantissa_bits), exponent - self.bias - self.mantissa_bits)

    def values(self) -> NDArray[np.float64]:
        """All finite values, ascending, zero once.

        Raises:
            ConfigError: the format has more than 2**16 codes.
        """
        if self.bits > 16:
            raise ConfigError("too many values to list: formats of at most 16 bits", key="format", value=self.name)
        half = np.array([self.value(code) for code in range(self._max_code + 1)], dtype=np.float64)
        return np.concatenate([-half[:0:-1], half])


E4M3 = ElementFormat("e4m3", 4, 3, 7, "fn", "float8_e4m3fn")
E5M2 = ElementFormat("e5m2", 5, 2, 15, "ieee", "float8_e5m2")
BF16 = ElementFormat("bf16", 8, 7, 127, "ieee", "bfloat16")
FP16 = ElementFormat("fp16", 5, 10, 15, "ieee", "float16")
FP32 = ElementFormat("fp32", 8, 23, 127, "ieee", "float32")

_BY_NAME = {fmt.name: fmt for fmt in (E4M3, E5M2, BF16, FP16, FP32)}


def names() -> tuple[str, ...]:
    """The names that `by_name` knows."""
    return tuple(_BY_NAME)


def by_name(name: str) -> ElementFormat:
    """The element format of that name; case does not matter.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    found = _BY_NAME.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ConfigError("no such element format", key="format", value=name, hint=did_you_mean(str(name), _BY_NAME))
    return found
