"""MXNorm and the linear layer behind it as one layer (arXiv 2603.13180): y = q(x / r) q(W gamma)^T.

The norm costs no pass of its own: its statistic and its cast are those of the matmul's operand. A gain cannot multiply
an encoded tensor elementwise, so it multiplies the weight, and the product is cast once. Backward, as the authors do
it, the gain acts in high precision and the weight is cast without it:

    t  = q(g) q(W)              blocks along n
    dx = RMSNorm's derivative, with r in place of the RMS, of t gamma
    dW = (q(g)^T q(x / r)) gamma, from x / r in high precision: its blocks lie along the tokens
    dgamma = sum over tokens of (x / r) t

Saved: x, which lives anyway, and r. Queries, keys and values in one layer, or gate and up, share one norm; layers apart
(a model that was converted) each make the same one from the same x, and autograd adds their gradients.

`ride=True` is the form without any pass: x is cast as it is, and 1 / r multiplies the rows of the product. The
statistic can then come from the residual add before it, which sees every block anyway. Its codes differ from the
published ones (powers of two do not change a mantissa, 1 / r does), its error is of the same size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn
from torch.autograd import Function

from isoscale._base.errors import ConfigError
from isoscale.formats import BlockFormat, Format
from isoscale.formats.recipes import LayerFormats, everywhere
from isoscale.nn.cast_linear import CastLinear
from isoscale.nn.engine import FORWARD, OPERANDS, Engine, Note, draw_seed
from isoscale.nn.factors import token_scale
from isoscale.nn.linear import Linear, Scaling, roles_of
from isoscale.nn.mxnorm import cast_normed, check_input, estimator_for, norm_backward, norm_format
from isoscale.nn.mxnorm_estimate import Estimator, reciprocal
from isoscale.nn.scale import call, scale_bwd


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _along(gain: Tensor, w_axis: int) -> Tensor:
    """The gain beside a weight whose contraction axis is `w_axis`."""
    return gain if w_axis == -1 else gain.unsqueeze(-1)


class _NormedMatmul(Function):
    """(x, w, gain, engine, estimator, scales, w_axis, ride, seed, note) -> (y, r)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, gain: Tensor | None, engine: Engine, estimator: Estimator,
        scales: tuple[float, float, float], w_axis: int, ride: bool, seed: Tensor | None, note: Note | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        left, rms = _cast_input(x, engine, estimator, ride, note)
        folded = w if gain is None else _wide(w) * _along(_wide(gain), w_axis)
        out = engine.product(FORWARD, left, engine.cast(FORWARD, 1, folded, w_axis, note), scales[0], x.dtype)
        return (out * reciprocal(rms)).to(x.dtype) if ride else out, rms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, gain, ctx.engine, ctx.estimator, ctx.scales, ctx.w_axis, _, seed, ctx.note = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, gain, seed, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        x, w, gain, seed, rms = ctx.saved_tensors
        engine: Engine = ctx.engine
        need_x, need_w, need_gain = ctx.needs_input_grad[:3]
        grad = grad.to(x.dtype)
        normed = ctx.estimator.normed(x, rms)
        dx = dw = dgain = cast_grad = None
        if need_x or need_gain:
            wide = normed.dtype
            t, cast_grad = engine.input_grad(grad, w, ctx.w_axis, ctx.scales[1], wide, ctx.note, seed)
            if need_gain:
                dgain = (normed * t).sum(0).to(gain.dtype)
            if need_x:
                dx = norm_backward(t if gain is None else t * gain.to(wide), x, rms).to(x.dtype)
        if need_w:
            dw = engine.weight_grad(grad, normed, ctx.w_axis, ctx.scales[2], w.dtype, ctx.note, seed, cast_grad)
            if gain is not None:
                dw = (dw * _along(gain, ctx.w_axis)).to(w.dtype)
        return dx, dw, dgain, *(None,) * 7


class _NormedMatmulJvp(_NormedMatmul):
    """With a forward-mode rule, which the compiler does not trace: dy = d(x / r) q(W gain)^T + q(x / r) d(W gain)^T."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _NormedMatmul.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], output[1])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, dgain: Tensor | None, *_: Any) -> tuple[Tensor, None]:
        x, w, gain, rms = ctx.saved_tensors
        engine, axis = Engine(ctx.engine.formats), ctx.w_axis
        wide = _wide(w)
        folded = wide if gain is None else wide * _along(_wide(gain), axis)
        left = engine.cast(FORWARD, 0, ctx.estimator.normed(x, rms), -1, None)
        assert isinstance(left, Tensor)
        out = left.new_zeros(x.shape[0], w.shape[0 if axis == -1 else 1])
        if dx is not None:
            right = engine.cast(FORWARD, 1, folded, axis, None)
            assert isinstance(right, Tensor)
            out = out + norm_backward(dx, x, rms) @ right.mT
        for part, gain_part in ((dw, gain), (w, dgain)):
            if part is None or (gain_part is None and part is not dw):
                continue
            step = _wide(part) if gain_part is None else _wide(part) * _along(_wide(gain_part), axis)
            out = out + left @ (step.mT if axis == -1 else step)
        return (out * ctx.scales[0]).to(x.dtype), None


def _cast_input(
    x: Tensor, engine: Engine, estimator: Estimator, ride: bool, note: Note | None
) -> tuple[Any, Tensor]:
    """The left operand, which is the cast of x / r (of x itself where 1 / r rides on the product); and r.

    `note` is told x as it came: x / r is made by the kernel alone, and who records makes it again.
    """
    fmt = engine.pairs[FORWARD][0]
    if note is not None and fmt is not None:
        note(OPERANDS[FORWARD][0], str(fmt) if isinstance(fmt, BlockFormat) else fmt.name, x, -1)
    if engine.kinds[FORWARD] is not None or not isinstance(fmt, BlockFormat):  # codes; or the switch to BF16
        rms = estimator.rms(x)
        return engine.cast(FORWARD, 0, _wide(x) if ride else estimator.normed(x, rms), -1, None), rms
    low = x.dtype in engine.low[FORWARD] or x.dtype == torch.float64
    return cast_normed(x, fmt, estimator, x.dtype if low else torch.float32, ride)


class MXNormLinear(CastLinear):
    """MXNorm, its gain, and a linear layer; takes rows that are not normalised.

    Args:
        in_features: D, the size of a row.
        out_features: of the linear; for a fused projection the sum of its parts.
        bias: of the linear, added in high precision.
        p: generalised mean, 1 or 2; see `MXNorm`.
        formats: of the operands of the three matmuls; a name or a format means that one for all. The input's has
            blocks along the row.
        eps: added to the estimate.
        gain: whether there is one.
        clamp: bound on |x / r|, or None.
        estimate: `raw` or `rounded` (UNSTABLE, for comparison).
        statistic_block: see `MXNorm`.
        ride: cast x as it is and let 1 / r multiply the product's rows.
        scaling: `plain`, or `unit` for u-muP's factors.
        backend: `emulated` or `scaled_mm`.
        device: as in torch.
        dtype: as in torch.

    Attributes:
        gain: [in_features], or None; under the norm's name where the layer came from a conversion.

    Raises:
        ConfigError: as `MXNorm`; clamp and ride together, which cannot both be.
    """

    gain: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, p: int = 2,
        formats: LayerFormats | Format | str = "mxfp8_e4m3", eps: float = 1e-5, gain: bool = True,
        clamp: float | None = None, estimate: str = "raw", statistic_block: int | None = None, ride: bool = False,
        scaling: Scaling = "plain", backend: str = "emulated", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(formats, LayerFormats):
            formats = everywhere(formats if isinstance(formats, str) else str(formats))
        inner = Linear(in_features, out_features, bias, scaling=scaling, device=device, dtype=dtype)
        super().__init__(inner, formats, backend)
        self._join(None, in_features, p, eps, clamp, estimate, statistic_block, ride)
        if gain:
            self.gain = nn.Parameter(torch.ones(in_features, device=device, dtype=dtype))
        self._roles = dict(roles_of(weight="hidden", bias="bias", gain="gain"))

    @classmethod
    def of(
        cls, norm: MXNormGain, linear: nn.Module, formats: LayerFormats, backend: str, *, p: int = 2,
        clamp: float | None = None, estimate: str = "raw", statistic_block: int | None = None, ride: bool = False,
    ) -> MXNormLinear:  # fmt: skip
        """A linear layer that does the work of the norm before it; Parameters stay where they are.

        Args:
            norm: stands where the norm stood, and keeps its gain.
            linear: as for `CastLinear`; its Parameters are shared.
            formats: of the operands.
            backend: `emulated` or `scaled_mm`.
            p: see `MXNorm`, like what follows.
            clamp: see there.
            estimate: see there.
            statistic_block: see there.
            ride: see `MXNormLinear`.
        """
        layer = cls.__new__(cls)
        CastLinear.__init__(layer, linear, formats, backend)
        layer._join(norm, norm.dim, p, norm.eps, clamp, estimate, statistic_block, ride)
        return layer

    def _join(
        self, norm: MXNormGain | None, dim: int, p: int, eps: float, clamp: float | None, estimate: str,
        statistic_block: int | None, ride: bool,
    ) -> None:  # fmt: skip
        if ride and clamp is not None:
            message = "a clamp of x / r needs x / r, which this form never makes"
            raise ConfigError(message, key="ride", value=ride, hint="clamp=None")
        if "forward" in self.formats.hadamard:
            hint = "hadamard of the backward matmuls goes with it"
            message = "MXNorm takes its statistic from the row as it is, not as a Hadamard matrix turns it"
            raise ConfigError(message, key="formats.hadamard", value=self.formats.hadamard, hint=hint)
        fmt = norm_format(self.formats.input)
        self.estimator, self.ride = estimator_for(dim, fmt, p, eps, clamp, estimate, statistic_block), ride
        self._norm = (norm,)  # in a tuple: the model owns it, under the norm's own name
        self.register_parameter("gain", None)

    @torch.no_grad()
    def fold_gain(self) -> Tensor | None:
        """Multiplies the gain into the weight and returns it; who calls sets it to 1 once all its layers are done."""
        gain = self.gain if self._norm[0] is None else self._norm[0].weight
        if gain is not None and self.weight is not None:
            self.weight.copy_((_wide(self.weight) * _along(_wide(gain), self.w_axis)).to(self.weight.dtype))
        return gain

    def _note(self, operand: str, fmt: str, x: Tensor, axis: int) -> None:
        if self.recorder is not None and operand == OPERANDS[FORWARD][0] and not self.ride:
            x = self.estimator.normed(x, self.estimator.rms(x))
        super()._note(operand, fmt, x, axis)

    def _multiply(self, flat: Tensor, weight: Tensor, scales: tuple[float, float, float], tokens: int) -> Tensor:
        check_input(flat)
        (norm,) = self._norm
        gain: Tensor | None = self.gain if norm is None else norm.weight
        if gain is not None and self.scaling == "unit":
            gain = scale_bwd(gain, token_scale(tokens, 1))
        return normed_matmul(
            flat, weight, gain, self.engine, self.estimator, scales, self.w_axis, ride=self.ride, note=self._note,
            training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        e = self.estimator
        more = "".join([f", clamp={e.clamp}" if e.clamp is not None else "", ", ride" if self.ride else ""])
        more += f", statistic blocks of {e.block}"
        return f"{super().extra_repr()}, p={e.p}, eps={e.eps}, estimate={e.estimate!r}{more}"


class MXNormGain(nn.Module):
    """What is left of a norm whose work the layers behind it do: its gain, under its name. Hands its input on.

    Args:
        dim: size of a row.
        eps: as it was.
        weight: the gain [dim], the norm's own Parameter, or None.
        roles: of the gain.
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float, weight: nn.Parameter | None, roles: dict[str, str] | None = None) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.roles = dict(roles or {"weight": "gain"})
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor, *, tokens: int | None = None) -> Tensor:
        """The input, not normalised."""
        return x

    def split(
        self, x: Tensor, *, branch_scale: float = 1.0, skip_scale: float = 1.0, tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Open a residual branch: `(x, x)`, the gradients multiplied as in `functional.norm_split`."""
        return scale_bwd(x, branch_scale), scale_bwd(x, skip_scale)

    @torch.no_grad()
    def look(self, x: Tensor) -> Tensor:
        """What the norm itself would give, for a probe."""
        out = torch_f.rms_norm(_wide(x), [self.dim], eps=self.eps)
        return (out if self.weight is None else out * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, gain={self.weight is not None}, done by the next linear layers"


def normed_matmul(
    x: Tensor, w: Tensor, gain: Tensor | None, engine: Engine, estimator: Estimator,
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0), w_axis: int = -1, *, ride: bool = False,
    note: Note | None = None, training: bool = False,
) -> Tensor:  # fmt: skip
    """scales[0] * q(x / r) q(w gain)^T, with `scales[1]` on the input gradient and `scales[2]` on that of w.

    Args:
        x: [m, k].
        w: [n, k] for w_axis -1, [k, n] for -2.
        gain: [k] or None.
        engine: formats and backend.
        estimator: of r.
        scales: plain factors of the three products.
        w_axis: the contraction axis of w.
        ride: see `MXNormLinear`.
        note: told of every cast; not in compiled code.
        training: the mode of the module; see `engine.draw_seed`.

    Returns:
        [m, n] in the dtype of x.
    """
    note = None if torch.compiler.is_compiling() else note
    seed = draw_seed(engine, training, x, w, *(() if gain is None else (gain,)))
    rest = (engine, estimator, scales, w_axis, ride, seed, note)
    result: Tensor = call(_NormedMatmul, _NormedMatmulJvp, x, w, gain, *rest)[0]
    return result
