"""AdamW, Adam and SGD on scaled parameters against torch's, in every kind of state."""

import copy

import pytest
import torch
from torch import nn

from isoscale import scalify as sc
from isoscale._base.errors import ConfigError
from isoscale.scalify.storage import KINDS, random_bits, rounded, uniform


def problem(size=1e-6):
    """Parameters, and gradients that depend on them: a quadratic bowl whose gradients fp16 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 40, generator=generator) * 0.02, torch.zeros(9)]
    goal = [torch.randn(7, 40, generator=generator), torch.randn(9, generator=generator)]
    return start, lambda i, w: (w - goal[i]) * size


def train(make, scaled, steps=60, dtype=torch.float32, size=1e-6):
    start, gradient = problem(size)
    ps = [nn.Parameter(sc.as_scaled(w, dtype=dtype) if scaled else w.clone()) for w in start]
    optimizer = make(ps)
    for _ in range(steps):
        for i, p in enumerate(ps):
            g = gradient(i, sc.as_plain(p.detach(), torch.float32))
            p.grad = sc.as_scaled(g, dtype=dtype) if scaled else g
        optimizer.step()
    return torch.cat([sc.as_plain(p.detach(), torch.float32).flatten() for p in ps]), optimizer


def distance(a, b):
    return float((a - b).norm() / b.norm())


PAIRS = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=3e-3), lambda p, **o: sc.ScaledAdamW(p, lr=3e-3, **o)),
    "adam": (lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-7),
             lambda p, **o: sc.ScaledAdamW(p, lr=3e-3, weight_decay=1e-7, decoupled=False, **o)),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e4), lambda p, **o: sc.ScaledSGD(p, lr=1e4, **o)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=1e4, momentum=0.9, weight_decay=1e-8),
                 lambda p, **o: sc.ScaledSGD(p, lr=1e4, momentum=0.9, weight_decay=1e-8, **o)),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=1e4, momentum=0.9, nesterov=True),
                 lambda p, **o: sc.ScaledSGD(p, lr=1e4, momentum=0.9, nesterov=True, **o)),
    "dampened": (lambda p: torch.optim.SGD(p, lr=1e4, momentum=0.9, dampening=0.3, maximize=True),
                 lambda p, **o: sc.ScaledSGD(p, lr=1e4, momentum=0.9, dampening=0.3, maximize=True, **o)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_float32_state_is_torchs_optimiser_to_round_off(name):
    theirs, _ = train(PAIRS[name][0], False)
    ours, _ = train(PAIRS[name][1], True)
    assert distance(ours, theirs) < 2e-5
    other, _ = train(PAIRS["sgd" if name != "sgd" else "momentum"][1], True)
    assert distance(other, theirs) > 1e-3  # the control


def test_torchs_own_adamw_runs_on_scaled_parameters_by_the_rules():
    theirs, _ = train(lambda p: torch.optim.AdamW(p, lr=3e-3), False)
    for foreach in (False, True):
        ours, _ = train(lambda p, f=foreach: torch.optim.AdamW(p, lr=3e-3, foreach=f), True)
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize(("state", "bound"), [("fp16", 2e-3), ("bf16", 2e-2), ("fp8", 0.12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_state_follows_float32(state, bound, dtype):
    theirs, _ = train(PAIRS["adamw"][0], False)
    ours, optimizer = train(lambda p: sc.ScaledAdamW(p, lr=3e-3, state=state), True, dtype=dtype)
    assert distance(ours, theirs) < bound
    kept = next(iter(optimizer.state.values()))["exp_avg"]
    assert kept.dtype == KINDS[state].dtype


def test_unscaled_fp16_state_fails_on_the_same_problem():
    start, gradient = problem()
    v = (0.001 * gradient(0, start[0]).square()).half()
    assert v.count_nonzero() == 0  # the control of the test above


def test_a_gradient_under_a_wrong_scale_is_rescaled_before_it_reaches_fp16_state():
    theirs, _ = train(PAIRS["adamw"][0], False)
    found = {}
    for rescale_grads in (True, False):
        start, gradient = problem()
        ps = [nn.Parameter(sc.as_scaled(w, dtype=torch.float32)) for w in start]
        optimizer = sc.ScaledAdamW(ps, lr=3e-3, state="fp16", rescale_grads=rescale_grads, state_period=1000)
        for _ in range(60):
            for i, p in enumerate(ps):
                p.grad = sc.as_scaled(gradient(i, sc.as_plain(p.detach())), scale=64.0)
            optimizer.step()
        found[rescale_grads] = torch.cat([sc.as_plain(p.detach()).flatten() for p in ps])
    assert distance(found[True], theirs) < 2e-3
    assert not distance(found[False], theirs) < 0.05  # the control


def test_masters_hold_what_fp16_weights_lose():
    theirs, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-5), False)
    nearest, _ = train(lambda p: sc.ScaledAdamW(p, lr=1e-5, stochastic=False), True, dtype=torch.float16)
    master, _ = train(lambda p: sc.ScaledAdamW(p, lr=1e-5, stochastic=False, master=True), True, dtype=torch.float16)
    start = torch.cat([w.flatten() for w in problem()[0]])
    moved = (theirs - start).norm()
    assert (master - theirs).norm() < 0.6 * moved  # its copy is rounded
    assert (nearest - theirs).norm() > (master - theirs).norm()


def drawn(seed, count, half=0):
    return uniform(random_bits(torch.Size([count]), torch.tensor(seed, dtype=torch.int32), torch.device("cpu")), half)


def test_stochastic_rounding_keeps_the_mean_and_nearest_stalls():
    x = torch.full((20000,), 1.0 + 2.0**-13)
    got = rounded(x, KINDS["fp16"], drawn(7, len(x))).double()
    assert abs(float(got.mean()) - (1 + 2.0**-13)) < 2e-5
    assert set(got.unique().tolist()) == {1.0, 1.0 + 2.0**-10}
    assert torch.equal(rounded(x, KINDS["fp16"], None).double(), torch.ones(20000).double())


def test_the_random_bits_are_uniform_and_differ_between_seeds():
    a, b, c = drawn(1, 100000), drawn(2, 100000), drawn(1, 100000, 1)
    for u in (a, b, c):
        assert abs(float(u.mean()) - 0.5) < 0.005
        assert abs(float(u.var()) - 1 / 12) < 0.002
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.02
    for other in (b, c):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 0.02


@pytest.mark.parametrize("state", ["fp32", "fp16", "fp8"])
def test_state_dict_round_trip_keeps_dtypes_and_goes_on_bit_for_bit(state):
    start, gradient = problem()

    def steps(ps, optimizer, count):
        for _ in range(count):
            for i, p in enumerate(ps):
                p.grad = sc.as_scaled(gradient(i, sc.as_plain(p.detach(), torch.float32)), dtype=torch.float16)
            optimizer.step()

    def made():
        ps = [nn.Parameter(sc.as_scaled(w, dtype=torch.float16)) for w in start]
        return ps, sc.ScaledAdamW(ps, lr=3e-3, state=state, master=True, seed=3)

    ps, optimizer = made()
    steps(ps, optimizer, 5)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ps)
    steps(ps, optimizer, 5)
    qs, other = made()
    with torch.no_grad():
        for q, w in zip(qs, weights):
            q.copy_(w)
    other.load_state_dict(saved)
    assert other.state[qs[0]]["exp_avg"].dtype == KINDS[state].dtype
    assert other.state[qs[0]]["master"].dtype == torch.float32
    steps(qs, other, 5)
    for p, q in zip(ps, qs):
        assert torch.equal(sc.as_plain(p.detach()), sc.as_plain(q.detach()))


@pytest.mark.parametrize(
    ("state", "master", "expected"), [("fp32", False, 10.0), ("fp16", False, 6.0), ("fp8", False, 4.06), ("fp32", True, 14.0)]
)  # fmt: skip
def test_bytes_per_parameter(state, master, expected):
    p = nn.Parameter(sc.as_scaled(torch.randn(256, 256), dtype=torch.float16))
    optimizer = sc.ScaledAdamW([p], state=state, master=master)
    found = optimizer.bytes_per_parameter()
    assert abs(found["all"] - expected) < 0.02
    p.grad = sc.as_scaled(torch.randn(256, 256), dtype=torch.float16)
    optimizer.step()
    assert optimizer.bytes_per_parameter() == found


def test_schedules_closures_and_missing_gradients():
    p, q = (nn.Parameter(sc.as_scaled(torch.ones(3))) for _ in range(2))
    optimizer = sc.ScaledAdamW([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    assert torch.equal(sc.as_plain(q.detach()), torch.ones(3))
    assert float(sc.as_plain(p.detach())[0]) < 1


def test_bad_settings_are_refused():
    p = nn.Parameter(sc.as_scaled(torch.ones(3)))
    with pytest.raises(ConfigError, match="no such state") as caught:
        sc.ScaledAdamW([p], state="fp61")
    assert "fp16" in str(caught.value)
    with pytest.raises(ConfigError, match="at least 1"):
        sc.ScaledSGD([p], state_period=0)
    with pytest.raises(ConfigError, match="is not scaled"):
        sc.ScaledAdamW([nn.Parameter(torch.ones(3))])


def test_zero_gradients_and_non_finite_ones():
    p = nn.Parameter(sc.as_scaled(torch.ones(4)))
    optimizer = sc.ScaledAdamW([p], lr=0.1, weight_decay=0.0, state="fp16")
    p.grad = sc.as_scaled(torch.zeros(4))
    optimizer.step()
    assert torch.equal(sc.as_plain(p.detach()), torch.ones(4))
    p.grad = sc.as_scaled(torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    optimizer.step()
    assert torch.isnan(sc.as_plain(p.detach())[1])  # as torch's AdamW: it does not hide it
    assert torch.isfinite(sc.as_plain(p.detach())[[0, 2, 3]]).all()
