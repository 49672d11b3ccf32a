"""Collectives that know scales: all-reduce, reduce-scatter and all-gather of scaled tensors, fp16 or fp8 on the wire.

Ranks have scales of their own. The result stands under the largest one. On the way data stand under another: ranks
agree (one MAX all-reduce of two numbers per tensor) on the power of two that brings the largest element of any rank
just below the wire format's top, less the number of ranks, so that sums do not overflow and a prediction that is far
off costs no bits. fp16 data are summed by the backend. fp8 data are not (no backend adds fp8): they go by all-to-all,
are summed in float32, cast once more and gathered.

None of these is differentiable. `torch.distributed.all_reduce` on a scaled tensor is refused: it would add data under
different scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isoscale._base.errors import ConfigError, did_you_mean
from isoscale.scalify import blocks, scales
from isoscale.scalify.pair import Pair, under
from isoscale.scalify.tensor import ScaledTensor, as_plain, as_scaled

OPS = ("mean", "sum")
WIRES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e5m2}
TOP = {torch.float16: 2.0**15, torch.float8_e5m2: 2.0**15, torch.float8_e4m3fn: 2.0**8}
"""Data travel below this power of two; in formats with float32's exponents, below 1."""
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name of one function


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
    given = [_scaled(x) for x in xs]
    _known(op)
    kinds = [_kind(x, wire) for x in given]
    if not given:
        return []
    tops, ways = _agree(given, kinds, group)
    out = list(given)
    for kind in dict.fromkeys(kinds):  # in the order of xs, which all ranks share
        mine = [i for i, other in enumerate(kinds) if other == kind]
        flat = torch.cat([_sent(given[i], ways[i]).reshape(-1) for i in mine])
        parts = torch.split(_sum(flat, kind, group), [given[i].numel() for i in mine])
        for i, part in zip(mine, parts):
            out[i] = _reduced(part.view(given[i].shape), given[i], tops[i], ways[i], op, dist.get_world_size(group))
    return list(out)


def _scaled(x: Tensor) -> ScaledTensor:
    if not isinstance(x, ScaledTensor):
        raise ConfigError(
            "a scaled collective takes scaled tensors", key="x", value=type(x).__name__,
            hint="iso.scalify.as_scaled(x), or torch.distributed for plain ones",
        )  # fmt: skip
    if x._scale.dim():
        pair = blocks.together(Pair(x._data, x._scale))
        return ScaledTensor(pair.data, scales.as_tensor(pair.scale, pair.data))
    return x


def _known(op: str) -> None:
    if op not in OPS:
        raise ConfigError("no such reduction", key="op", value=op, hint=did_you_mean(op, OPS))


def _kind(x: ScaledTensor, wire: str | None) -> torch.dtype:
    if wire is not None:
        return wire_dtype(wire)
    return torch.float8_e5m2 if x.dtype.itemsize == 1 else x.dtype


def _room(world: int) -> int:
    """The smallest power of two not below the number of ranks."""
    return 1 << (world - 1).bit_length()


def _reach(x: ScaledTensor) -> Tensor:
    """The largest power of two not above the largest |value|, 0-d; 0 for zeros, infinite where one is not finite."""
    size = x._data.detach().abs().float().amax() if x.numel() else torch.zeros((), device=x.device)
    found = scales.floor2(size) * torch.where(x._scale == 0, 1.0, x._scale)
    assert isinstance(found, Tensor)
    return found


def _way(reach: Tensor, top: Tensor, room: int, kind: torch.dtype) -> Tensor:
    """The scale that data travel under; any will do where they are zeros or lost already."""
    way = (reach * (2.0 * room / TOP.get(kind, 1.0))).clamp(min=2.0**-126)
    return torch.where(torch.isfinite(way) & (reach > 0), way, torch.where(top == 0, 1.0, top))


def _agree(xs: Sequence[ScaledTensor], kinds: Sequence[torch.dtype], group: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Per tensor the largest scale of any rank, and the one to travel under: one collective."""
    both = torch.stack([*(x._scale for x in xs), *(_reach(x) for x in xs)])
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    tops, room = [top.clone() for top in both[: len(xs)]], _room(dist.get_world_size(group))
    return tops, [_way(reach, top, room, kind) for reach, top, kind in zip(both[len(xs) :], tops, kinds)]


def _sent(x: ScaledTensor, way: Tensor) -> Tensor:
    """The data as they travel, before they are rounded to the wire's dtype."""
    data: Tensor = under(Pair(scales.widened(x._data.detach()), x._scale), way)
    return data


def _reduced(total: Tensor, like: ScaledTensor, top: Tensor, way: Tensor, op: str, world: int) -> ScaledTensor:
    """A sum that arrived, under the largest scale; a sum's scale grows with the ranks, so that data keep their size."""
    scale = top if op == "mean" else top * _room(world)
    data = total * (way / torch.where(scale == 0, 1.0, scale))
    return ScaledTensor((data / world if op == "mean" else data).to(like.dtype), scale)


def _sum(flat: Tensor, kind: torch.dtype, group: Any) -> Tensor:
    """Sum over ranks, in the order that the backend takes or, for fp8, in that of the ranks."""
    if kind != torch.float8_e5m2:
        low = flat.to(kind)
        dist.all_reduce(low, dist.ReduceOp.SUM, group)
        return scales.widened(low)
    world = dist.get_world_size(group)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % world))
    part = _exchange_sum(padded.view(world, -1), kind, group)
    whole = torch.empty(world * part.numel(), dtype=torch.uint8, device=flat.device)
    gather(whole, _bytes((part / _room(world)).to(kind)), group)
    return whole.view(kind).float()[: flat.numel()] * _room(world)


def _bytes(x: Tensor) -> Tensor:
    """Flat, for the wire: backends do not know fp8."""
    return (x.view(torch.uint8) if x.dtype.itemsize == 1 else x).contiguous().view(-1)


def _exchange_sum(rows: Tensor, kind: torch.dtype, group: Any) -> Tensor:
    """Row r of every rank to rank r, in the wire's dtype, and summed there in float32: rows [world, n] -> [n]."""
    sent = rows.to(kind)
    got = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(got), _bytes(sent), group=group)
    return scales.widened(got).sum(0)


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
    _known(op)
    kind = _kind(given, wire)
    if not given.dim() or given.shape[0] % world:
        raise ConfigError(f"{world} ranks do not divide the first dimension", key="x", value=tuple(given.shape))
    (top,), (way,) = _agree([given], [kind], group)
    total = _exchange_sum(_sent(given, way).reshape(world, -1), kind, group)
    return _reduced(total.view(given.shape[0] // world, *given.shape[1:]), given, top, way, op, world)


def all_gather(x: Tensor, group: Any = None, wire: str | None = None) -> Tensor:
    """The ranks' tensors, one behind the other along the first dimension, under the largest scale.

    Args:
        x: scaled, [n, ...], the same shape on every rank.
        group: process group.
        wire: as for `all_reduce`, but fp8 is E4M3: nothing is summed.

    Raises:
        ConfigError: a plain tensor, another wire, a tensor without dimensions.
    """
    world, given = dist.get_world_size(group), _scaled(x)
    kind = _kind(given, wire)
    if not given.dim():
        raise ConfigError("a tensor without dimensions cannot be gathered", key="x", hint="x[None]")
    kind = torch.float8_e4m3fn if kind == torch.float8_e5m2 else kind
    way = _way(_reach(given), given._scale, 1, kind)
    every = torch.empty(2 * world, device=given.device)
    gather(every, torch.stack([given._scale, way]), group)
    sent = _sent(given, way).to(kind)
    got = torch.empty((world, *sent.shape), dtype=kind, device=sent.device)
    gather(_bytes(got), _bytes(sent), group)
    top = every[::2].amax()
    ways = every[1::2].view([world] + [1] * given.dim())
    data = scales.widened(got) * (ways / torch.where(top == 0, 1.0, top))
    return ScaledTensor(data.reshape(world * given.shape[0], *given.shape[1:]).to(given.dtype), top)


def reduce_gradients(parameters: Iterable[Tensor], group: Any = None, wire: str | None = None) -> None:
    """Mean of every gradient over ranks, in place: call it between `backward()` and `step()`.

    A parameter that has a gradient on some ranks only counts as zero on the others.

    Args:
        parameters: of the scaled model, in the same order on every rank.
        group: process group.
        wire: as for `all_reduce`.
    """
    known = list(parameters)
    if not known:
        return
    has = torch.tensor([p.grad is not None for p in known], dtype=torch.int32, device=known[0].device)
    dist.all_reduce(has, dist.ReduceOp.MAX, group)
    held = [p for p, anywhere in zip(known, has.tolist()) if anywhere]
    grads = [p.grad if p.grad is not None else torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in held]
    for p, grad in zip(held, all_reduce_many([as_scaled(g) for g in grads], "mean", group, wire)):
        p.grad = grad if isinstance(p, ScaledTensor) else as_plain(grad)


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
        grads = [as_scaled(g) for g in bucket.gradients()]
        done = all_reduce_many(grads, "mean", group, wire)
        flat = bucket.buffer()
        for g, reduced in zip(bucket.gradients(), done):
            g.copy_(as_plain(reduced))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(flat)
        return future

    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # type: ignore[attr-defined]  # DDP reads objects
    return hook
