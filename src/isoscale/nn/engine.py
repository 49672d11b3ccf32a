"""The three matmuls of a linear map, each with operands cast to formats of its own.

With x [..., m, k] and w [..., n, k] (or [..., k, n]):

    y  = q(x) q(w)^T        blocks along k
    dx = q(g) q(w)          blocks along n
    dw = q(g)^T q(x)        blocks along m

An operand of two matmuls is cast twice, along different axes, both times from high precision: a cast of a cast would
round twice, and blocks along one axis are not blocks along the other. Only where the axis does not matter (element
formats, one scale for the tensor, square tiles) and the formats agree is one cast used by both.

Saved for the backward pass: the operand itself where it is cast anew (it lives anyway: a weight, or the output of the
op before), the cast values where they are used again.

What may be done to the operands of a matmul, in this order, as their `LayerFormats` say: one orthonormal Hadamard
matrix with random signs on both, along the contraction axis (filled up with zeros, so the product stays); a factor;
stochastic rounding, whose bits depend on one seed per call, drawn in the forward like a dropout mask.

Emulated: operands take the values of their format and are multiplied with fp32 accumulation. bf16 tensors are
multiplied in bf16 only where it holds the cast values exactly: elements of at most 8 bits with power-of-two scales.
Scales that are no powers of two give values that bf16 cannot hold; there operands go to fp32 before the cast.

What is lost: dx and dw are gradients of the cast product (straight through), not of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from isoscale.formats import BlockFormat, ElementFormat, Format, Stochastic, fake_cast
from isoscale.formats.layers import MATMULS, LayerFormats
from isoscale.nn import hardware
from isoscale.nn.gemm import scaled_mm
from isoscale.nn.hadamard import rotate, rotation
from isoscale.nn.hardware import Codes
from isoscale.nn.scale import call

FORWARD, GRAD_INPUT, GRAD_WEIGHT = 0, 1, 2
OPERANDS = tuple(MATMULS.values())
Note = Callable[[str, str, Tensor, int], None]
"""Called before each cast with (operand, format, the tensor as it is cast, the axis of its blocks)."""
_LOW = {torch.bfloat16: (7, 127, -133), torch.float16: (10, 15, -24)}


def holds(fmt: Format | None, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every value that a cast to `fmt` gives (block scales near 2^-127 apart)."""
    if fmt is None or dtype not in _LOW:
        return True
    mantissa, emax, lowest = _LOW[dtype]
    if isinstance(fmt, BlockFormat):
        return fmt.scale == "e8m0" and dtype == torch.bfloat16 and fmt.element.mantissa_bits <= mantissa
    return fmt.mantissa_bits <= mantissa and fmt.emax <= emax and fmt.emin - fmt.mantissa_bits >= lowest


def same_along_both_axes(fmt: Format | None) -> bool:
    """Whether casts of a matrix along its two axes give the same values."""
    return not isinstance(fmt, BlockFormat) or fmt.block[0] == fmt.block[1]


class Engine:
    """How one linear map multiplies; made once per layer, so that a step looks up nothing.

    Args:
        formats: of the operands.
        backend: `emulated` or `scaled_mm`.
    """

    def __init__(self, formats: LayerFormats, backend: str = "emulated") -> None:
        self.formats, self.backend = formats, backend
        self.pairs = formats.pairs
        self.kinds = tuple(hardware.kind_of(*pair) if backend == "scaled_mm" else None for pair in self.pairs)
        self.stochastic = tuple(tuple(name in formats.stochastic for name in names) for names in OPERANDS)
        self.rotated = tuple(name in formats.hadamard for name in MATMULS)
        self.rotation = rotation(formats.hadamard_size) if formats.hadamard else None
        self.factors = tuple(tuple(formats.pre_scale if yes else 1.0 for yes in pair) for pair in self.stochastic)
        self.low = tuple(
            tuple(dtype for dtype in _LOW if all(holds(fmt, dtype) and (fmt or not turned) for fmt in pair))
            for pair, turned in zip(self.pairs, self.rotated)
        )
        self.keeps_weight = self._shared((FORWARD, 1), (GRAD_INPUT, 1))
        self.keeps_input = self._shared((FORWARD, 0), (GRAD_WEIGHT, 1))
        self.keeps_grad = self._shared((GRAD_INPUT, 0), (GRAD_WEIGHT, 0))

    @property
    def draws(self) -> bool:
        """Whether a call needs random bits."""
        return any(map(any, self.stochastic))

    def _shared(self, *places: tuple[int, int]) -> bool:
        """Whether one cast serves both: the same values along both axes, and not codes in a kernel's own order."""
        fmt, other = (self.pairs[which][side] for which, side in places)
        own = any(self.stochastic[which][side] or self.rotated[which] for which, side in places)
        codes = any(self.kinds[which] not in (None, "fp8") for which, _ in places)
        return fmt is not None and fmt == other and same_along_both_axes(fmt) and not own and not codes

    def turn(self, which: int, x: Tensor, axis: int) -> Tensor:
        """An operand through the Hadamard matrix of that matmul, where it has one, along the contraction axis."""
        if self.rotation is None or not self.rotated[which]:
            return x
        return rotate(x if x.dtype not in _LOW else x.float(), self.rotation, axis)

    def cast(
        self, which: int, side: int, x: Tensor, axis: int, note: Note | None, seed: Tensor | None = None
    ) -> Tensor | Codes:
        """An operand ready for `product`: [..., rows, k].

        Args:
            which: the matmul.
            side: 0 left, 1 right.
            x: [..., rows, k] for axis -1, [..., k, rows] for -2.
            axis: the contraction axis.
            note: told of the cast.
            seed: of the call; operands rounded stochastically need it.
        """
        fmt, kind = self.pairs[which][side], self.kinds[which]
        x = self.turn(which, x, axis)
        if fmt is None:
            return x if axis == -1 else x.mT
        if not holds(fmt, x.dtype) or self.factors[which][side] != 1:
            x = x if x.dtype == torch.float64 else x.float()
        if self.factors[which][side] != 1:
            x = x * self.factors[which][side]
        if note is not None:
            note(OPERANDS[which][side], str(fmt) if isinstance(fmt, BlockFormat) else fmt.name, x, axis)
        rounding: dict[str, Any] = {}
        if self.stochastic[which][side]:
            assert seed is not None, "no random bits: the forward was told that nobody wants a gradient"
            rounding = {"rounding": Stochastic(seed + (2 * which + side))}
        if kind is not None and isinstance(fmt, BlockFormat):
            return hardware.encode_operand(x, fmt, axis, **rounding)
        if not (isinstance(fmt, ElementFormat) and fmt.name == "bf16" and x.dtype == torch.bfloat16):
            x = self.fake_cast(x, fmt, axis, rounding)
        return x if axis == -1 else x.mT

    def fake_cast(self, x: Tensor, fmt: Format, axis: int, rounding: dict[str, Any]) -> Tensor:
        """Who rounds an operand; a subclass may round another kind of tensor."""
        return fake_cast(x, fmt, axis=axis, **rounding)

    def product(
        self, which: int, left: Tensor | Codes, right: Tensor | Codes, alpha: float, dtype: torch.dtype
    ) -> Tensor:
        """alpha * left @ right^T for [..., m, k] and [..., n, k], accumulated in fp32; [..., m, n] in `dtype`."""
        kind = self.kinds[which]
        for factor in self.factors[which]:
            alpha = alpha / factor if factor != 1 else alpha
        if kind is not None:
            return hardware.multiply(left, right, self.pairs[which], alpha).to(dtype)
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        wide = dtype if dtype not in _LOW or dtype in self.low[which] else torch.float32
        left, right = left.to(wide), right.to(wide).mT
        if left.dim() == 2 and right.dim() == 2:
            return scaled_mm(left, right, alpha).to(dtype)
        out = torch.matmul(left, right)
        return (out if alpha == 1 else out * alpha).to(dtype)

    def input_grad(
        self, grad: Tensor, w: Tensor, w_axis: int, alpha: float, dtype: torch.dtype, note: Note | None,
        seed: Tensor | None, kept_w: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """dx = alpha * q(g) q(w), and q(g) where the weight gradient uses the same one.

        Args:
            grad: [..., m, n], in the dtype of x.
            w: [..., n, k] for w_axis -1, [..., k, n] for -2; not read where `kept_w` is given.
            w_axis: the contraction axis of w in the forward.
            alpha: plain factor of the product.
            dtype: of dx.
            note: told of the casts.
            seed: of `draw_seed` in the forward.
            kept_w: the forward's cast of w, [..., n, k], where it serves here too (`keeps_weight`).

        Returns:
            [..., m, k] in `dtype`; the cast [..., m, n] or None.
        """
        left = self.cast(GRAD_INPUT, 0, grad, -1, note, seed)
        other = -2 if w_axis == -1 else -1
        right = self.cast(GRAD_INPUT, 1, w, other, note, seed) if kept_w is None else kept_w.mT
        dx = self.product(GRAD_INPUT, left, right, alpha, dtype)
        return dx, left if self.keeps_grad and isinstance(left, Tensor) else None

    def weight_grad(
        self, grad: Tensor, x: Tensor, w_axis: int, alpha: float, dtype: torch.dtype, note: Note | None,
        seed: Tensor | None, cast_grad: Tensor | None = None, kept_x: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """dw = alpha * q(g)^T q(x), or its transpose for w_axis -2.

        Args:
            grad: [..., m, n], in the dtype of x.
            x: [..., m, k]; not read where `kept_x` is given.
            w_axis: the contraction axis of w in the forward.
            alpha: plain factor of the product.
            dtype: of dw.
            note: told of the casts.
            seed: as for `input_grad`, and the same one.
            cast_grad: what `input_grad` returned beside dx, if that ran.
            kept_x: the forward's cast of x, [..., m, k], where it serves here too (`keeps_input`).

        Returns:
            [..., n, k] for w_axis -1, [..., k, n] for -2, in `dtype`.
        """
        left = self.cast(GRAD_WEIGHT, 0, grad, -2, note, seed) if cast_grad is None else cast_grad.mT
        right = self.cast(GRAD_WEIGHT, 1, x, -2, note, seed) if kept_x is None else kept_x.mT
        if w_axis == -1:
            return self.product(GRAD_WEIGHT, left, right, alpha, dtype)
        return self.product(GRAD_WEIGHT, right, left, alpha, dtype)


class CastMatmul(Function):
    """(x, w, engine, scales, w_axis, note, seed) -> (y, cast x or None, cast w or None)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, engine: Engine, scales: tuple[float, float, float], w_axis: int, note: Note | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        left = engine.cast(FORWARD, 0, x, -1, note)
        right = engine.cast(FORWARD, 1, w, w_axis, note)
        out = engine.product(FORWARD, left, right, scales[0], x.dtype)
        kept_x = left if engine.keeps_input and isinstance(left, Tensor) else None
        kept_w = right if engine.keeps_weight and isinstance(right, Tensor) else None
        # An output may not be the input itself, which a cast that changes nothing returns.
        return out, kept_x if kept_x is not x else None, kept_w if kept_w is not w else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        x, w, ctx.engine, ctx.scales, ctx.w_axis, ctx.note, seed = inputs
        _, kept_x, kept_w = output
        ctx.mark_non_differentiable(*(kept for kept in (kept_x, kept_w) if kept is not None))
        ctx.set_materialize_grads(False)
        ctx.fresh = (kept_x is None, kept_w is None)
        ctx.facts = (x.shape, x.dtype, w.shape, w.dtype)
        bits = () if seed is None else (seed,)
        ctx.save_for_backward(x if kept_x is None else kept_x, w if kept_w is None else kept_w, *bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        engine: Engine = ctx.engine
        note, (x, w, *bits) = ctx.note, ctx.saved_tensors
        seed = bits[0] if bits else None
        x_shape, x_dtype, w_shape, w_dtype = ctx.facts
        kept_x, kept_w = (None if fresh else tensor for fresh, tensor in zip(ctx.fresh, (x, w)))
        grad = grad.to(x_dtype)
        need_x, need_w = ctx.needs_input_grad[:2]
        dx = dw = cast_grad = None
        if need_x:
            dx, cast_grad = engine.input_grad(grad, w, ctx.w_axis, ctx.scales[1], x_dtype, note, seed, kept_w)
            dx = _summed(dx, x_shape)
        if need_w:
            dw = engine.weight_grad(grad, x, ctx.w_axis, ctx.scales[2], w_dtype, note, seed, cast_grad, kept_x)
            dw = _summed(dw, w_shape)
        return dx, dw, None, None, None, None, None


class CastMatmulJvp(CastMatmul):
    """With a forward-mode rule, which the compiler does not trace: dy = dx q(w)^T + q(x) dw^T."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        CastMatmul.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[1])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        x, w = ctx.saved_tensors
        engine, out = ctx.engine, None
        plain = Engine(engine.formats)
        for side, tangent, fixed in ((1, dx, w), (0, dw, x)):
            if tangent is None:
                continue
            if side:
                right = plain.cast(FORWARD, 1, fixed, ctx.w_axis, None)
                step = plain.turn(FORWARD, tangent, -1)
                term = torch.matmul(step, right.to(step.dtype).mT)  # type: ignore[union-attr]
            else:
                left = plain.cast(FORWARD, 0, fixed, -1, None)
                step = plain.turn(FORWARD, tangent, ctx.w_axis)
                step = step.mT if ctx.w_axis == -1 else step
                term = torch.matmul(left.to(step.dtype), step)  # type: ignore[union-attr]
            term = term.to(tangent.dtype)
            out = term if out is None else out + term
        return None if out is None else out * ctx.scales[0], None, None


def _summed(x: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a broadcast: summed to the shape."""
    return x if x.shape == shape else x.sum_to_size(shape)


def draw_seed(engine: Engine, training: bool, *operands: Tensor) -> Tensor | None:
    """The seed of one call's random bits, 0-d int64, from torch's generator; None where none are needed.

    Drawn where a dropout mask would be drawn (in training mode, always), and where a gradient is wanted: so a
    checkpointed segment that runs again, its generator put back, draws the same numbers in the same order. On the CPU:
    casts read its value, and reading it from a GPU would wait for that. In compiled code the compiler may move the
    draw into the backward pass: other bits than in eager mode, of the same law, and the same ones for the same seed.

    Args:
        engine: of the call.
        training: the mode of the module.
        operands: x and w.
    """
    if not engine.draws:
        return None
    if not training and not torch._C._are_functorch_transforms_active():
        wanted = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
        if not wanted:
            return None
    return torch.randint(0, 2**62, (), dtype=torch.int64)


def cast_matmul(
    x: Tensor, w: Tensor, engine: Engine, scales: tuple[float, float, float] = (1.0, 1.0, 1.0), w_axis: int = -1,
    note: Note | None = None, training: bool = False,
) -> Tensor:  # fmt: skip
    """scales[0] * q(x) q(w)^T, with `scales[1]` on the gradient of x and `scales[2]` on that of w.

    Args:
        x: [..., m, k].
        w: [..., n, k] for w_axis -1, [..., k, n] for -2; its dtype may be wider than that of x.
        engine: formats and backend.
        scales: plain factors of the three products.
        w_axis: the contraction axis of w.
        note: told of every cast; not in compiled code.
        training: the mode of the module that asks, see `draw_seed`.
    """
    note = None if torch.compiler.is_compiling() else note
    seed = draw_seed(engine, training, x, w)
    result: Tensor = call(CastMatmul, CastMatmulJvp, x, w, engine, scales, w_axis, note, seed)[0]
    return result
