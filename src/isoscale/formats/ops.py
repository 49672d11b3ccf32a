"""The kernels as operators of torch, `isoscale::cast_values` and `isoscale::encode`, for compiled code.

An operator takes numbers and tensors only, so a cast goes in as lists of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoscale.formats.codes import row_bytes
from isoscale.kernels import cpu, triton_cast
from isoscale.kernels.spec import CastSpec

KERNELS = {"cpp": cpu, "triton": triton_cast}


def _unpacked(
    spec: list[int], top: float, names: str, shape: list[int], keys: Tensor | None, tensor_amax: Tensor | None,
    random_bits: int, offset: int,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What a kernel takes, from what an operator can take."""
    bits, mantissa, bias, emin, emax, twos, rows, cols = spec
    scale, rule, rounding, kernel = names.split()
    found = CastSpec(bits, mantissa, bias, emin, emax, top, bool(twos), scale, rule, rows, cols)
    settings = {
        "rounding": rounding, "random_bits": random_bits, "offset": offset,
        "keys": None if keys is None else tuple(keys.tolist()),
        "tensor_amax": None if tensor_amax is None else float(tensor_amax),
    }  # fmt: skip
    return KERNELS[kernel], (found, tuple(shape)), settings


@torch.library.custom_op("isoscale::cast_values", mutates_args=())
def cast_values(
    x: Tensor, spec: list[int], top: float, names: str, shape: list[int], strided: bool, random_bits: int,
    offset: int, keys: Tensor | None, tensor_amax: Tensor | None,
) -> Tensor:  # fmt: skip
    kernel, where, settings = _unpacked(spec, top, names, shape, keys, tensor_amax, random_bits, offset)
    y: Tensor = kernel.fake_cast(x.contiguous(), *where, strided, **settings)
    return y


@cast_values.register_fake
def _cast_values_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@cast_values.register_vmap
def _cast_values_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    amax, amax_dim = rest[-1], in_dims[-1]
    parts = [
        cast_values(
            x.select(in_dims[0], at) if in_dims[0] is not None else x, *rest[:-1],
            amax if amax_dim is None else amax.select(amax_dim, at),
        )
        for at in range(info.batch_size)
    ]  # fmt: skip
    return torch.stack(parts), 0


@torch.library.custom_op("isoscale::encode", mutates_args=())
def encode(
    x: Tensor, spec: list[int], top: float, names: str, shape: list[int], strided: bool, random_bits: int,
    offset: int, keys: Tensor | None, tensor_amax: Tensor | None, nan_code: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel, where, settings = _unpacked(spec, top, names, shape, keys, tensor_amax, random_bits, offset)
    parts = kernel.encode(x.contiguous(), *where, strided, **settings, nan_code=nan_code)
    codes, scales, tensor = (x.new_empty(0) if part is None else part for part in parts)
    return codes, scales, tensor


@encode.register_fake
def _encode_fake(
    x: Tensor, spec: list[int], top: float, names: str, shape: list[int], strided: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, first, last = shape
    height, width = (last, first) if strided else (first, last)
    bits, rows, cols = spec[0], spec[-2], spec[-1]
    blocks = -(-width // cols)
    scale = names.split()[0]
    codes = x.new_empty((batch, height, row_bytes(blocks * cols, bits)), dtype=torch.uint8)
    kind = torch.float32 if scale == "fp32" else torch.uint8
    scales = x.new_empty(0) if scale == "none" else x.new_empty((batch, -(-height // rows), blocks), dtype=kind)
    return codes, scales, x.new_empty((), dtype=torch.float32) if scale == "e4m3" else x.new_empty(0)
