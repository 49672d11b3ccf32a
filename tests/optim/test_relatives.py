"""LMD's relatives against their papers' formulas in float64 numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isoscale._base.errors import ConfigError
from isoscale.optim import ExponentiatedGradient, LieGroup, Lion, Madam


def parameter(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def gradients(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(step).standard_normal((6, 8)) for step in range(count)]


def run(p: nn.Parameter, optimizer: torch.optim.Optimizer, grads: list[np.ndarray]) -> np.ndarray:
    for g in grads:
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
    return p.detach().numpy()


def lion(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    m = np.zeros_like(w)
    for g in grads:
        w = w - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.3 * w)
        m = 0.99 * m + 0.01 * g
    return w


def madam(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    largest, v = 1.5 * np.sqrt((w**2).mean()), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        v = 0.9 * v + 0.1 * g**2
        turn = np.clip(g / np.sqrt(v / (1 - 0.9**t)), -1.2, 1.2)
        w = np.clip(w * np.exp(-0.05 * np.sign(w) * turn), -largest, largest)
    return w


def exponentiated(w: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    b = 0.2 * np.sqrt((w**2).mean())
    up, down = np.maximum(w, 0) + b, np.maximum(-w, 0) + b
    for g in grads:
        up, down = up * np.exp(-0.05 * g), down * np.exp(0.05 * g)
    return up - down


@pytest.mark.parametrize(("make", "formula"), [
    (lambda p: Lion([p], lr=0.01, weight_decay=0.3), lion),
    (lambda p: Madam([p], lr=0.05, beta=0.9, clip=1.2, bound=1.5), madam),
    (lambda p: ExponentiatedGradient([p], lr=0.05, offset=0.2), exponentiated),
], ids=["lion", "madam", "eg"])  # fmt: skip
def test_steps_are_the_papers(make: Callable[..., Any], formula: Callable[..., np.ndarray]) -> None:
    p = parameter()
    want = formula(p.detach().numpy().copy(), gradients(20))
    got = run(p, make(p), gradients(20))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert np.abs(got - parameter().detach().numpy()).max() > 0.05


def test_madam_and_exponentiated_gradient_differ_in_what_may_turn_its_sign() -> None:
    """Madam's weights keep their signs however long the gradient pushes; two positive vectors do not."""
    for make, turns in ((lambda p: Madam([p], lr=0.1), False), (lambda p: ExponentiatedGradient([p], lr=0.1), True)):
        p = parameter()
        signs = p.detach().sign()
        run(p, make(p), [signs.numpy()] * 80)
        assert bool((p.detach().sign() != signs).all()) is turns


def test_the_lie_group_rule_samples_and_shows_its_mean() -> None:
    """E[e] of a Rayleigh variable is sqrt(pi / 2), so samples average to that times g+ - g-."""
    p = parameter()
    optimizer = LieGroup([p], lr=1e-12, offset=1e-5)
    total = np.zeros((6, 8))
    for g in gradients(3000):
        p.grad = torch.from_numpy(g)
        optimizer.step()
        total += p.detach().numpy()
    sample = p.detach().clone()
    with optimizer.mean():
        mean = p.detach().numpy().copy()
    assert torch.equal(p.detach(), sample)
    assert np.abs(total / 3000 / math.sqrt(math.pi / 2) - mean).max() < 0.12
    assert not np.allclose(sample.numpy(), mean)


def test_the_lie_group_rule_learns() -> None:
    p = parameter()
    optimizer = LieGroup([p], lr=2.0, temperature=0.0)

    def loss() -> float:
        with optimizer.mean():
            return float((p - 0.3).square().sum())

    p.grad = torch.zeros_like(p)
    optimizer.step()
    before = loss()
    for _ in range(300):
        p.grad = 2 * (p.detach() - 0.3) * 0.05
        optimizer.step()
    assert loss() < 0.5 * before


@pytest.mark.parametrize("make", [
    lambda p: Lion([p], lr=0.0), lambda p: Madam([p], clip=-1.0), lambda p: Madam([p], bound=0.0),
    lambda p: ExponentiatedGradient([p], offset=0.0), lambda p: LieGroup([p], lr=math.inf),
])  # fmt: skip
def test_bad_settings_are_refused(make: Callable[[nn.Parameter], object]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        make(parameter())


def test_madam_says_what_it_cannot_move() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match="starts at zero"):
        Madam([p]).step()
