"""torch's own optimisers, one tensor at a time or foreach, step scaled parameters as they step plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoscale.scalify import ScaledTensor, as_plain, as_scaled

OPTIMISERS: dict[str, dict[str, Any]] = {
    "AdamW": {}, "AdamW-amsgrad": {"amsgrad": True}, "AdamW-maximize": {"maximize": True}, "Adam": {"weight_decay": 0.1},
    "SGD": {"lr": 0.1}, "SGD-momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "RMSprop": {}, "RMSprop-centered": {"momentum": 0.9, "centered": True}, "Adagrad": {}, "Adadelta": {}, "NAdam": {},
    "RAdam": {}, "Adamax": {}, "Adafactor": {},
}  # fmt: skip


def steps(name: str, foreach: bool, exponent: int | None) -> list[Tensor]:
    """Two parameters after six steps, plain or with gradients and weights under a scale."""
    generator = torch.Generator().manual_seed(0)

    def make() -> Tensor:
        x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        return x if exponent is None else as_scaled(x, 2.0**exponent).detach()

    parameters = [nn.Parameter(make()) for _ in range(2)]
    optimiser = getattr(torch.optim, name.partition("-")[0])(parameters, foreach=foreach, **OPTIMISERS[name])
    for _ in range(6):
        for p in parameters:
            p.grad = make()
        optimiser.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_steps_are_those_of_the_plain_optimiser(name: str, foreach: bool) -> None:
    want = steps(name, foreach, None)
    for exponent in (-9, 0, 7):
        found = steps(name, foreach, exponent)
        for a, b in zip(want, found):
            assert isinstance(b, ScaledTensor)
            torch.testing.assert_close(as_plain(b), a, rtol=1e-9, atol=1e-12)


def test_control_the_steps_move_the_weights() -> None:
    """Without a step the comparison above fails: foreach forms that write into copies would do nothing."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    for name in OPTIMISERS:
        moved = as_plain(steps(name, True, 0)[0])
        assert not torch.allclose(moved, start, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("kind", [2.0, float("inf"), 1.0])
def test_clipping_is_that_of_plain_gradients(foreach: bool, kind: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    for size in (1e-4, 1e4):
        plain = [nn.Parameter(torch.zeros_like(v)) for v in values]
        ours = [nn.Parameter(as_scaled(torch.zeros_like(v), 1.0).detach()) for v in values]
        for p, q, v in zip(plain, ours, values):
            p.grad, q.grad = v * size, as_scaled(v * size).detach()
        a = nn.utils.clip_grad_norm_(plain, 1.0, norm_type=kind, foreach=foreach)
        b = nn.utils.clip_grad_norm_(ours, 1.0, norm_type=kind, foreach=foreach)
        torch.testing.assert_close(as_plain(b), a)
        for p, q in zip(plain, ours):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(as_plain(q.grad), p.grad)
        nn.utils.clip_grad_value_(plain, 1e-5, foreach=foreach)
        nn.utils.clip_grad_value_(ours, 1e-5, foreach=foreach)
        for p, q in zip(plain, ours):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(as_plain(q.grad), p.grad)


def test_half_gradients_far_below_the_bound_are_left_alone_by_clipping() -> None:
    """The clipping factor is huge before it is clamped to 1: under its old scale 1 would vanish in fp16."""
    p = nn.Parameter(as_scaled(torch.zeros(64), 1.0, torch.float16).detach())
    g = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 2.0**-30
    p.grad = as_scaled(g, dtype=torch.float16).detach()
    before = as_plain(p.grad, torch.float32).clone()
    nn.utils.clip_grad_norm_([p], 1.0)
    torch.testing.assert_close(as_plain(p.grad, torch.float32), before, rtol=2e-3, atol=0)


def test_the_second_moment_of_fp16_stays_in_range() -> None:
    """v = beta v + (1 - beta) g^2 for 4000 steps: neither does the first term vanish nor the sum overflow."""
    beta, g = 0.999, as_scaled(torch.full((8,), 3e-5), dtype=torch.float16)
    v = as_scaled(torch.zeros(8), 1.0, torch.float16)
    v.zero_()
    sizes = []
    for _ in range(4000):
        v.mul_(beta).addcmul_(g, g, value=1 - beta)
        sizes.append(float(v._data.float().abs().max()))  # type: ignore[attr-defined]
    assert min(sizes) > 2.0**-10
    assert max(sizes) < 2.0**10
    want = (3e-5) ** 2 * (1 - beta**4000)
    assert abs(float(as_plain(v, torch.float64)[0]) / want - 1) < 0.3  # fp16 state: increments are rounded
