"""MXNorm: RMSNorm whose statistic falls out of the cast behind it (arXiv 2603.13180).

A cast to a block format looks for the largest magnitude of every block; MXNorm estimates the RMS from those K numbers
(`mxnorm_estimate`), divides, and casts. It has no gain: an encoded tensor cannot be multiplied elementwise, so the gain
goes into the next weight (`MXNormLinear`).

The cast is that of x / r formed in float32, whatever the dtype of x: one rounding, codes as `isoscale.formats.encode`
gives them. Backward the cast passes the gradient straight through, and the norm's derivative is RMSNorm's with the
estimate in place of the RMS: dx = g / r - x <g, x> / (D r^3).

NVFP4 wants the largest magnitude of the whole tensor before its first block can be cast, which would break the single
pass; here the bound of the output stands in for it (ours, not the paper's): a static number that nothing can pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from isoscale._base.errors import ConfigError
from isoscale.formats import BlockFormat, BlockTensor, Format, by_name, encode, fake_cast
from isoscale.formats.dispatch import is_plain, kernel_for
from isoscale.formats.layout import spec_of, view_of
from isoscale.kernels import cpu_norm, triton_norm
from isoscale.kernels.spec import CastSpec, NormSpec
from isoscale.nn.mxnorm_estimate import Estimator, reciprocal, rounding_cut
from isoscale.nn.scale import call


class MXNormed(NamedTuple):
    """What MXNorm gives.

    Args:
        encoded: codes and scales of x / r.
        normed: x / r in the dtype of x, which the weight gradient of the next layer casts along the tokens; None
            unless it was asked for.
        rms: the estimate r, [..., 1].
        summed: x + residual, if there was one; that is what was normalised.
    """

    encoded: BlockTensor
    normed: Tensor | None
    rms: Tensor
    summed: Tensor | None = None


def norm_format(fmt: Format | str) -> BlockFormat:
    """The format, if MXNorm can use it.

    Raises:
        ConfigError: no blocks along the row, whose maxima the norm wants.
    """
    found = by_name(fmt) if isinstance(fmt, str) else fmt
    if not isinstance(found, BlockFormat) or found.block[0] != 1 or found.block[1] == 0:
        hint = "a block format along the row, such as mxfp8_e4m3, mxfp6_e3m2, mxfp4 or nvfp4"
        raise ConfigError("MXNorm takes its statistic from blocks of the row", key="format", value=str(fmt), hint=hint)
    return found


def estimator_for(
    dim: int, fmt: BlockFormat, p: int = 2, eps: float = 1e-5, clamp: float | None = None, estimate: str = "raw",
    statistic_block: int | None = None,
) -> Estimator:  # fmt: skip
    """The estimator of rows of `dim` elements that are cast to `fmt`. Arguments as `Estimator` and `MXNorm`.

    Raises:
        ConfigError: as `Estimator`; statistic blocks that do not divide the format's.
    """
    block = fmt.block[1] if statistic_block is None else statistic_block
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or fmt.block[1] % block:
        message = f"statistic blocks must divide the format's, which have {fmt.block[1]} elements"
        raise ConfigError(message, key="statistic_block", value=statistic_block, hint="8")
    if estimate == "rounded" and block != fmt.block[1]:
        message = "an estimate from rounded scales has one number for each scale"
        raise ConfigError(message, key="statistic_block", value=statistic_block, hint="statistic_block=None")
    cut = rounding_cut(fmt) if estimate == "rounded" else 1.0
    return Estimator(dim, block, p, eps, clamp, estimate, cut)


def tensor_amax(fmt: BlockFormat, estimator: Estimator) -> float | None:
    """What stands in for the tensor's largest magnitude: the bound of the output, where the format wants one."""
    return estimator.bound if fmt.scale == "e4m3" else None


def cast_normed(
    x: Tensor, fmt: BlockFormat, estimator: Estimator, out_dtype: torch.dtype, ride: bool = False
) -> tuple[Tensor, Tensor]:
    """The values of x / r after the cast, in `out_dtype`, and r.

    In eager mode on a CPU and on a GPU one kernel makes both from one read; else one op after the other. Same bits.

    Args:
        x: [..., D].
        fmt: of the result.
        estimator: of r.
        out_dtype: of the values.
        ride: cast x itself.
    """
    kernel = _kernel(x, fmt, estimator, ride)
    if kernel is not None:
        flat = x.reshape(-1, estimator.dim).contiguous()
        known = tensor_amax(fmt, estimator)
        values, rms, _ = kernel.norm_fake(flat, *_specs(fmt, estimator, ride), tensor_amax=known, out_dtype=out_dtype)
        return values.view(x.shape), rms.view(*x.shape[:-1], 1)
    rms = estimator.rms(x)
    if ride:
        return fake_cast(x if x.dtype == torch.float64 else x.float(), fmt).to(out_dtype), rms
    return fake_cast(estimator.normed(x, rms), fmt, tensor_amax=tensor_amax(fmt, estimator)).to(out_dtype), rms


def _specs(fmt: BlockFormat, estimator: Estimator, ride: bool) -> tuple[CastSpec, NormSpec]:
    spec = spec_of(fmt, view_of((1, estimator.dim), -1, fmt.block))
    clamp = math.inf if estimator.clamp is None else estimator.clamp
    stat = 0 if estimator.block == fmt.block[1] else estimator.block
    return spec, NormSpec(f"mx{estimator.p}", estimator.eps, estimator.full, estimator.last, clamp, ride, stat)


def _kernel(x: Tensor, fmt: BlockFormat, estimator: Estimator, ride: bool) -> Any:
    """The module whose kernels reach, or None."""
    plain = estimator.estimate == "raw" and not torch.compiler.is_compiling() and is_plain(x) and x.numel() > 0
    if not plain or x.dtype == torch.float64 or (ride and fmt.scale == "e4m3"):
        return None
    found = {"cpp": cpu_norm, "triton": triton_norm}.get(kernel_for(x.device.type))
    spec, norm = _specs(fmt, estimator, ride)
    reaches = found is not None and found.covers(spec, estimator.dim) and not (norm.stat and found is triton_norm)
    return found if reaches and x.shape[-1] == estimator.dim else None


def norm_backward(grad: Tensor, x: Tensor, rms: Tensor) -> Tensor:
    """dx = g / r - x <g, x> / (D r^3), at least float32 (arXiv 2603.13180: RMSNorm's with the estimate).

    Args:
        grad: of x / r, [..., D].
        x: [..., D].
        rms: r, [..., 1].
    """
    wide = x if x.dtype == torch.float64 else x.float()
    back = reciprocal(rms)
    normed = wide * back
    grad = grad.to(wide.dtype)
    mean = (grad * normed).sum(-1, keepdim=True) * (-1 / x.shape[-1])
    return torch.addcmul(grad, normed, mean) * back


class _MXNorm(Function):
    """(x, format, estimator) -> (values, r)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, fmt: BlockFormat, estimator: Estimator) -> tuple[Tensor, Tensor]:
        return cast_normed(x, fmt, estimator, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        x, rms = ctx.saved_tensors
        return (None if grad is None else norm_backward(grad, x, rms).to(x.dtype)), None, None


class _MXNormJvp(_MXNorm):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _MXNorm.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        x, rms = ctx.saved_tensors
        return norm_backward(tangent, x, rms).to(x.dtype), None  # the Jacobian is symmetric


def mx_norm(x: Tensor, fmt: BlockFormat, estimator: Estimator) -> Tensor:
    """The values of MXNorm's output, differentiable; shape and dtype of x. Compile-friendly: all settings are made."""
    values: Tensor = call(_MXNorm, _MXNormJvp, x, fmt, estimator)[0]
    return values


class MXNorm(nn.Module):
    """RMSNorm + cast to a block format, with the RMS estimated from the maxima of the blocks.

    It has no parameters: the gain belongs to the next weight, see `MXNormLinear`.

    Args:
        dim: size of a row; blocks need not divide it.
        p: generalised mean, 1 or 2. Both estimate equally well; p = 2 bounds the output by c sqrt(K), p = 1 only by
            c K, which let outlier features through and gave loss spikes at 8B parameters (arXiv 2603.13180).
        format: of the output, with blocks along the row: `mxfp8_e4m3`, `mxfp4/rceil`, `nvfp4`, ...
        eps: added to the estimate; the eps of an RMSNorm stands under the root, so this one is like its square root.
        clamp: bound on |x / r| before the cast, or None.
        estimate: `raw`, the published method, or `rounded`, from rounded scales: UNSTABLE, for comparison only.
        statistic_block: elements of the blocks whose maxima are averaged; by default the format's. A divisor, such as
            8, is ours: maxima that the search for the block's maximum passes anyway, four times as many of them, half
            the scatter. For rows of few blocks: see docs/results/mxnorm.md. The GPU's kernel does not know it yet.

    Raises:
        ConfigError: another p; a format without blocks along the row; a size, eps or clamp out of range.
    """

    def __init__(
        self, dim: int, p: int = 2, format: Format | str = "mxfp8_e4m3", eps: float = 1e-5, *,
        clamp: float | None = None, estimate: str = "raw", statistic_block: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.format = norm_format(format)
        self.estimator = estimator_for(dim, self.format, p, eps, clamp, estimate, statistic_block)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to the values of the encoded tensor, in the dtype of x; differentiable."""
        check_input(x)
        return mx_norm(x, self.format, self.estimator)

    def encode(self, x: Tensor, residual: Tensor | None = None) -> MXNormed:
        """Codes and scales, what hardware multiplies; not differentiable. In training mode with x / r.

        Args:
            x: [..., dim].
            residual: as x; x + residual is normalised and handed back too, in the same pass where a kernel reaches.
        """
        check_input(x)
        x, fmt, own = x.detach(), self.format, self.estimator
        residual = None if residual is None else residual.detach()
        kernel = _kernel(x, fmt, own, False)
        if kernel is None:
            summed = x if residual is None else x + residual
            rms = own.rms(summed)
            encoded = encode(own.normed(summed, rms), fmt, tensor_amax=tensor_amax(fmt, own))
        else:
            flat = [None if t is None else t.reshape(-1, own.dim).contiguous() for t in (x, residual)]
            nan_code = -1 if fmt.element.nan_code is None else fmt.element.nan_code
            parts = kernel.norm_encode(flat[0], *_specs(fmt, own, False), residual=flat[1],
                                       tensor_amax=tensor_amax(fmt, own), nan_code=nan_code)  # fmt: skip
            lead = x.shape[:-1]
            summed = x if residual is None else parts.summed.view(x.shape)
            rms = parts.rms.view(*lead, 1)
            encoded = BlockTensor(parts.codes.view(*lead, -1), parts.scales.view(*lead, -1), parts.tensor_scale, fmt,
                                  x.dim() - 1, x.shape, torch.float32)  # fmt: skip
        normed = own.normed(summed, rms).to(x.dtype) if self.training else None
        return MXNormed(encoded, normed, rms, None if residual is None else summed)

    def extra_repr(self) -> str:
        e = self.estimator
        more = f", clamp={e.clamp}" if e.clamp is not None else ""
        more += f", statistic_block={e.block}" if e.block != self.format.block[1] else ""
        return f"{e.dim}, p={e.p}, {self.format}, eps={e.eps}{more}, estimate={e.estimate!r}"


def check_input(x: Tensor) -> None:
    """Refuses what has no rows of floats.

    Raises:
        ConfigError: not a real floating-point tensor.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
        said = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError("MXNorm normalises rows of real floating-point numbers", key="x", value=said)
