"""Casts of tensors to a format: to values (`fake_cast`), and what they lose (`cast_stats`).

Who computes: on a CPU, in eager mode, the C++ rows of `isoscale.kernels`; on a GPU its Triton kernels; in compiled code
and wherever a kernel does not reach, `reference`, in plain torch. All give the same bits.

What is lost: the sign and payload of a NaN are not promised.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.formats import dispatch, reference
from isoscale.formats.block import BlockFormat, Format, by_name, element_by_name
from isoscale.formats.element import ElementFormat
from isoscale.formats.grid import MANTISSA, Grid, grid_of
from isoscale.formats.layout import axis_of, spec_of, view_of
from isoscale.formats.reference import Cast
from isoscale.formats.rounding import Noise, Stochastic, resolve
from isoscale.formats.tracing import compile_time_constant
from isoscale.kernels.spec import CastSpec

torch.utils._pytree.register_constant(ElementFormat)
torch.utils._pytree.register_constant(BlockFormat)
ClipGradient = Literal["pass", "zero"]


class Facts(NamedTuple):
    """A format in plain numbers.

    Args:
        is_element: an element format, which has no blocks and no scale.
        name: printed, with its rule.
        block: (across, along).
        grid: values of the elements, for one dtype.
        spec: the cast, with a block of one element in it.
    """

    is_element: bool
    name: str
    block: tuple[int, int]
    grid: Grid
    spec: CastSpec


def check_tensor(x: Tensor) -> None:
    """Refuses what cannot be cast.

    Raises:
        ConfigError: x is not a real floating-point tensor.
    """
    if getattr(x, "is_encoded", False):
        raise ConfigError("x is encoded already", key="x", value=repr(x), hint="x.decode() gives its values")
    if not isinstance(x, Tensor):
        raise ConfigError("only tensors can be cast to a format", value=type(x).__name__, key="x")
    if x.dtype not in MANTISSA:
        hint = "x.float() first: float16, bfloat16, float32 and float64 can be cast"
        raise ConfigError("only real floating-point tensors can be cast to a format", value=x.dtype, key="x", hint=hint)


def format_of(fmt: Format | str, scale_rule: str | None = None) -> Format:
    """The format, with a rule put in.

    Raises:
        ConfigError: unknown format; a rule that it cannot use.
    """
    if not isinstance(fmt, ElementFormat | BlockFormat):
        fmt = by_name(fmt)
    if scale_rule is None:
        return fmt
    if isinstance(fmt, ElementFormat):
        hint = "a block format has scales, such as mxfp8_e4m3, mxfp6_e3m2 or mxfp4"
        raise ConfigError(f"{fmt.name} has no scale", key="scale_rule", value=scale_rule, hint=hint)
    return fmt.with_(scale_rule=scale_rule)


@compile_time_constant
def _words(fmt: Format | str, scale_rule: str | None, dtype: torch.dtype) -> str:
    """All that depends on the format, as one line of words.

    One call that the compiler folds, so that no property of a format becomes a symbol of the graph, and words rather
    than numbers, since with dynamic shapes numbers become symbols too. Being registered as a constant, a format is
    guarded by equality: another one recompiles.
    """
    fmt = format_of(fmt, scale_rule)
    element, block = (fmt, (1, 0)) if isinstance(fmt, ElementFormat) else (fmt.element, fmt.block)
    spec = spec_of(fmt, view_of((1, 1), -1, (1, 1)))
    flags = (int(isinstance(fmt, ElementFormat)), int(spec.twos))
    grid = grid_of(element, dtype)
    numbers = (grid.top, grid.bound, grid.emin, grid.mantissa_bits, int(grid.minus_zero), int(grid.powers))
    rest = (spec.bits, spec.bias, spec.emax, spec.scale, spec.rule)
    return " ".join(str(part) for part in (str(fmt).replace(" ", "_"), *block, *flags, *numbers, *rest))


def facts_of(x: Tensor, fmt: Format | str, scale_rule: str | None) -> Facts:
    """The format in plain numbers, for tensors like x.

    Raises:
        ConfigError: as `check_tensor` and `format_of`.
    """
    check_tensor(x)
    if torch.compiler.is_compiling():
        return _facts(_words(fmt, scale_rule, x.dtype))
    return _kept_facts(fmt, scale_rule, x.dtype)


@functools.lru_cache(maxsize=1024)
def _kept_facts(fmt: Format | str, scale_rule: str | None, dtype: torch.dtype) -> Facts:
    """Eager mode asks again with every call."""
    return _facts(_words(fmt, scale_rule, dtype))


def _facts(line: str) -> Facts:
    words = line.split(" ")
    name, across, along, is_element, twos, top, bound, emin, mantissa, minus_zero, powers, *rest = words
    bits, bias, emax, scale, rule = rest
    grid = Grid(float(top), float(bound), int(emin), int(mantissa), minus_zero == "1", powers == "1")
    own = (int(bits), int(mantissa), int(bias), int(emin), int(emax), float(top))
    found = CastSpec(*own, twos == "1", scale, rule, 1, 1)
    return Facts(is_element == "1", name, (int(across), int(along)), grid, found)


def cast_of(x: Tensor, facts: Facts, axis: int, rounding: str, noise: Noise | None, *, values: bool = True) -> Cast:
    """All settings of a cast of x, as numbers.

    Args:
        x: the tensor.
        facts: of the format.
        axis: along which blocks lie.
        rounding: its name.
        noise: for stochastic rounding.
        values: the cast is to values, so that the order of codes does not matter.
    """
    if facts.is_element:
        axis = -1 if values else axis
    elif values and facts.block == (0, 0):
        axis_of(axis, x.dim())  # refuses what is none
        axis = -1  # one block: any order of the elements will do
    view = view_of(tuple(x.shape), axis, facts.block)
    spec = CastSpec(*facts.spec[:-2], view.rows, view.cols)
    return Cast(spec, facts.grid, view, rounding, noise)


class _StraightThrough(torch.autograd.Function):
    """The cast, with the identity as its derivative; zero where it clipped, if asked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tensor_amax: Tensor | None, cast: Cast, clip: bool) -> tuple[Tensor, Tensor | None]:
        if not clip:
            return dispatch.cast_values(x, cast, tensor_amax), None
        y = reference.cast_values(x, cast, tensor_amax)
        return y, reference.kept(x, cast, tensor_amax)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return (grad if kept is None else grad * kept), None, None, None


class _StraightThroughForward(_StraightThrough):
    """The same with a forward-mode rule, which the compiler does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (tangent.view_as(tangent) if kept is None else tangent * kept), None


def _no_derivative(x: Tensor) -> bool:
    """Whether nobody will ask for one: a call of an autograd function costs more than the cast of a small tensor."""
    wanted = x.requires_grad and torch.is_grad_enabled()
    return dispatch.is_plain(x) and not wanted and torch.autograd.forward_ad._current_level < 0


def amax_tensor(tensor_amax: Tensor | float | None, facts: Facts, x: Tensor) -> Tensor | None:
    """The known largest magnitude of the tensor as a 0-d float32 tensor."""
    if tensor_amax is None:
        return None
    if facts.spec.scale != "e4m3":
        hint = "only formats with E4M3 block scales have a scale of the tensor: nvfp4"
        raise ConfigError("this format takes no tensor amax", key="tensor_amax", value=facts.name, hint=hint)
    if isinstance(tensor_amax, Tensor):
        return tensor_amax.detach().to(x.device, torch.float32).reshape(())
    if not 0 <= tensor_amax <= torch.finfo(torch.float32).max:
        raise ConfigError("a largest magnitude is finite and not negative", key="tensor_amax", value=tensor_amax)
    return torch.full((), float(tensor_amax), device=x.device)


def fake_cast(
    x: Tensor, fmt: Format | str, *, axis: int = -1, scale_rule: str | None = None,
    rounding: str | Stochastic = "nearest-even", seed: int | Tensor | None = None,
    clip_gradient: ClipGradient = "pass", tensor_amax: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """The values that x has after a cast to a format and back; the result stays in `x.dtype`.

    Element formats: infinities become the largest finite value, NaN stays NaN, -0 stays -0 where the format has one.
    One rounding, for float64 too. Where the format reaches further than `x.dtype` (bf16 of a float16 tensor) or has
    finer values at the top (fp16 of a bfloat16 tensor), the largest value that both can hold is the bound.

    Block formats: a block with an inf or a NaN becomes all NaN (its scale is NaN); a block of zeros stays zero; a size
    that the block does not divide is padded with 0 and cut again. A value that `x.dtype` cannot hold after decoding
    becomes inf, as in any cast.

    Args:
        x: any shape; float16, bfloat16, float32 or float64.
        fmt: a format or its name, such as `e4m3`, `mxfp6_e3m2` or `mxfp4/rceil`.
        axis: along which the blocks lie; element formats ignore it.
        scale_rule: in place of the format's own: `floor`, `ceil`, `even`, `rceil` or `amax`.
        rounding: `nearest-even`, `toward-zero`, `up`, `down`, `nearest-away`, `stochastic`, or a `Stochastic`.
        seed: for `stochastic`; the bits depend on it and on an element's index in x alone.
        clip_gradient: the derivative is 1 (straight through); `zero` makes it 0 where a value was clipped.
        tensor_amax: the largest magnitude of the tensor if it is known, for `nvfp4`.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ConfigError: an integer, boolean, complex or 8-bit tensor; an unknown name, rule, rounding or axis.
    """
    facts = facts_of(x, fmt, scale_rule)
    if clip_gradient not in ("pass", "zero"):
        hint = did_you_mean(str(clip_gradient), ("pass", "zero"))
        raise ConfigError("no such clip gradient", key="clip_gradient", value=clip_gradient, hint=hint)
    name, noise = resolve(rounding, seed, tuple(x.shape))
    cast = cast_of(x, facts, axis, name, noise)
    known = amax_tensor(tensor_amax, facts, x)
    if x.numel() == 0:
        return x.clone()
    if clip_gradient == "pass" and not torch.compiler.is_compiling() and _no_derivative(x):
        return dispatch.cast_values(x, cast, known)
    rule = _StraightThrough if torch.compiler.is_compiling() else _StraightThroughForward
    result: Tensor = rule.apply(x, known, cast, clip_gradient == "zero")[0]  # type: ignore[no-untyped-call]
    return result


def saturating_cast(x: Tensor, fmt: Format | str) -> Tensor:
    """Like `fake_cast` to an element format, with the result in torch's own dtype, such as `torch.float8_e4m3fn`.

    Not differentiable: it detaches.

    Raises:
        ConfigError: as `fake_cast`; or torch has no dtype for the format.
    """
    fmt = element_by_name(fmt) if isinstance(fmt, str) else fmt
    check_tensor(x)
    if not isinstance(fmt, ElementFormat):
        raise ConfigError("torch has no dtype for a block format", key="format", value=str(fmt), hint="use encode")
    dtype = getattr(torch, fmt.torch_dtype, None) if fmt.torch_dtype else None
    if not isinstance(dtype, torch.dtype):
        raise ConfigError("torch has no dtype for this format", key="format", value=fmt.name, hint="use fake_cast")
    x = x.detach()
    grid = facts_of(x, fmt, None).grid
    if grid.bound < grid.top or MANTISSA[x.dtype] < grid.mantissa_bits:
        x = x.to(torch.float32)  # exact, and as wide as any format that torch has
    return fake_cast(x, fmt).to(dtype)


def cast_stats(
    x: Tensor, fmt: Format | str, *, axis: int = -1, scale_rule: str | None = None
) -> tuple[Tensor, Tensor]:
    """What a cast to nearest would lose: the shares clipped and flushed, each a 0-d float32 tensor in [0, 1].

    Clipped: |x| is above the largest value, of the format or of its block. Flushed: x is not zero and becomes zero.
    Elements of blocks with inf or NaN, and NaN itself, count as neither; an empty tensor gives 0 and 0. No
    synchronisation with the device.

    Raises:
        ConfigError: as `fake_cast`.
    """
    cast = cast_of(x, facts_of(x, fmt, scale_rule), axis, "nearest-even", None)
    x = x.detach()
    if x.numel() == 0:
        return torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    clipped = reference.kept(x, cast, None, top=True).logical_not()
    flushed = (x != 0) & (dispatch.cast_values(x, cast, None) == 0)
    return clipped.sum().to(torch.float32) / x.numel(), flushed.sum().to(torch.float32) / x.numel()
