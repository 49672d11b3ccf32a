"""The LMD step in plain torch: against formulas written out in float64, autograd, and the statistics it promises."""

from __future__ import annotations

import math

import pytest
import torch
from lmd_oracle import numbers, tensors
from torch import Tensor

from isoscale.kernels import lmd
from isoscale.kernels.lmd import Draw, Spec
from isoscale.kernels.normals import Place, indices, normals, uniform, words

CPU = torch.device("cpu")


def plain(n: int) -> Tensor:
    return indices(torch.Size([n]), Place(0, n, n), CPU)


def test_a_step_of_the_split_is_the_formula() -> None:
    n, spec = 2000, Spec()
    nums = numbers(spec, n)
    medians, momenta, (g,), out = tensors(spec, n)
    want_a, want_v = [], []
    for sign, a, v, keys in zip((1, -1), medians, momenta, nums.now.keys):
        z = normals(words(keys, plain(n))).double()
        u = sign * g.double() * (a.double() + 0.05 * z - 3.0).exp()
        t = 0.9 * v.double() + 0.1 * u
        moved = (a.double() - 0.02 * (t.sign() + 0.1 * a.double())).clamp(lmd.LOW, lmd.HIGH)
        want_a.append(torch.where(g != 0, moved, a.double()))
        want_v.append(torch.where(g != 0, 0.99 * v.double() + 0.01 * u, v.double()))
    lmd.step(spec, nums, medians, momenta, (g,), out)
    for a, v, x, y in zip(medians, momenta, want_a, want_v):
        torch.testing.assert_close(a.double(), x, atol=5e-6, rtol=0)
        torch.testing.assert_close(v.double(), y, atol=1e-9, rtol=1e-5)
    z1, z2 = (normals(words(keys, plain(n))).double() for keys in nums.next.keys)
    up, down = (medians[0].double() + 0.05 * z1 - 3).exp(), (medians[1].double() + 0.05 * z2 - 3).exp()
    assert float(((out.double() - (up - down)) / (up + down)).abs().max()) < 1e-5


@pytest.mark.parametrize("form", ["split", "hypentropy"])
def test_gradients_are_those_of_autograd(form: str) -> None:
    spec, n = Spec(form=form), 500
    nums = numbers(spec, n)
    logs = tuple((torch.randn(n, generator=torch.Generator().manual_seed(i)) * 0.8).requires_grad_() for i in range(spec.vectors))
    g = torch.linspace(-1, 1, n)
    w = lmd.weights(spec, logs, -3.0, nums.now, plain(n))
    wanted = torch.autograd.grad(w, logs, g)
    for u, want in zip(lmd.gradients(spec, logs, -3.0, nums.now, plain(n), g), wanted):
        torch.testing.assert_close(u, want, atol=1e-7, rtol=2e-4)
    mean = lmd.gradients(spec._replace(at_median=True), logs, -3.0, nums.now, plain(n), g)
    at = torch.autograd.grad(lmd.weights(spec, logs, -3.0, Draw(0.0, 0.0, nums.now.keys), plain(n)), logs, g)
    for u, want in zip(mean, at):
        torch.testing.assert_close(u, want, atol=1e-7, rtol=2e-4)
    assert not torch.allclose(mean[0], wanted[0], rtol=1e-3)  # the control


def test_both_forms_have_one_mean_and_variance() -> None:
    """theta's sample has the mean and the variance of the split's where m+ m- = b^2; the mean is the lifted draw of sigma 0."""
    n, sigma, theta = 1 << 19, 0.3, 0.4
    split, one = Spec(), Spec(form="hypentropy")
    keys = ((1, 2), (3, 4))
    lift = sigma**2 / 2
    logs = torch.full((n,), theta), torch.full((n,), -theta)
    a = lmd.weights(split, logs, -1.0, Draw(sigma, 0.0, keys), plain(n)).double()
    b = lmd.weights(one, logs[:1], -1.0, Draw(sigma, 0.0, keys[:1]), plain(n)).double()
    mean = math.exp(lift) * math.exp(-1.0) * 2 * math.sinh(theta)
    spread = math.exp(sigma**2) * math.expm1(sigma**2) * math.exp(-2.0) * 2 * math.cosh(2 * theta)
    for x in (a, b):
        assert float(x.mean()) == pytest.approx(mean, rel=5e-3)
        assert float(x.var()) == pytest.approx(spread, rel=1e-2)
    for spec, given in ((split, logs), (one, logs[:1])):
        lifted = lmd.weights(spec, given, -1.0, Draw(0.0, lift, keys[: spec.vectors]), plain(n))
        assert float(lifted[0]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("rule", ["log-normal", "constant", "half-normal", "exponential"])
def test_regularisers(rule: str) -> None:
    """With raw steps and no gradient to speak of a log moves by alpha lambda R."""
    a, sigma = 0.7, 0.3
    r = math.exp(a)
    want = {"log-normal": a, "constant": 1.0, "half-normal": r * r * math.exp(2 * sigma**2) - 1,
            "exponential": r * math.exp(sigma**2 / 2) - 1}[rule]  # fmt: skip
    spec = Spec(regulariser=rule, raw=True, given=True)
    nums = numbers(spec, 4, sigma=sigma, alpha=0.01, decay=0.5)
    medians, momenta = tuple(torch.full((4,), a) for _ in range(2)), tuple(torch.zeros(4) for _ in range(2))
    lmd.step(spec, nums, medians, momenta, tuple(torch.full((4,), 1e-30) for _ in range(2)), torch.zeros(4))
    assert float(medians[0][0]) == pytest.approx(a - 0.01 * 0.5 * want, abs=1e-6)


def test_what_has_no_gradient_stays() -> None:
    for spec in (Spec(), Spec("hypentropy", medians="log8", momentum="log8"), Spec(medians="log16", momentum="bf16")):
        medians, momenta, given, out = tensors(spec, 300)
        before = [x.clone() for x in (*medians, *momenta)]
        lmd.step(spec, numbers(spec, 300), medians, momenta, (torch.zeros(300),), out)
        assert all(torch.equal(x, y) for x, y in zip((*medians, *momenta), before))
        lmd.step(spec, numbers(spec, 300), medians, momenta, given, out)
        assert not torch.equal(medians[0], before[0])


def test_a_turn_is_at_most_e_and_logs_stay_in_bounds() -> None:
    spec = Spec(raw=True, given=True)
    medians, momenta = (torch.tensor([0.0, 11.9, -19.9]), torch.zeros(3)), (torch.zeros(3), torch.zeros(3))
    nums = numbers(spec, 3, alpha=1.0, decay=0.0)
    lmd.step(spec, nums, medians, momenta, (torch.tensor([1e6, -1e6, 1e6]), torch.ones(3)), torch.zeros(3))
    torch.testing.assert_close(medians[0], torch.tensor([-1.0, 12.0, -20.0]))


@pytest.mark.parametrize("name", ["log8", "log16"])
def test_grids_of_logs_round_without_bias(name: str) -> None:
    dtype, cell, top = lmd.GRIDS[name]
    n = 1 << 18
    u = uniform(words((1, 2), plain(n)), 0)
    for share in (0.1, 0.5, 0.93):
        a = torch.full((n,), (5 + share) * cell)
        codes = lmd.grid_log(a, dtype, u)
        assert set(codes.unique().tolist()) == {5.0, 6.0}
        assert float(codes.mean()) == pytest.approx(5 + share, abs=4e-3)
    assert lmd.grid_log(torch.tensor([1e3, -1e3]), dtype, 0.5).tolist() == [top, -top - 1]
    assert float(lmd.grid_log(torch.full((n,), 5.1 * cell), dtype, 0.5).mean()) == 5.0  # the control: nearest stalls
    stored = lmd.grid_log(a, dtype, 0.5).to(dtype)
    assert torch.equal(lmd.grid_log(lmd.read_log(stored), dtype, u).to(dtype), stored)


def test_grid_of_momenta_rounds_without_bias() -> None:
    n, top = 1 << 18, -3.0
    u = uniform(words((3, 4), plain(n)), 1)
    for v in (0.1, -0.037, 1e-5, 2.0**-3, 3e-11):
        codes = lmd.grid_momentum(torch.full((n,), v), torch.int8, top, u).to(torch.int8)
        back = lmd.read_momentum(codes, top)
        assert float(back.mean()) == pytest.approx(v, rel=0.03 if abs(v) < 1e-10 else 2e-3)
        assert len(codes.unique()) <= 2
    codes = lmd.grid_momentum(torch.tensor([0.0, 1.0, -1.0]), torch.int8, top, torch.full((3,), 0.5))
    assert codes.tolist() == [0, 127, -127]
    assert lmd.read_momentum(codes.to(torch.int8), top).tolist() == [0.0, 2.0**top, -(2.0**top)]


def test_numbers_may_be_tensors() -> None:
    """As where a graph is captured: the same step."""
    for spec in (Spec(momentum="log8"), Spec("hypentropy", "half-normal", medians="log8")):
        nums = numbers(spec, 200)
        held = nums._replace(**{
            key: torch.tensor(getattr(nums, key)) for key in ("alpha", "decay", "beta1", "beta2", "sigma", "centre", "range")
        })  # fmt: skip
        held = held._replace(next=Draw(torch.tensor(0.05), torch.tensor(0.0), nums.next.keys))
        results = []
        for given in (nums, held):
            medians, momenta, g, out = tensors(spec, 200)
            lmd.step(spec, given, medians, momenta, g, out)
            results.append((*medians, *momenta, out))
        for x, y in zip(*results):
            torch.testing.assert_close(x.float(), y.float(), atol=1e-5, rtol=1e-5)
