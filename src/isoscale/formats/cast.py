"""Saturating casts to an element format: to nearest, ties to even, the same bits on every device.

How: clamp to the largest value, then round in the input's own arithmetic. The spacing of the format's values around x
is a power of two read off the exponent bits of x, so `round(x * (1 / spacing)) * spacing` has exactly one rounding, and
no step (integer operations, products with powers of two, round) that devices do in different ways.

Why not `x.to(torch.float8_e4m3fn)`: overflow saturates, gives NaN or gives inf depending on dtype, device and version;
float64 would be rounded twice (through float32); and Inductor drops a cast to bf16 and back as pointless. The
arithmetic form costs the same in eager mode.

What is lost: the sign and payload of a NaN are not promised.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.formats.block import element_by_name
from isoscale.formats.element import ElementFormat

torch.utils._pytree.register_constant(ElementFormat)
_LAYOUT = {False: (torch.float32, torch.int32, 23, 127), True: (torch.float64, torch.int64, 52, 1023)}
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def _checked(x: Tensor, fmt: ElementFormat | str) -> ElementFormat:
    if x.dtype not in _MANTISSA:
        hint = "x.float() first: float16, bfloat16, float32 and float64 can be cast"
        raise ConfigError("only real floating-point tensors can be cast to a format", value=x.dtype, key="x", hint=hint)
    return element_by_name(fmt) if isinstance(fmt, str) else fmt


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constants(fmt: ElementFormat, dtype: torch.dtype) -> tuple[float, float, int, int]:
    """Largest value of the format; largest that `dtype` holds too; smallest exponent; mantissa bits.

    One call that the compiler folds, so that no property of a format becomes a symbol of the graph. Being registered
    as a constant, a format is guarded by equality: another one recompiles.
    """
    top = min(fmt.max, torch.finfo(dtype).max)
    fraction, exponent = math.frexp(top)
    scale = 1 << (min(fmt.mantissa_bits, _MANTISSA[dtype]) + 1)
    bound = math.ldexp(math.floor(fraction * scale), exponent) / scale
    return fmt.max, bound, fmt.emin, fmt.mantissa_bits


def _round(x: Tensor, bound: float, emin: int, mantissa_bits: int) -> Tensor:
    wide, word, field, bias = _LAYOUT[x.dtype == torch.float64]
    v = x.to(wide).clamp(-bound, bound)
    if emin - mantissa_bits > -bias:  # the spacing is a normal number of the wide type
        exponent = (v.view(word) & (2 * bias + 1 << field)).clamp(min=emin + bias << field)
        spacing = exponent - (mantissa_bits << field)
        v = torch.round(v * ((2 * bias << field) - spacing).view(wide)) * spacing.view(wide)
    elif mantissa_bits < field:  # same exponent range as the input (fp32 to bf16): round the word itself
        cut = field - mantissa_bits
        bits = v.view(word)
        rounded = (bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)) >> cut << cut
        v = torch.where(v.isnan(), v, rounded.view(wide))
    return v.to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """The rounding, with the identity as its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float, emin: int, mantissa_bits: int) -> Tensor:
        return _round(x, bound, emin, mantissa_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


class _StraightThroughForward(_StraightThrough):
    """The same with a forward-mode rule, which the compiler does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.view_as(tangent)


def fake_cast(x: Tensor, fmt: ElementFormat | str) -> Tensor:
    """Rounds to the nearest value of a format (ties to even) and saturates; the result stays in `x.dtype`.

    Infinities become the largest finite value, NaN stays NaN, -0 stays -0. One rounding, for float64 too. Where the
    format reaches further than `x.dtype` (bf16 of a float16 tensor) or has finer values at the top (fp16 of a bfloat16
    tensor), the largest value that both can hold is the bound, so that the result is a value of the format.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        fmt: an element format or its name.

    Returns:
        A tensor of the same shape and dtype. Its derivative is the identity (straight through) everywhere.

    Raises:
        ConfigError: an integer, boolean, complex or 8-bit tensor; an unknown name.
    """
    fmt = _checked(x, fmt)
    rule = _StraightThrough if torch.compiler.is_compiling() else _StraightThroughForward
    result: Tensor = rule.apply(x, *_constants(fmt, x.dtype)[1:])  # type: ignore[no-untyped-call]
    return result


def saturating_cast(x: Tensor, fmt: ElementFormat | str) -> Tensor:
    """Like `fake_cast`, with the result in the format's own torch dtype, such as `torch.float8_e4m3fn`.

    Not differentiable: it detaches.

    Raises:
        ConfigError: as `fake_cast`; or torch has no dtype for the format.
    """
    fmt = _checked(x, fmt)
    dtype = getattr(torch, fmt.torch_dtype, None) if fmt.torch_dtype else None
    if not isinstance(dtype, torch.dtype):
        raise ConfigError("torch has no dtype for this format", key="format", value=fmt.name, hint="use fake_cast")
    x = x.detach()
    top, bound, _, mantissa_bits = _constants(fmt, x.dtype)
    if bound < top or _MANTISSA[x.dtype] < mantissa_bits:
        x = x.to(torch.float32)  # exact, and as wide as any format that torch has
    return _round(x, *_constants(fmt, x.dtype)[1:]).to(dtype)


def cast_stats(x: Tensor, fmt: ElementFormat | str) -> tuple[Tensor, Tensor]:
    """What a cast would lose: the share clipped and the share flushed, each a 0-d float32 tensor in [0, 1].

    Clipped: |x| is above the largest value. Flushed: x is not zero and becomes zero. NaN counts as neither; an empty
    tensor gives 0 and 0. No synchronisation with the device.

    Raises:
        ConfigError: as `fake_cast`.
    """
    fmt = _checked(x, fmt)
    x = x.detach()
    top, *rule = _constants(fmt, x.dtype)
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    count = max(x.numel(), 1)
    clipped = (wide.abs() > top).sum()
    flushed = ((x != 0) & (_round(x, *rule) == 0)).sum()
    return clipped.to(torch.float32) / count, flushed.to(torch.float32) / count
