"""The parts of a small model's step that are no matrix products with weights, in one pass each, on a CPU.

Plain functions of contiguous float32 tensors, without autograd; `isoscale.nn.fused` makes differentiable ops of them.
They agree with torch's ops within a few ulp, not to the bit: sums run in another order, and exp is a polynomial.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from isoscale.kernels import build

__all__ = ["HEAD_SIZES", "attend", "attend_backward", "available", "glu", "glu_backward", "rms", "rms_backward",
           "why_not"]  # fmt: skip

HEAD_SIZES = (16, 32, 48, 64)
LANES = 16  # rows of SwiGLU and norms are multiples of it


class _Attend(ctypes.Structure):
    """`struct Attend` of step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "grad", "out", "log", "dqkv")),
        *((name, ctypes.c_int64) for name in ("B", "L", "H", "G", "D")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("causal", "threads", "failed")),
    )


class _Glu(ctypes.Structure):
    """`struct Glu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("both", "grad", "out")),
        *((name, ctypes.c_int64) for name in ("n", "h")),
        ("mult", ctypes.c_float), ("threads", ctypes.c_int32),
    )  # fmt: skip


class _Rms(ctypes.Structure):
    """`struct Rms`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "skip", "out", "reciprocal")),
        *((name, ctypes.c_int64) for name in ("n", "w")),
        *((name, ctypes.c_float) for name in ("eps", "a", "b")),
        ("threads", ctypes.c_int32),
    )


def available() -> bool:
    """Whether the kernels can be used. The first call compiles, for about two seconds."""
    return build.available("step")


def why_not() -> str:
    """Why not, in one line; "" when they can."""
    return build.why_not("step")


@functools.cache
def _library() -> ctypes.CDLL:
    return build.library("step")


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Rotary attention.

    Args:
        qkv: `[batch, length, (heads + 2 groups) D]`: the queries of all heads, then keys, then values; D in HEAD_SIZES.
        cos: cosines of the angles, `[length, D / 2]`.
        sin: their sines.
        heads: query heads.
        groups: key and value heads; divides `heads`.
        scale: the full factor on q.k.
        causal: query i sees keys 0..i.

    Returns:
        The output `[batch, length, heads D]`, and for the backward the base-2 logarithm of each softmax's sum,
        `[batch, heads, length]`.
    """
    batch, length, wide = qkv.shape
    size = wide // (heads + 2 * groups)
    out, log = qkv.new_empty(batch, length, heads * size), qkv.new_empty(batch, heads, length)
    given = _Attend(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), None, out.data_ptr(), log.data_ptr(), None,
        batch, length, heads, groups, size, scale, causal, torch.get_num_threads(), 0,
    )  # fmt: skip
    _library().isoscale_attend(ctypes.byref(given))
    if given.failed:
        raise MemoryError("no memory for the working space of attention")
    return out, log


def attend_backward(
    grad: Tensor, qkv: Tensor, log: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, scale: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    """The gradient of `qkv`, from that of the output and what `attend` gave."""
    batch, length, wide = qkv.shape
    out = torch.empty_like(qkv)
    given = _Attend(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), grad.data_ptr(), None, log.data_ptr(), out.data_ptr(),
        batch, length, heads, groups, wide // (heads + 2 * groups), scale, causal, torch.get_num_threads(), 0,
    )  # fmt: skip
    _library().isoscale_attend_back(ctypes.byref(given))
    if given.failed:
        raise MemoryError("no memory for the working space of attention")
    return out


def glu(both: Tensor, mult: float) -> Tensor:
    """`silu(mult gate) up` of `both = [gate | up]`, `[..., 2 h]` to `[..., h]`; h a multiple of LANES."""
    h = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], h)
    given = _Glu(both.data_ptr(), None, out.data_ptr(), out.numel() // h, h, mult, torch.get_num_threads())
    _library().isoscale_glu(ctypes.byref(given))
    return out


def glu_backward(grad: Tensor, both: Tensor, mult: float) -> Tensor:
    """The gradient of `both`."""
    h, out = grad.shape[-1], torch.empty_like(both)
    given = _Glu(both.data_ptr(), grad.data_ptr(), out.data_ptr(), grad.numel() // h, h, mult, torch.get_num_threads())
    _library().isoscale_glu_back(ctypes.byref(given))
    return out


def rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x)` over the last dimension, a multiple of LANES, and the reciprocal rms `[..., 1]`."""
    width = x.shape[-1]
    out, reciprocal = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    given = _Rms(x.data_ptr(), None, None, out.data_ptr(), reciprocal.data_ptr(), reciprocal.numel(), width, eps, 1.0,
                 0.0, torch.get_num_threads())  # fmt: skip
    _library().isoscale_rms(ctypes.byref(given))
    return out, reciprocal


def rms_backward(
    grad: Tensor, normed: Tensor, reciprocal: Tensor, a: float, skip: Tensor | None, b: float
) -> Tensor:
    """`a (grad - normed mean(grad normed)) reciprocal + b skip`."""
    out = torch.empty_like(grad)
    given = _Rms(normed.data_ptr(), grad.data_ptr(), None if skip is None else skip.data_ptr(), out.data_ptr(),
                 reciprocal.data_ptr(), reciprocal.numel(), grad.shape[-1], 0.0, a, b,
                 torch.get_num_threads())  # fmt: skip
    _library().isoscale_rms_back(ctypes.byref(given))
    return out
