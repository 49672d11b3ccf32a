"""Element formats as data: how many bits go where, and what the top codes mean.

One row describes a format; every number (max, smallest normal, all values) follows from it. Encodings: OCP 8-bit
Floating Point Specification 1.0 for E4M3 and E5M2; OCP Microscaling Formats 1.0, section 5.3, for E3M2, E2M3, E2M1,
INT8 and E8M0; IEEE 754 for FP16 and FP32; BF16 is the top half of FP32; the FNUZ forms are those of arXiv 2206.02915.

A fixed-point format is a float with one exponent bit: E1M6 with bias 1 has the values of INT8 without its lowest code
(k / 64, |k| < 128), so one rounding serves both and only the codes differ (two's complement).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from isoscale._base.errors import ConfigError, did_you_mean

Specials = Literal["ieee", "fn", "fnuz", "none"]
Layout = Literal["sign", "twos", "scale"]


@dataclass(frozen=True)
class ElementFormat:
    """A sign bit, an exponent and a mantissa, with subnormals.

    Attributes:
        name: the short name, lower case.
        exponent_bits: width of the exponent field, in bits.
        mantissa_bits: width of the mantissa field without the hidden bit, in bits.
        bias: what is subtracted from the exponent field.
        specials: `ieee` keeps the top exponent for inf and NaN, `fn` keeps the all-ones code for NaN, `fnuz` makes the
            code of -0 the only NaN, `none` keeps no code, so that every code is a number.
        torch_dtype: name of the dtype in torch that holds the codes, or "" when there is none.
        layout: `sign` is sign and magnitude; `twos` two's complement of a fixed-point number with one integer bit
            (exponent_bits = 1 and bias = 1; no -0; the lowest code decodes to -2 and is never written); `scale` is a
            bare power of two: no sign, no zero, no subnormals, the last code NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    torch_dtype: str = ""
    layout: Layout = "sign"

    def __post_init__(self) -> None:
        for key, value, known in (("specials", self.specials, Specials), ("layout", self.layout, Layout)):
            if value not in get_args(known):
                hint = did_you_mean(str(value), get_args(known))
                raise ConfigError("no such kind of format", key=f"{self.name}.{key}", value=value, hint=hint)
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 64:
            raise ConfigError("no such format: 1 or more exponent bits, at most 64 bits in all", key=self.name)
        if self.layout == "twos" and (self.exponent_bits, self.bias, self.specials) != (1, 1, "none"):
            raise ConfigError("two's complement wants 1 exponent bit, bias 1 and no specials", key=self.name)
        if self.layout == "scale" and (self.mantissa_bits or self.specials != "fn"):
            raise ConfigError("a scale format has no mantissa, and its last code is NaN", key=self.name)
        if self._max_code < 1:
            raise ConfigError("no such format: no finite value above zero is left", key=self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Width of a code, in bits."""
        return (self.layout != "scale") + self.exponent_bits + self.mantissa_bits

    @property
    def code_count(self) -> int:
        """How many codes there are: 2**bits."""
        return 1 << self.bits

    @property
    def has_inf(self) -> bool:
        """Whether some code is infinity."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return self.specials != "none"

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return self.layout == "sign" and self.specials != "fnuz"

    @property
    def _half(self) -> int:
        """How many codes are not negative."""
        return 1 << (self.bits - (self.layout != "scale"))

    @property
    def _max_code(self) -> int:
        """The largest positive code that is a finite number."""
        return self._half - {"ieee": (1 << self.mantissa_bits) + 1, "fn": 2, "fnuz": 1, "none": 1}[self.specials]

    @property
    def nan_codes(self) -> tuple[range, range]:
        """The codes that are NaN, positive and negative half."""
        top = self._half
        if self.specials == "fnuz":
            return range(0), range(top, top + 1)
        first = self._max_code + (2 if self.has_inf else 1)
        return range(first, top), range(0) if self.layout == "scale" else range(top + first, 2 * top)

    @property
    def nan_code(self) -> int | None:
        """The code that NaN is written as, None where there is none."""
        positive, negative = self.nan_codes
        return positive[-1] if positive else negative[0] if negative else None

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
        return (0 if self.layout == "scale" else 1) - self.bias

    @property
    def min_normal(self) -> float:
        """The smallest positive normal value."""
        return math.ldexp(1.0, self.emin)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value, which is also the spacing of values below twice `min_normal`.

        A scale format has no subnormals: its smallest value is `min_normal`.
        """
        return math.ldexp(1.0, self.emin - self.mantissa_bits)

    def value(self, code: int) -> float:
        """The number that a code stands for; NaN and infinities included.

        Raises:
            ConfigError: the code is not in [0, code_count).
        """
        if not 0 <= code < self.code_count:
            raise ConfigError(f"{self.name} has codes 0 to {self.code_count - 1}", key="code", value=code)
        if any(code in codes for codes in self.nan_codes):
            return math.nan
        if self.layout == "scale":
            return math.ldexp(1.0, code - self.bias)
        if self.layout == "twos":
            return math.ldexp(code - (code >= self._half) * self.code_count, -self.mantissa_bits)
        sign, rest = (-1.0 if code >= self._half else 1.0), code % self._half
        if rest > self._max_code:
            return sign * math.inf
        exponent, mantissa = rest >> self.mantissa_bits, rest & ((1 << self.mantissa_bits) - 1)
        if exponent == 0:
            return sign * math.ldexp(mantissa, self.emin - self.mantissa_bits)
        return sign * math.ldexp(mantissa + (1 << self.mantissa_bits), exponent - self.bias - self.mantissa_bits)

    def values(self) -> NDArray[np.float64]:
        """All finite values that a cast can give, ascending, zero once.

        Raises:
            ConfigError: the format has more than 2**16 codes.
        """
        if self.bits > 16:
            raise ConfigError("too many values to list: formats of at most 16 bits", key="format", value=self.name)
        half = np.array([self.value(code) for code in range(self._max_code + 1)], dtype=np.float64)
        return half if self.layout == "scale" else np.concatenate([-half[:0:-1], half])

    def table(self) -> str:
        """The value of every code, 8 codes to a line, ready to print.

        Raises:
            ConfigError: the format has more than 256 codes.
        """
        if self.bits > 8:
            raise ConfigError("too many codes to print: formats of at most 8 bits", key="format", value=self.name)
        cells = [f"{self.value(code):.10g}" for code in range(self.code_count)]
        width = max(map(len, cells))
        rows = range(0, self.code_count, 8)
        return "\n".join(f"{at:3d}  " + " ".join(cell.rjust(width) for cell in cells[at : at + 8]) for at in rows)


E4M3 = ElementFormat("e4m3", 4, 3, 7, "fn", "float8_e4m3fn")
E5M2 = ElementFormat("e5m2", 5, 2, 15, "ieee", "float8_e5m2")
E3M2 = ElementFormat("e3m2", 3, 2, 3, "none")
E2M3 = ElementFormat("e2m3", 2, 3, 1, "none")
E2M1 = ElementFormat("e2m1", 2, 1, 1, "none")
E8M0 = ElementFormat("e8m0", 8, 0, 127, "fn", "float8_e8m0fnu", "scale")
E4M3_IEEE = ElementFormat("e4m3_ieee", 4, 3, 7, "ieee")
E4M3_FNUZ = ElementFormat("e4m3_fnuz", 4, 3, 8, "fnuz", "float8_e4m3fnuz")
E5M2_FNUZ = ElementFormat("e5m2_fnuz", 5, 2, 16, "fnuz", "float8_e5m2fnuz")
E3M4 = ElementFormat("e3m4", 3, 4, 3, "ieee")
INT8 = ElementFormat("int8", 1, 6, 1, "none", layout="twos")
INT4 = ElementFormat("int4", 1, 2, 1, "none", layout="twos")
BF16 = ElementFormat("bf16", 8, 7, 127, "ieee", "bfloat16")
FP16 = ElementFormat("fp16", 5, 10, 15, "ieee", "float16")
FP32 = ElementFormat("fp32", 8, 23, 127, "ieee", "float32")

ELEMENTS = (E4M3, E5M2, E3M2, E2M3, E2M1, E8M0, E4M3_IEEE, E4M3_FNUZ, E5M2_FNUZ, E3M4, INT8, INT4, BF16, FP16, FP32)
