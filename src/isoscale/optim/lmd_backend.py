"""Which kernel does a step of LMD: C++ rows on a CPU, Triton on a GPU, or the reference (in captured graphs too)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoscale._base.sharded import is_sharded
from isoscale.kernels import cpu_lmd, lmd
from isoscale.kernels.lmd import Numbers, Spec

KERNELS = ("auto", "reference")


def _pick(kernel: str, spec: Spec, tensors: Sequence[Tensor]) -> Any:
    """The module whose `step` and `sample` are called."""
    if kernel == "reference" or torch.compiler.is_compiling():
        return lmd
    if tensors[0].is_cuda:
        from isoscale.kernels import triton_lmd

        return triton_lmd if triton_lmd.available() and triton_lmd.covers(spec, tensors) else lmd
    return cpu_lmd if cpu_lmd.covers(spec, tensors) and cpu_lmd.available() else lmd


def step(
    kernel: str, spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], momenta: tuple[Tensor, ...],
    given: tuple[Tensor, ...], out: Tensor,
) -> None:  # fmt: skip
    """See `isoscale.kernels.lmd.step`."""
    _pick(kernel, spec, (out, *given, *medians, *momenta)).step(spec, numbers, medians, momenta, given, out)


def sample(kernel: str, spec: Spec, numbers: Numbers, medians: tuple[Tensor, ...], out: Tensor) -> None:
    """See `isoscale.kernels.lmd.sample`."""
    _pick(kernel, spec, (out, *medians)).sample(spec, numbers, medians, out)


def finite(gradients: Sequence[Tensor]) -> bool | Tensor:
    """Whether every gradient is finite, on every process that has a shard of one; a 0-d tensor in a captured graph."""
    pieces = [g.to_local() if is_sharded(g) else g for g in gradients]
    if torch.compiler.is_compiling():
        return torch.stack([torch.isfinite(g).all() for g in pieces]).all()
    quick = all(g.device.type == "cpu" and g.is_contiguous() and g.dtype in cpu_lmd.FLOATS for g in pieces)
    if quick and cpu_lmd.available():
        ok = torch.tensor(cpu_lmd.all_finite(pieces))
    elif pieces:
        sizes = torch._foreach_norm(pieces, float("inf"))
        ok = torch.isfinite(torch.stack([size.float().to(pieces[0].device) for size in sizes])).all()
    else:
        return True
    for mesh in {g.device_mesh for g in gradients if is_sharded(g)}:
        for dim in range(mesh.ndim):
            bad = (~ok).to(pieces[0].device, torch.float32)
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
            ok = bad == 0
    return bool(ok)
