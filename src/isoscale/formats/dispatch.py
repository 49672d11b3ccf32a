"""Who computes a cast: a kernel where one reaches, else the reference. The bits are the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from isoscale.formats import reference
from isoscale.formats.codes import from_codes, pack, to_codes, unpack
from isoscale.formats.element import ElementFormat
from isoscale.formats.layout import from_blocks, from_matrix, to_blocks
from isoscale.formats.reference import Cast
from isoscale.formats.scales import stored_to_factor
from isoscale.kernels.spec import CastSpec

try:
    from isoscale.kernels import cpu, triton_cast
except ImportError:
    cpu = triton_cast = None  # TEMPORARY

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


class Encoded(NamedTuple):
    """Packed codes uint8 [L, R, bytes], scales [L, Rb, K] or None, 0-d tensor scale or None."""

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None


def _is_plain(x: Tensor) -> bool:
    """Whether x is memory, and not a tensor of a transform, a trace or a mode."""
    return (
        type(x) in _PLAIN
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and _get_current_dispatch_mode() is None
        and x.layout == torch.strided
    )


def engine(x: Tensor, cast: Cast) -> str:
    """`cpp`, `triton` or `torch`."""
    spec, noise = cast.spec, cast.noise
    if not (cast.grid.minus_zero or spec.twos):
        return "torch"
    if x.dtype not in _KERNEL_DTYPES or cast.grid.powers or spec.bits > 8 or spec.emax > 60 or x.numel() == 0:
        return "torch"
    if noise is not None and (noise.offset(tuple(x.shape)) is None or cast.view.moved):
        return "torch"
    if x.device.type == "cuda":
        covered = triton_cast.available() and triton_cast.covers(spec, cast.view.strided)
        return "triton" if covered and (torch.compiler.is_compiling() or _is_plain(x)) else "torch"
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not _is_plain(x):
        return "torch"
    return "cpp" if cpu is not None and cpu.available() else "torch"


def _arguments(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a kernel takes."""
    noise, keys = cast.noise, None
    if noise is not None:
        keys = (int(noise.key[0]), int(noise.key[1]))
    dense = (x.movedim(cast.view.axis, -1) if cast.view.moved else x).contiguous()
    return (dense, cast.spec, cast.view.shape, cast.view.strided), {
        "rounding": cast.rounding, "keys": keys, "random_bits": noise.bits if noise else 0,
        "offset": noise.offset(tuple(x.shape)) if noise else 0,
        "tensor_amax": None if tensor_amax is None else float(tensor_amax),
    }  # fmt: skip


def cast_values(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> Tensor:
    """Values after a round trip, in the dtype of x."""
    chosen = engine(x, cast)
    if chosen == "torch":
        if torch.compiler.is_compiling() or not _is_plain(x) or x.device.type != "cpu":
            return reference.cast_values(x, cast, tensor_amax)
        return reference.cast_values_in_pieces(x, cast, tensor_amax)
    arguments, named = _arguments(x, cast, tensor_amax)
    y: Tensor = (cpu if chosen == "cpp" else triton_cast).fake_cast(*arguments, **named)
    return from_matrix(y, cast.view, tuple(x.shape)) if cast.view.moved else y.view(x.shape)


def encode(x: Tensor, cast: Cast, element: ElementFormat, tensor_amax: Tensor | None) -> Encoded:
    """Packed codes and scales.

    Returns:
        codes uint8 [L, R, bytes], scales [L, Rb, K] (None for an element format), 0-d tensor scale (E4M3 scales only).
    """
    chosen = engine(x, cast)
    if chosen == "torch":
        rounded = reference.cast_codes(x, cast, tensor_amax)
        codes = pack(to_codes(rounded.values, element), element.bits)
        scales = rounded.scales
        return Encoded(codes, scales.stored if scales else None, scales.tensor if scales else None)
    arguments, named = _arguments(x, cast, tensor_amax)
    nan = element.nan_codes[0][-1] if element.nan_codes[0] else -1
    kernel = cpu if chosen == "cpp" else triton_cast
    return Encoded(*kernel.encode(*arguments, **named, nan_code=nan))


def decode(
    parts: Encoded, element: ElementFormat, spec: CastSpec, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Values [L, R, n] of packed codes, in a dtype."""
    codes, scales, tensor = parts
    plain = _is_plain(codes) and not torch.compiler.is_compiling() and codes.numel() > 0
    fast = plain and dtype in _KERNEL_DTYPES and element.layout != "scale" and element.emax <= 60
    if fast and codes.device.type == "cpu" and cpu is not None and cpu.available():
        dense = (codes.contiguous(), None if scales is None else scales.contiguous(), tensor)
        return cpu.decode(*dense, spec, shape, dtype, element.specials)  # type: ignore[no-any-return]
    width = shape[2] if spec.scale == "none" else -(-shape[2] // spec.cols) * spec.cols
    values = from_codes(unpack(codes, element.bits, width), element)
    if scales is not None:
        grow = stored_to_factor(scales, spec.scale, tensor)
        values = to_blocks(values, spec.rows, spec.cols) * grow[:, :, None, :, None]
        values = from_blocks(values, shape[1], width)
    return values[..., : shape[2]].to(dtype)
