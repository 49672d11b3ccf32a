"""Collectives that know scales: all-reduce, reduce-scatter and all-gather of scaled tensors, fp16 or fp8 on the wire.

Ranks have scales of their own. A sum takes the largest (one MAX all-reduce of a number per tensor), brings the data
under it, and moves a power of two not below the number of ranks from the data into the scale, so that the sum cannot
overflow. fp16 data are summed by the backend. fp8 data are not (no backend adds fp8): they go by all-to-all, are
summed in float32, cast once more and gathered.

`torch.distributed.all_reduce` on a scaled tensor is refused: it would add data under different scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.scalify import scales
from isoscale.scalify.pair import Pair, times, under
from isoscale.scalify.tensor import ScaledTensor, as_scaled, rms_scale

OPS = ("mean", "sum")
WIRES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e5m2}
_FP8_TOP = 57344.0


def wire_dtype(name: str) -> torch.dtype:
    """The dtype of a wire format.

    Raises:
        ConfigError: no such format.
    """
    if name not in WIRES:
        raise ConfigError("no such wire format", key="wire", value=name, hint=did_you_mean(name, WIRES))
    return WIRES[name]


def all_reduce(x: Tensor, op: str = "mean", group: Any = None, wire: str | None = None) -> Tensor:
    """Sum or mean of a scaled tensor over ranks; a new tensor, the same on every rank.

    Args:
        x: scaled.
        op: `mean` or `sum`.
        group: process group; None is the default one.
        wire: format of the data on the way: `fp32`, `fp16`, `bf16`, `fp8`; by default their own.

    Raises:
        ConfigError: a plain tensor, another op or wire.
    """
    return all_reduce_many([x], op, group, wire)[0]


def all_reduce_many(
    xs: Sequence[Tensor], op: str = "mean", group: Any = None, wire: str | None = None
) -> list[Tensor]:
    """`all_reduce` of several: one collective for all scales, one for the data of each dtype."""
    if op not in OPS:
        raise ConfigError("no such reduction", key="op", value=op, hint=did_you_mean(op, OPS))
    given = [_scaled(x) for x in xs]
    if not given:
        return []
    world = dist.get_world_size(group)
    tops = torch.stack([x._scale for x in given])
    dist.all_reduce(tops, dist.ReduceOp.MAX, group)
    room = 1
    while room < world:
        room *= 2
    out: list[Tensor | None] = [None] * len(given)
    kinds = {wire_dtype(wire)} if wire is not None else {x.dtype for x in given}
    for kind in kinds:
        mine = [i for i, x in enumerate(given) if wire is not None or x.dtype == kind]
        flat = [under(Pair(given[i]._data.float(), given[i]._scale), tops[i]).reshape(-1) / room for i in mine]
        total = _sum(torch.cat(flat), kind, group)
        for i, part in zip(mine, torch.split(total, [given[i].numel() for i in mine])):
            factor, power = scales.split(room / world if op == "mean" else float(room))
            data = times(part.view(given[i].shape), factor)
            out[i] = ScaledTensor(data.to(given[i].dtype), tops[i] * power)
    return [x for x in out if x is not None]


def _scaled(x: Tensor) -> ScaledTensor:
    if not isinstance(x, ScaledTensor):
        raise ConfigError(
            "a scaled collective takes scaled tensors", key="x", value=type(x).__name__,
            hint="iso.scalify.as_scaled(x), or torch.distributed for plain ones",
        )  # fmt: skip
    return x


def _sum(flat: Tensor, dtype: torch.dtype, group: Any) -> Tensor:
    """Sum over ranks of float32 data that fit the dtype, rounded to it on the wire; float32."""
    if dtype != torch.float8_e5m2:
        low = flat.to(dtype)
        dist.all_reduce(low, dist.ReduceOp.SUM, group)
        return low.float()
    world = dist.get_world_size(group)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % world))
    part = _exchange_sum(padded.view(world, -1), group)
    top = part.abs().amax()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    n = scales.floor2(torch.where(top > 0, top * (2.0 / _FP8_TOP), 1.0))
    whole = torch.empty(world * part.numel(), dtype=torch.uint8, device=flat.device)
    dist.all_gather_into_tensor(whole, _to_fp8(part / n).view(torch.uint8), group)
    return (whole.view(torch.float8_e5m2).float() * n)[: flat.numel()]


def _to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-_FP8_TOP, _FP8_TOP).to(torch.float8_e5m2)


def _exchange_sum(rows: Tensor, group: Any) -> Tensor:
    """Row r of every rank to rank r, in fp8, and summed there in float32: rows [world, n] -> [n]."""
    sent = _to_fp8(rows).view(torch.uint8).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got.view(-1), sent.view(-1), group=group)
    return got.view(torch.float8_e5m2).float().sum(0)


def reduce_scatter(x: Tensor, op: str = "mean", group: Any = None, wire: str | None = None) -> Tensor:
    """Sum or mean over ranks, of which each keeps its share of the first dimension.

    Args:
        x: scaled, [world * n, ...].
        op: `mean` or `sum`.
        group: process group.
        wire: as for `all_reduce`.

    Returns:
        Scaled, [n, ...].

    Raises:
        ConfigError: a plain tensor, another op or wire, a first dimension that the ranks do not divide.
    """
    world, given = dist.get_world_size(group), _scaled(x)
    if op not in OPS:
        raise ConfigError("no such reduction", key="op", value=op, hint=did_you_mean(op, OPS))
    if not given.dim() or given.shape[0] % world:
        raise ConfigError("the ranks do not divide the first dimension", key="x", value=tuple(given.shape))
    kind = given.dtype if wire is None else wire_dtype(wire)
    top = given._scale.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    room = 1
    while room < world:
        room *= 2
    data = under(Pair(given._data.float(), given._scale), top) / room
    rows = data.reshape(world, -1)
    if kind == torch.float8_e5m2:
        total = _exchange_sum(rows, group)
    else:
        low = rows.to(kind)
        got = torch.empty_like(low)
        dist.all_to_all_single(got.view(-1), low.contiguous().view(-1), group=group)
        total = got.float().sum(0)
    factor, power = scales.split(room / world if op == "mean" else float(room))
    shape = (given.shape[0] // world, *given.shape[1:])
    return ScaledTensor(times(total.view(shape), factor).to(given.dtype), top * power)


def all_gather(x: Tensor, group: Any = None, wire: str | None = None) -> Tensor:
    """The ranks' tensors, one behind the other along the first dimension, under the largest scale.

    Args:
        x: scaled, [n, ...], the same shape on every rank.
        group: process group.
        wire: as for `all_reduce`.

    Raises:
        ConfigError: a plain tensor, another wire.
    """
    world, given = dist.get_world_size(group), _scaled(x)
    kind = given.dtype if wire is None else wire_dtype(wire)
    tops = torch.empty(world, device=given.device)
    dist.all_gather_into_tensor(tops, given._scale.view(1), group)
    sent = (_to_fp8(given._data.float()) if kind == torch.float8_e5m2 else given._data.to(kind)).contiguous()
    held = torch.uint8 if kind == torch.float8_e5m2 else kind
    got = torch.empty((world, *sent.shape), dtype=held, device=sent.device)
    dist.all_gather_into_tensor(got.view(-1), _bytes(sent).view(-1), group)
    data = got.view(kind) if kind == torch.float8_e5m2 else got
    top = tops.amax()
    shape = [world] + [1] * given.dim()
    moved = under(Pair(data.float(), tops.view(shape)), top)
    return ScaledTensor(moved.reshape(world * given.shape[0], *given.shape[1:]).to(given.dtype), top)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e5m2 else x


def reduce_gradients(parameters: Any, group: Any = None, wire: str | None = None) -> None:
    """Mean of every scaled gradient over ranks, in place: call it between `backward()` and `step()`.

    Args:
        parameters: of the scaled model, in the same order on every rank, each with its gradient or none on all ranks.
        group: process group.
        wire: as for `all_reduce`.
    """
    held = [p for p in parameters if p.grad is not None]
    for p, grad in zip(held, all_reduce_many([p.grad for p in held], "mean", group, wire)):
        p.grad = grad


def compress_hook(wire: str = "fp16") -> Any:
    """A communication hook for `DistributedDataParallel` over a *plain* model: scaled gradients on the wire.

    Each parameter's gradient in a bucket stands under its own scale, the largest over ranks.

    Args:
        wire: `fp16`, `bf16` or `fp8`.

    Example:
        ddp.register_comm_hook(None, iso.scalify.compress_hook("fp8"))

    Raises:
        ConfigError: another wire.
    """
    wire_dtype(wire)

    def hook(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        group = state if state is not None else dist.group.WORLD
        grads = [as_scaled(g, scale=rms_scale(g)) for g in bucket.gradients()]
        done = all_reduce_many(grads, "mean", group, wire)
        flat = bucket.buffer()
        for g, reduced in zip(bucket.gradients(), done):
            g.copy_(reduced._data * torch.where(reduced._scale == 0, 1.0, reduced._scale))  # type: ignore[attr-defined]
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(flat)
        return future

    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # type: ignore[attr-defined]  # DDP reads objects
    return hook
