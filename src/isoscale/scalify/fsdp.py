"""FSDP2 with scales on the wire: what `fully_shard` sends, in fp16 or fp8 under one power-of-two scale per block.

A flat buffer holds the gradients (or weights) of many tensors, of very different magnitude; so scales are per block of
it, not one for all. They are the largest over ranks (one MAX all-reduce of a number per block); data go by all-to-all
and are summed in float32, because no backend adds fp8, and fp16 sums of many ranks would overflow.

    layer = fully_shard(layer)
    layer.set_custom_reduce_scatter(iso.scalify.ScaledReduceScatter("fp8"))

The buffers stay float32 on both sides: use `MixedPrecisionPolicy(reduce_dtype=torch.float32)` where parameters are
narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from isoscale._base.errors import ConfigError
from isoscale.scalify import scales
from isoscale.scalify.collectives import TOP, gather, wire_dtype

BLOCK = 256


class _Allocates:
    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Plain memory."""
        return torch.empty(*size, dtype=dtype, device=device)


def _padded(rows: Tensor) -> Tensor:
    """[world, n] -> [world, blocks, BLOCK], zeros behind."""
    rows = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % BLOCK))
    return rows.view(rows.shape[0], -1, BLOCK)


def _scale(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., BLOCK] -> [...]: a power of two that brings the largest element just below the format's top.

    Infinite where an element is not finite: the whole block is then NaN on the other side, and seen.
    """
    found = scales.floor2(blocks.abs().amax(-1) * (2.0 / TOP.get(dtype, 1.0)))
    assert isinstance(found, Tensor)
    return found


def _encode(blocks: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (blocks / torch.where(scale == 0, 1.0, scale)[..., None]).to(dtype).contiguous()


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8).view(-1)


class ScaledReduceScatter(_Allocates, ReduceScatter):
    """For `FSDPModule.set_custom_reduce_scatter`: gradients in fp16, bf16 or fp8 (E5M2) on the wire.

    Args:
        wire: the format.

    Raises:
        ConfigError: no such format.
    """

    def __init__(self, wire: str = "fp16") -> None:
        self.dtype = wire_dtype(wire)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """input [world * n] -> output [n]: the sum or the mean over ranks.

        Raises:
            ConfigError: another reduction.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ConfigError("scaled gradients are reduced by SUM and AVG only", key="op", value=str(op),
                              hint="divide by another factor than the number of ranks in the loss")  # fmt: skip
        world = dist.get_world_size(group)
        blocks = _padded(input_tensor.view(world, -1))
        scale = _scale(blocks, self.dtype)
        dist.all_reduce(scale, dist.ReduceOp.MAX, group)
        sent = _encode(blocks, scale, self.dtype)
        got = torch.empty_like(sent)
        dist.all_to_all_single(_bytes(got), _bytes(sent), group=group)
        mine = scale[dist.get_rank(group)]
        total = (got.float().sum(0) * mine[:, None]).view(-1)[: output_tensor.numel()]
        if op == dist.ReduceOp.AVG:
            total = total / world
        output_tensor.copy_(total)
        return None


class ScaledAllGather(_Allocates, AllGather):
    """For `FSDPModule.set_custom_all_gather`: weights in fp16, bf16 or fp8 (E4M3) on the wire; every rank, the owner
    too, computes with the rounded ones.

    Args:
        wire: the format.

    Raises:
        ConfigError: no such format.
    """

    def __init__(self, wire: str = "fp16") -> None:
        found = wire_dtype(wire)
        self.dtype = torch.float8_e4m3fn if found == torch.float8_e5m2 else found

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """input [n] -> output [world * n]."""
        if not input_tensor.is_floating_point():  # parameters of several dtypes travel as bytes
            work: dist.Work | None = gather(output_tensor, input_tensor, group, async_op)
            return work
        world = dist.get_world_size(group)
        blocks = _padded(input_tensor.view(1, -1))
        scale = _scale(blocks, self.dtype)
        sent = _encode(blocks, scale, self.dtype)
        got = torch.empty((world, *sent.shape[1:]), dtype=self.dtype, device=sent.device)
        every = torch.empty((world, scale.shape[1]), device=sent.device)
        gather(_bytes(got), _bytes(sent), group)
        gather(every.view(-1), scale.view(-1), group)
        whole = (got.float() * every[..., None]).view(world, -1)[:, : input_tensor.numel()]
        output_tensor.copy_(whole.reshape(-1))
        return None
