"""Which kernel does a step of LMD: the C++ rows on a CPU, Triton on a GPU, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from isoscale.kernels import lmd
from isoscale.kernels.lmd import Numbers, Spec

KERNELS = ("auto", "reference")


def _pick(kernel: str, spec: Spec, tensors: Sequence[Tensor]) -> Any:
    return lmd


def step(
    kernel: str, spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], momenta: tuple[Tensor, ...],
    given: tuple[Tensor, ...], out: Tensor,
) -> None:  # fmt: skip
    """See `isoscale.kernels.lmd.step`."""
    _pick(kernel, spec, (out, *given, *medians, *momenta)).step(spec, numbers, medians, momenta, given, out)


def sample(kernel: str, spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], out: Tensor) -> None:
    """See `isoscale.kernels.lmd.sample`."""
    _pick(kernel, spec, (out, *medians)).sample(spec, numbers, medians, out)


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether every gradient is finite, on every process that holds a shard of one."""
    if not gradients:
        return True
    sizes = torch._foreach_norm([g.to_local() if isinstance(g, DTensor) else g for g in gradients], float("inf"))
    ok = torch.isfinite(torch.stack([size.float() for size in sizes])).all()
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    for mesh in meshes:
        for dim in range(mesh.ndim):
            flag = (~ok).to(torch.float32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
            ok = flag == 0
    return bool(ok)
