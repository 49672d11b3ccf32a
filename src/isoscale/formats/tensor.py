"""Codes and scales as one tensor: `encode` makes a `BlockTensor`, `.decode()` gives the values back.

A wrapper subclass that the compiler takes apart (`__tensor_flatten__`), so it goes in and out of compiled functions. It
keeps the logical shape and dtype of what was encoded. Transposes, and slices that start where a block starts, are exact
and only rearrange codes and scales; everything else is refused with the hint to decode. Two encodings along different
axes are different tensors: re-encode from high precision, never from codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoscale._base.errors import ConfigError
from isoscale.formats import dispatch
from isoscale.formats.block import BlockFormat, Format
from isoscale.formats.cast import amax_tensor, cast_of, facts_of, format_of
from isoscale.formats.codes import GROUP, row_bytes, unpack
from isoscale.formats.element import ElementFormat
from isoscale.formats.layout import View, axis_of, spec_of, view_of
from isoscale.formats.rounding import Stochastic, resolve


class BlockTensor(Tensor):
    """Codes and scales of a tensor.

    Attributes:
        codes: uint8, packed; the logical shape with the blocked axis moved to the last place, where it has
            `row_bytes(blocks x block, bits)` bytes.
        scales: uint8 (E8M0, E4M3) or float32; like `codes`, with one number for each block (tiles: for each tile also
            across); None for an element format.
        tensor_scale: 0-d float32 for E4M3 scales, else None.
        format: the format, with its rule.
        axis: of the logical shape, not negative, along which the blocks lie.
    """

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None
    format: Format
    axis: int
    is_encoded = True

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None, format: Format, axis: int,
        shape: Sequence[int], dtype: torch.dtype,
    ) -> BlockTensor:  # fmt: skip
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=codes.device)

    def __init__(
        self, codes: Tensor, scales: Tensor | None, tensor_scale: Tensor | None, format: Format, axis: int,
        shape: Sequence[int], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.codes, self.scales, self.tensor_scale = codes, scales, tensor_scale
        self.format, self.axis = format, axis

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        parts = [name for name in ("codes", "scales", "tensor_scale") if getattr(self, name) is not None]
        return parts, (self.format, self.axis, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: tuple[Any, ...], size: Any, stride: Any) -> BlockTensor:
        fmt, axis, dtype = meta
        return BlockTensor(
            parts["codes"], parts.get("scales"), parts.get("tensor_scale"), fmt, axis, size, dtype
        )  # fmt: skip

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for torch's cache of compiled graphs."""
        parts = [(tuple(p.shape), p.stride(), p.dtype) for p in (self.codes, self.scales) if p is not None]
        return repr((type(self).__name__, self.format, self.axis, tuple(self.shape), self.dtype, self.device, parts))

    @property
    def element(self) -> ElementFormat:
        """Format of the elements."""
        return self.format if isinstance(self.format, ElementFormat) else self.format.element

    @property
    def view_(self) -> View:
        """How the logical tensor is cut into blocks."""
        return block_view(tuple(self.shape), self.format, self.axis)

    def nbytes_stored(self) -> int:
        """Bytes of codes, scales and the tensor scale."""
        parts = (self.codes, self.scales, self.tensor_scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def unpacked(self) -> Tensor:
        """The codes, one to a byte: uint8, the logical shape with the blocked axis moved to the last place."""
        count = self.shape[self.axis] if self.dim() else 1
        return unpack(self.codes, self.element.bits, count)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in `dtype` (by default that of the tensor that was encoded); not differentiable."""
        dtype = dtype or self.dtype
        shape = tuple(self.shape)
        if self.numel() == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        view = self.view_
        batch, height, width = view.matrix
        codes = self.codes.reshape(batch, height, self.codes.shape[-1])
        scales = None
        if self.scales is not None:
            scales = self.scales.reshape(batch, -(-height // view.rows), -(-width // view.cols))
        parts = dispatch.Encoded(codes, scales, self.tensor_scale)
        wanted = torch.float32 if dtype == torch.float64 else dtype
        values = dispatch.decode(parts, self.element, spec_of(self.format, view), (batch, height, width), wanted)
        moved = values.reshape(*_others(shape, self.axis), width).movedim(-1, self.axis if shape else 0)
        return moved.reshape(shape).to(dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        bits = 8 * self.nbytes_stored() / max(self.numel(), 1)
        head = f"BlockTensor({list(self.shape)}, {self.format}, axis={self.axis}, {bits:.4g} bits a value"
        return head + f", {str(self.dtype).removeprefix('torch.')}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from isoscale.formats.tensor_ops import OPS

        found = OPS.get(func)
        if found is None:
            hint = ".decode() gives a plain tensor"
            raise ConfigError(f"{func} is not exact on codes", key="BlockTensor", value=str(func), hint=hint)
        return found(*args, **(kwargs or {}))


def _others(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def block_view(shape: tuple[int, ...], fmt: Format, axis: int) -> View:
    """The view of a stored tensor: codes are contiguous along the axis, so it is never strided."""
    shape = shape or (1,)
    block = (1, 0) if isinstance(fmt, ElementFormat) else fmt.block
    others = _others(shape, axis)
    return view_of((*others, shape[axis]), -1, block)


def encode(
    x: Tensor, fmt: Format | str, *, axis: int = -1, scale_rule: str | None = None,
    rounding: str | Stochastic = "nearest-even", seed: int | Tensor | None = None,
    tensor_amax: Tensor | float | None = None,
) -> BlockTensor:  # fmt: skip
    """Codes and scales of x: what real hardware stores. `.decode()` gives exactly the values of `fake_cast`.

    The arguments are those of `fake_cast`; the elements have 4, 6 or 8 bits.

    Returns:
        A `BlockTensor` of the shape and dtype of x; not differentiable.

    Raises:
        ConfigError: as `fake_cast`; a format wider than 8 bits; a NaN for an element format that has no code for it.
    """
    facts = facts_of(x, fmt, scale_rule)
    fmt = format_of(fmt, scale_rule)
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    if element.bits not in GROUP:
        hint = f"x.to(torch.{element.torch_dtype})" if element.torch_dtype else "a format of 4, 6 or 8 bits"
        raise ConfigError("only 4-, 6- and 8-bit elements are stored as codes", key="format", value=fmt.name, hint=hint)
    x = x.detach()
    shape = tuple(x.shape)
    axis = axis_of(axis, x.dim())
    name, noise = resolve(rounding, seed, shape)
    cast = cast_of(x, facts, axis, name, noise, values=False)
    known = amax_tensor(tensor_amax, facts, x)
    if x.numel() == 0:
        return _empty(x, fmt, axis, element)
    if isinstance(fmt, ElementFormat) and not fmt.has_nan:
        _refuse_nan(x, fmt)
    return _assembled(dispatch.encode(x, cast, element, known), x, fmt, axis, cast.view.rows)


def encode_both(
    x: Tensor, fmt: Format | str, *, scale_rule: str | None = None, rounding: str | Stochastic = "nearest-even",
    seed: int | Tensor | None = None,
) -> tuple[BlockTensor, BlockTensor]:  # fmt: skip
    """A matrix encoded along its last axis and along its first, both from high precision: what training needs.

    On a GPU one kernel makes both from one read. The arguments are those of `encode`.

    Returns:
        `encode(x, fmt, axis=-1)` and `encode(x, fmt, axis=-2)`.

    Raises:
        ConfigError: as `encode`; x is no matrix.
    """
    facts = facts_of(x, fmt, scale_rule)
    if x.dim() != 2:
        raise ConfigError("only a matrix has rows and columns", key="x", value=tuple(x.shape), hint="x.flatten(0, -2)")
    fmt = format_of(fmt, scale_rule)
    x = x.detach()
    name, noise = resolve(rounding, seed, tuple(x.shape))
    both = None
    if isinstance(fmt, BlockFormat):
        both = dispatch.encode_both(x, cast_of(x, facts, -1, name, noise, values=False), fmt.element)
    if both is not None:
        return _assembled(both[0], x, fmt, 1, 1), _assembled(both[1], x, fmt, 0, 1)
    along = {"rounding": rounding, "seed": seed}
    return encode(x, fmt, axis=-1, **along), encode(x, fmt, axis=-2, **along)  # type: ignore[arg-type]


def _assembled(parts: dispatch.Encoded, x: Tensor, fmt: Format, axis: int, rows: int) -> BlockTensor:
    """[L, R, ...] parts as a tensor of the shape of x."""
    shape = tuple(x.shape)
    others = _others(shape or (1,), axis)
    codes = parts.codes.reshape(*others, parts.codes.shape[-1])
    scales = parts.scales
    if scales is not None:
        lead = others if rows == 1 else (*others[:-1], scales.shape[1])
        if isinstance(fmt, BlockFormat) and fmt.block == (0, 0):
            lead = (1,) * len(others)
        scales = scales.reshape(*lead, scales.shape[2])
    return BlockTensor(codes, scales, parts.tensor_scale, fmt, axis, shape, x.dtype)


def _refuse_nan(x: Tensor, fmt: ElementFormat) -> None:
    """Such a NaN would silently become a number."""
    if torch.compiler.is_compiling() or x.is_meta or not dispatch.is_plain(x):
        return
    if bool(x.isnan().any()):
        raise ConfigError(
            f"x holds NaN, for which {fmt.name} has no code", key="x", hint="a block format keeps it: its scale is NaN"
        )


def _empty(x: Tensor, fmt: Format, axis: int, element: ElementFormat) -> BlockTensor:
    others = _others(tuple(x.shape) or (1,), axis)
    codes = torch.empty((*others, row_bytes(x.shape[axis], element.bits)), dtype=torch.uint8, device=x.device)
    scales = tensor = None
    if isinstance(fmt, BlockFormat):
        dtype = torch.float32 if fmt.scale == "fp32" else torch.uint8
        count = -(-x.shape[axis] // max(fmt.block[1], 1))
        scales = torch.empty((*others, count), dtype=dtype, device=x.device)
        tensor = torch.ones((), device=x.device) if fmt.scale == "e4m3" else None
    return BlockTensor(codes, scales, tensor, fmt, axis, tuple(x.shape), x.dtype)
