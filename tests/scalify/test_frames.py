"""Loss scaling, dynamic, delayed and unit scaling as frames: each equals its plain form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.formats import by_name, fake_cast
from isoscale.nn import functional as unit
from isoscale.scalify import as_plain, as_scaled
from isoscale.scalify.frames import FRAMES, HEADROOM, Frame, MeasuredLinear, Rescales, frame, in_frame
from isoscale.scalify.tensor import ScaledTensor


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).to(dtype)


def run(model: nn.Module, how: Frame, x: Tensor, y: Tensor, factor: float = 1.0) -> tuple[Tensor, Rescales]:
    """Loss and counts of one forward and backward of a model in a frame."""
    with how() as counts:
        error = model(as_scaled(x, 1.0)) - as_scaled(y, 1.0)
        loss = (error * error).mean() * factor
        loss.backward(how.seed(loss))
    return as_plain(loss.detach(), torch.float32), counts


def near(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


def values(model: nn.Module) -> list[Tensor]:
    return [as_plain(p.grad, torch.float32) for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_loss_scaling_gives_the_scaled_gradients_of_the_plain_model(dtype: torch.dtype) -> None:
    """The data are the gradients that GradScaler leaves in .grad, the scale is the 1/S that its unscale_ multiplies by."""
    how, size = frame("loss-scaling"), 1e-6
    plain, x, y = mlp(dtype), torch.randn(64, 32, dtype=dtype), torch.randn(64, 16, dtype=dtype)
    model = in_frame(copy.deepcopy(plain), how)
    run(model, how, x, y, size)
    error = plain(x) - y
    ((error * error).mean() * size * how.gradient_scale).backward()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert isinstance(p.grad, ScaledTensor)
        assert q.grad is not None
        assert float(p.grad.scale) == 1 / how.gradient_scale
        assert near(p.grad.data_part, q.grad) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_without_the_scale_fp16_gradients_are_lost() -> None:
    """Control of the test above: S = 1."""
    how = Frame("none", "undo")
    model = in_frame(mlp(torch.float16), how)
    x, y = torch.randn(64, 32).half(), torch.randn(64, 16).half()
    run(model, how, x, y, 1e-6)
    assert all((g == 0).float().mean() > 0.9 for g in values(model))


class PlainFloat8(torch.autograd.Function):
    """x8 w8^T with power-of-two scales given by `scale(name, tensor)`, the textbook form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: Any, place: str) -> Tensor:
        ctx.scale, ctx.place = scale, place
        sx, sw = scale(f"{place}.x", x, "e4m3"), scale(f"{place}.w", w, "e4m3")
        x8, w8 = fake_cast(x / sx, by_name("e4m3")) * sx, fake_cast(w / sw, by_name("e4m3")) * sw
        ctx.save_for_backward(x8, w8)
        return x8 @ w8.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x8, w8 = ctx.saved_tensors
        s = ctx.scale(f"{ctx.place}.g", g, "e5m2")
        g8 = fake_cast(g / s, by_name("e5m2")) * s
        return g8 @ w8, g8.t() @ x8, None, None


def power(amax: Tensor, fmt: str) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(amax))) / HEADROOM[fmt] if amax > 0 else torch.ones(())


class Now:
    def __call__(self, name: str, x: Tensor, fmt: str) -> Tensor:
        return power(x.abs().amax(), fmt)


class Delayed:
    def __init__(self, history: int) -> None:
        self.history, self.past = history, {}

    def __call__(self, name: str, x: Tensor, fmt: str) -> Tensor:
        past = self.past.setdefault(name, [])
        found = power(torch.stack(past[-self.history :]).amax() if past else torch.zeros(()), fmt)
        past.append(x.abs().amax())
        return found


def plain_step(model: nn.Sequential, scale: Any, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    first, second = model[0], model[2]
    h = F.relu(PlainFloat8.apply(x, first.weight, scale, "0") + first.bias)
    out = PlainFloat8.apply(h, second.weight, scale, "2") + second.bias
    loss = ((out - y) * (out - y)).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", ["dynamic", "delayed"])
def test_measured_operands_equal_a_plain_float8_linear(name: str) -> None:
    """Forward and all gradients over six steps whose inputs grow and shrink, so that a window of three matters."""
    how = Frame(name, "undo", "now" if name == "dynamic" else "delayed", history=3)
    plain, scale = mlp(), Now() if name == "dynamic" else Delayed(3)
    model = in_frame(copy.deepcopy(plain), how)
    other = in_frame(copy.deepcopy(plain), Frame("x", "undo", "delayed" if name == "dynamic" else "now", history=3))
    apart = 0.0
    for step, size in enumerate((1.0, 8.0, 0.25, 0.25, 0.25, 2.0)):
        x, y = size * torch.randn(64, 32), torch.randn(64, 16)
        want = plain_step(plain, scale, x, y)
        model.zero_grad()
        loss, _ = run(model, how, x, y)
        assert abs(float(loss - want)) < 1e-6 * float(want), step
        for found, p in zip(values(model), plain.parameters()):
            assert p.grad is not None
            assert near(found, p.grad) < 1e-6, step
        apart = max(apart, abs(float(run(other, how, x, y)[0] - want)))
    assert apart > 1e-5, "control: the other way of measuring gives other losses"


def test_unit_scaling_drops_the_scale_and_keeps_the_data() -> None:
    """At sizes that are powers of four the rules' factors are unit scaling's own: output and both gradients."""
    tokens, fan_in, fan_out = 256, 64, 16
    x, w, g = torch.randn(tokens, fan_in), torch.randn(fan_out, fan_in), torch.randn(tokens, fan_out)
    how = frame("unit-scaling")
    a, b = as_scaled(x, 1.0).requires_grad_(), as_scaled(w, 1.0).requires_grad_()
    with how():
        y = F.linear(a, b)
        y.backward(as_scaled(g, 1.0))
    p, q = x.clone().requires_grad_(), w.clone().requires_grad_()
    want = unit.linear(p, q, constraint=None)
    want.backward(g)
    for found, plain in ((y, want), (a.grad, p.grad), (b.grad, q.grad)):
        assert isinstance(found, ScaledTensor)
        assert float(found.scale) == 1.0
        assert plain is not None
        assert near(found.data_part.detach(), plain.detach()) < 1e-6
        assert abs(float(found.data_part.square().mean().sqrt()) - 1) < 0.1
    assert near(y.data_part.detach(), x @ w.t()) > 0.5, "control: it is not the plain product"


def test_carrying_the_same_scales_keeps_the_plain_mathematics() -> None:
    x, w = torch.randn(256, 64), torch.randn(16, 64)
    with frame("scalify")():
        y = F.linear(as_scaled(x, 1.0), as_scaled(w, 1.0))
    assert float(y.scale) == 8.0  # type: ignore[attr-defined]
    assert near(as_plain(y), x @ w.t()) < 1e-6


class Block(nn.Module):
    """A pre-norm transformer block with six linears, as the paper counts them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        scores = self.q(h) @ self.k(h).transpose(-1, -2) * 0.25
        x = x + self.o(torch.softmax(scores, -1) @ self.v(h))
        return x + self.down(F.relu(self.up(self.norms[1](x))))


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("scalify", 0, 2), ("unit-scaling", 0, 0), ("loss-scaling", 0, 0), ("dynamic", 12, 6), ("delayed", 12, 6)],
)
def test_rescales_of_a_transformer_block(name: str, forward: int, backward: int) -> None:
    """2 for Scalify, 18 where every operand of every matmul is scaled (arXiv 2407.17353, section 3)."""
    how, counts = frame(name), []
    for depth in (1, 3):
        model = in_frame(nn.Sequential(*(Block() for _ in range(depth))), how)
        counts.append(run(model, how, torch.randn(2, 8, 16), torch.randn(2, 8, 16))[1])
    assert counts[1].forward - counts[0].forward == 2 * forward
    assert counts[1].backward - counts[0].backward == 2 * backward
    assert counts[0].forward == forward


def test_all_frames_but_unit_scaling_compute_the_same_function() -> None:
    plain, x, y = nn.Sequential(Block(), Block()), torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    want = (plain(x) - y).square().mean()
    for how in FRAMES.values():
        loss, _ = run(in_frame(copy.deepcopy(plain), how), how, x, y)
        gap = abs(float(loss) / float(want.detach()) - 1)
        bound = 0.1 if how.operands else 1e-6
        assert (gap < bound) is (how.name != "unit-scaling"), (how.name, gap)


def test_an_unknown_frame_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="loss-scaling"):
        frame("loss_scaling")


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    in_frame(model, frame("dynamic"))
    assert isinstance(model[0], MeasuredLinear)
    assert model[1].weight is model[0].weight
