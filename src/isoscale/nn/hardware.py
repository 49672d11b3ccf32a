"""Low-precision tensor cores through `torch.nn.functional.scaled_mm`: which kinds there are, who has them, how to call.

A kind is a pair of operand formats that one kernel multiplies. Operands are encoded by `isoscale.formats` (the same
codes as everywhere) and their scales laid out as cuBLAS wants them: per row as columns, 1 x 128 blocks with the rows
running fastest, 128 x 128 blocks padded to four, MX and NVFP4 scales in tiles of 128 x 4 ("swizzled").

`fp8` and `fp8_row` also run on a CPU, in torch's reference loop, which is the oracle of the tests.
NEVER RUN ON HARDWARE YET: the layouts of `fp8_block`, `mxfp8`, `mxfp4` and `nvfp4` follow torch's own tests of its
kernels and cuBLAS's documentation; the tests marked `gpu` hold them against the emulation where such a device is found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from isoscale.formats import BlockFormat, ElementFormat, Format, Stochastic, encode


class Kind(NamedTuple):
    """A family of kernels.

    Args:
        name: `fp8` (a plain cast, or one scale per tensor), `fp8_row`, `fp8_block`, `mxfp8`, `mxfp4`, `nvfp4`.
        capability: the least compute capability.
        only: whether it runs on exactly that major version and no later one.
        cuda: the least CUDA version.
        multiple: what the two feature sizes of a layer must be a multiple of.
    """

    name: str
    capability: tuple[int, int]
    only: bool
    cuda: tuple[int, int]
    multiple: int


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp8", (8, 9), False, (12, 0), 16),
        Kind("fp8_row", (9, 0), False, (12, 0), 16),
        Kind("fp8_block", (9, 0), True, (12, 9), 128),
        Kind("mxfp8", (10, 0), False, (12, 8), 32),
        Kind("mxfp4", (10, 0), False, (12, 8), 32),
        Kind("nvfp4", (10, 0), False, (12, 8), 32),
    )
}
_FAMILY = {
    ((0, 0), "fp32"): "fp8", ((1, 0), "fp32"): "fp8_row", ((1, 128), "fp32"): "fp8_block",
    ((128, 128), "fp32"): "fp8_block", ((1, 32), "e8m0"): "mxfp", ((1, 16), "e4m3"): "nvfp4",
    ((16, 16), "e4m3"): "nvfp4",
}  # fmt: skip
_FP8 = ("e4m3", "e5m2")


def family(fmt: Format | None) -> str | None:
    """The kind whose kernels take operands of that format."""
    if fmt is None:
        return None
    element = fmt.element.name if isinstance(fmt, BlockFormat) else fmt.name
    found = _FAMILY.get((fmt.block, fmt.scale)) if isinstance(fmt, BlockFormat) else "fp8"
    if found == "mxfp":
        return "mxfp8" if element in _FP8 else "mxfp4" if element == "e2m1" else None
    wanted = ("e2m1",) if found == "nvfp4" else _FP8
    return found if element in wanted else None


def kind_of(left: Format | None, right: Format | None) -> str | None:
    """The kind that multiplies a pair of operands, or None: mixed kinds, E5M2 x E5M2, two tiled operands."""
    kinds = {family(left), family(right)}
    elements = [fmt.element.name if isinstance(fmt, BlockFormat) else fmt.name for fmt in (left, right) if fmt]
    if len(kinds) > 1 or elements == ["e5m2", "e5m2"]:
        return None
    if isinstance(left, BlockFormat) and isinstance(right, BlockFormat) and left.block == right.block == (128, 128):
        return None
    if isinstance(left, BlockFormat) != isinstance(right, BlockFormat):
        return None  # a plain cast beside a scaled one: no recipe asks for it
    return kinds.pop()


def why_not(kind: str, device: torch.device) -> str:
    """Why a device has no such kernels; empty where it has."""
    row = KINDS[kind]
    if device.type != "cuda":
        return f"{kind} runs on CUDA devices, this is {device.type}"
    found = torch.cuda.get_device_capability(device)
    need = ".".join(map(str, row.capability))
    if found < row.capability or (row.only and found[0] != row.capability[0]):
        exactly = "exactly " if row.only else ""
        return f"{kind} needs compute capability {exactly}{need}, this device has {found[0]}.{found[1]}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < row.cuda:
        return f"{kind} needs CUDA {row.cuda[0]}.{row.cuda[1]}, torch was built with {torch.version.cuda}"
    return ""


def capabilities(device: torch.device) -> dict[str, str]:
    """Kind -> why the device has it not, empty where it has."""
    return {kind: why_not(kind, device) for kind in KINDS}


class Codes(NamedTuple):
    """An operand for a kernel.

    Args:
        codes: [rows, k] in the element's dtype, k padded with zeros to what the kernel wants (FP4: two to a byte).
        scales: as the kernel wants them.
        tensor_scale: 0-d float32, NVFP4 only.
        format: what it was encoded to.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: BlockFormat


def swizzle(scales: Tensor) -> Tensor:
    """Block scales [rows, blocks] in the order in which cuBLAS reads them, flat; padded with 0.

    Tiles of 128 rows x 4 blocks; within a tile row r, block c stands at (r % 32) * 16 + (r // 32) * 4 + c
    (cuBLAS documentation, "1D block scaling factors layout").
    """
    rows, blocks = scales.shape
    padded = torch_f.pad(scales, (0, -blocks % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def encode_operand(x: Tensor, fmt: BlockFormat, axis: int, rounding: str | Stochastic = "nearest-even") -> Codes:
    """A matrix as codes and scales for a kernel.

    Args:
        x: [rows, k] for axis -1, [k, rows] for -2.
        fmt: of the operand.
        axis: the contraction axis.
        rounding: of the elements.
    """
    block = encode(x, fmt, axis=axis, rounding=rounding)
    codes, scales = block.codes, block.scales
    assert scales is not None
    kind = family(fmt)
    if fmt.element.bits == 4:
        codes = torch_f.pad(codes, (0, -codes.shape[-1] % 16)).view(torch.float4_e2m1fn_x2)
    else:
        codes = torch_f.pad(codes, (0, -codes.shape[-1] % 16)).view(getattr(torch, fmt.element.torch_dtype))
    if kind == "fp8":
        scales = scales.reshape(1)
    elif kind == "fp8_row":
        scales = scales.reshape(-1, 1)
    elif kind == "fp8_block" and fmt.block[0] == 1:
        scales = scales.t().contiguous().t()
    elif kind == "fp8_block":
        scales = torch_f.pad(scales, (0, -scales.shape[-1] % 4)).t()
    else:
        if fmt.block[0] > 1:  # a tile's scale is that of each of its rows
            scales = scales.repeat_interleave(fmt.block[0], 0)[: codes.shape[0]]
        dtype = torch.float8_e8m0fnu if fmt.scale == "e8m0" else torch.float8_e4m3fn
        scales = swizzle(scales).view(dtype)
    return Codes(codes, scales, block.tensor_scale, fmt)


def _fp8_codes(x: Tensor | Codes, fmt: Format | None) -> Tensor:
    """Values on the grid as codes, contiguous, k padded to 16."""
    assert isinstance(x, Tensor)
    assert isinstance(fmt, ElementFormat)
    dtype: torch.dtype = getattr(torch, fmt.torch_dtype)
    return torch_f.pad(x, (0, -x.shape[-1] % 16)).to(dtype).contiguous()


def _recipe(codes: Codes) -> tuple[list[Tensor], list[Any], list[Any]]:
    """Scales, how they scale, and how they are laid out, as `scaled_mm` takes them."""
    how, order = torch_f.ScalingType, torch_f.SwizzleType
    kind = family(codes.format)
    if kind == "nvfp4":
        assert codes.tensor_scale is not None
        scales = [codes.scales, codes.tensor_scale.reshape(1)]
        return scales, [how.BlockWise1x16, how.TensorWise], [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
    if kind in ("mxfp8", "mxfp4"):
        return [codes.scales], [how.BlockWise1x32], [order.SWIZZLE_32_4_4]
    named = {"fp8": how.TensorWise, "fp8_row": how.RowWise}
    tile = how.BlockWise1x128 if codes.format.block[0] == 1 else how.BlockWise128x128
    return [codes.scales], [named.get(kind or "", tile)], [order.NO_SWIZZLE]


def multiply(
    left: Tensor | Codes, right: Tensor | Codes, pair: tuple[Format | None, Format | None], alpha: float
) -> Tensor:
    """alpha * left @ right^T of [m, k] and [n, k], by one kernel.

    Args:
        left: [m, k] as codes; or values on the grid of an FP8 element, which need no scale.
        right: [n, k], likewise.
        pair: the two formats.
        alpha: a plain factor; rides in a float32 scale where there is one.

    Returns:
        [m, n] bfloat16 (float32 on a CPU).
    """
    device = left.device if isinstance(left, Tensor) else left.codes.device
    out_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(left, Codes) or not isinstance(right, Codes):
        one = torch.ones((), device=device)
        a, b = _fp8_codes(left, pair[0]), _fp8_codes(right, pair[1])
        return torch._scaled_mm(a, b.t(), scale_a=one * alpha, scale_b=one, out_dtype=out_dtype)
    if left.tensor_scale is not None:
        left, alpha = left._replace(tensor_scale=left.tensor_scale * alpha), 1.0
    elif left.scales.dtype == torch.float32:
        left, alpha = left._replace(scales=left.scales * alpha), 1.0
    a_scales, a_how, a_order = _recipe(left)
    b_scales, b_how, b_order = _recipe(right)
    if family(right.format) == "fp8_row":
        b_scales = [b_scales[0].t()]
    out = torch_f.scaled_mm(
        left.codes, right.codes.t(), a_scales, a_how, b_scales, b_how, a_order, b_order, output_dtype=out_dtype
    )
    return out if alpha == 1 else out * alpha
