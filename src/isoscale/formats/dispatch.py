"""Who computes a cast: a kernel where one reaches, else the reference. The bits are the same.

Compiled code calls the kernels through the operators of `ops`, which the compiler does not look into (on a GPU it would
contract products and sums, and divide less exactly). Under vmap, forward mode and other transforms, on fake tensors,
and for what no kernel covers (float64, formats wider than 8 bits, FNUZ, pieces that do not lie side by side under
stochastic rounding) the reference computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from isoscale.formats import ops, reference
from isoscale.formats.codes import GROUP, from_codes, pack, to_codes, unpack
from isoscale.formats.element import ElementFormat
from isoscale.formats.layout import from_blocks, to_blocks
from isoscale.formats.reference import Cast
from isoscale.formats.scales import stored_to_factor
from isoscale.formats.tracing import compile_time_constant
from isoscale.kernels import cpu, triton_cast
from isoscale.kernels.spec import CastSpec

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


class Encoded(NamedTuple):
    """Packed codes uint8 [L, R, bytes], scales [L, Rb, K] or None, 0-d tensor scale or None."""

    codes: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None


def is_plain(x: Tensor) -> bool:
    """Whether x is memory in eager mode, and not a tensor of a transform, a trace or a mode."""
    return (
        type(x) in _PLAIN
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and _get_current_dispatch_mode() is None
        and x.layout == torch.strided
        and not x.is_meta
    )


@compile_time_constant
def kernel_for(device: str) -> str:
    """`cpp`, `triton` or `torch`: who casts on a device type here."""
    if device == "cpu" and cpu.available():
        return "cpp"
    return "triton" if device == "cuda" and triton_cast.available() else "torch"


def engine(x: Tensor, cast: Cast) -> str:
    """`cpp`, `triton` or `torch`: who casts this tensor."""
    spec, noise = cast.spec, cast.noise
    if not (cast.grid.minus_zero or spec.twos) or spec.bits not in GROUP or spec.emax > 60 or cast.grid.powers:
        return "torch"
    if x.dtype not in _KERNEL_DTYPES or (noise is not None and cast.view.moved):
        return "torch"
    if noise is not None and noise.offset(tuple(x.shape)) is None:
        return "torch"
    if not torch.compiler.is_compiling() and not is_plain(x):
        return "torch"
    found: str = kernel_for(x.device.type)
    return "torch" if found == "triton" and not triton_cast.covers(spec, cast.view.strided) else found


def _dense(x: Tensor, cast: Cast) -> Tensor:
    return (x.movedim(cast.view.axis, -1) if cast.view.moved else x).contiguous()


def _settings(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> dict[str, Any]:
    """What a kernel takes beside tensor, spec and shape."""
    noise = cast.noise
    return {
        "rounding": cast.rounding,
        "keys": None if noise is None else (int(noise.key[0]), int(noise.key[1])),
        "random_bits": noise.bits if noise else 23,
        "offset": (noise.offset(tuple(x.shape)) or 0) if noise else 0,
        "tensor_amax": None if tensor_amax is None else float(tensor_amax),
    }


def operands(x: Tensor, cast: Cast, tensor_amax: Tensor | None, kernel: str) -> tuple[Any, ...]:
    """What both operators take first."""
    spec, noise, keys = cast.spec, cast.noise, None
    if noise is not None:
        keys = torch.stack([torch.as_tensor(key, dtype=torch.int64, device="cpu") for key in noise.key])
    numbers = [spec.bits, spec.mantissa_bits, spec.bias, spec.emin, spec.emax, int(spec.twos), spec.rows, spec.cols]
    names = f"{spec.scale} {spec.rule} {cast.rounding} {kernel}"
    offset = (noise.offset(tuple(x.shape)) or 0) if noise else 0
    bits = noise.bits if noise else 23
    where = (list(cast.view.shape), cast.view.strided)
    return _dense(x, cast), numbers, spec.max, names, *where, bits, offset, keys, tensor_amax


def _is_bf16(cast: Cast) -> bool:
    nearest = cast.rounding == "nearest-even" and cast.spec.scale == "none"
    return nearest and cast.grid.minus_zero and (cast.grid.mantissa_bits, cast.grid.emin) == (7, -126)


def cast_values(x: Tensor, cast: Cast, tensor_amax: Tensor | None) -> Tensor:
    """Values after a round trip, in the dtype of x."""
    chosen = engine(x, cast)
    compiling = torch.compiler.is_compiling()
    if chosen == "torch":
        if compiling or not is_plain(x):
            return reference.cast_values(x, cast, tensor_amax)
        if _is_bf16(cast) and x.dtype == torch.float32:  # torch's own cast, once nothing can overflow; the same bits
            return x.clamp(-cast.grid.bound, cast.grid.bound).to(torch.bfloat16).to(torch.float32)
        if x.device.type != "cpu":
            return reference.cast_values(x, cast, tensor_amax)
        return reference.cast_values_in_pieces(x, cast, tensor_amax)
    if compiling:
        y: Tensor = ops.cast_values(*operands(x, cast, tensor_amax, chosen))
    else:
        settings = _settings(x, cast, tensor_amax)
        y = ops.KERNELS[chosen].fake_cast(_dense(x, cast), cast.spec, cast.view.shape, cast.view.strided, **settings)
    return y.movedim(-1, cast.view.axis) if cast.view.moved else y.view(x.shape)


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
    nan_code = -1 if element.nan_code is None else element.nan_code
    if torch.compiler.is_compiling():
        parts = ops.encode(*operands(x, cast, tensor_amax, chosen), nan_code)
        has = (cast.spec.scale != "none", cast.spec.scale == "e4m3")
        return Encoded(parts[0], parts[1] if has[0] else None, parts[2] if has[1] else None)
    settings = _settings(x, cast, tensor_amax)
    where = (cast.spec, cast.view.shape, cast.view.strided)
    return Encoded(*ops.KERNELS[chosen].encode(_dense(x, cast), *where, **settings, nan_code=nan_code))


def decode(
    parts: Encoded, element: ElementFormat, spec: CastSpec, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Values [L, R, n] of packed codes, in a dtype."""
    codes, scales, tensor = parts
    plain = not torch.compiler.is_compiling() and is_plain(codes) and codes.numel() > 0
    if plain and dtype in _KERNEL_DTYPES and element.layout != "scale" and element.emax <= 60:
        chosen = kernel_for(codes.device.type)
        if chosen == "cpp" or (chosen == "triton" and triton_cast.covers(spec, False)):
            dense = (codes.contiguous(), None if scales is None else scales.contiguous(), tensor)
            values: Tensor = ops.KERNELS[chosen].decode(*dense, spec, shape, dtype, element.specials)
            return values
    width = shape[2] if spec.scale == "none" else -(-shape[2] // spec.cols) * spec.cols
    out = from_codes(unpack(codes, element.bits, width), element)
    if scales is not None:
        grow = stored_to_factor(scales, spec.scale, tensor)
        out = from_blocks(to_blocks(out, spec.rows, spec.cols) * grow[:, :, None, :, None], shape[1], width)
    return out[..., : shape[2]].to(dtype)




def encode_both(x: Tensor, cast: Cast, element: ElementFormat) -> tuple[Encoded, Encoded] | None:
    """Along the rows and along the columns of a matrix [R, n] from one read; None where no kernel does that.

    Args:
        x: 2-D.
        cast: along its last axis.
        element: format of the elements.
    """
    spec = cast.spec
    blocks = spec.rows == 1 and spec.cols in (4, 8, 16, 32, 64) and spec.scale != "none"
    if torch.compiler.is_compiling() or not blocks or engine(x, cast) != "triton":
        return None
    settings = _settings(x, cast, None)
    del settings["tensor_amax"]
    nan_code = -1 if element.nan_code is None else element.nan_code
    shape = (x.shape[0], x.shape[1])
    rows, columns = triton_cast.encode_both(x.contiguous(), spec, shape, **settings, nan_code=nan_code)
    return Encoded(*rows), Encoded(*columns)
