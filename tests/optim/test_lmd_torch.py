"""LMD as a torch optimiser: groups, schedules, state dicts, contexts, closures, precision, capture."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.optim import LMD, split_parameters

STATES = ("fp32", "bf16", "int8-log")
FORMS = ("split", "hypentropy")


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)).to(dtype)


def backward(net: nn.Module, step: int, rows: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(100 + step)
    p = next(net.parameters())
    x, y = torch.randn(rows, 16, generator=draw).to(p.dtype), torch.randn(rows, 8, generator=draw).to(p.dtype)
    loss = (net(x) - y).square().mean()
    loss.backward()
    return loss


def train(net: nn.Module, optimizer: LMD, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_run_goes_on_with_the_same_bits(dtype: torch.dtype, state: str, form: str) -> None:
    """And every tensor keeps its dtype, which torch's own load would cast to the parameter's."""
    whole, cut = model(dtype), model(dtype)
    straight, first = (LMD(net.named_parameters(), form=form, state=state, seed=7) for net in (whole, cut))
    train(whole, straight, 0, 6)
    train(cut, first, 0, 3)
    file = io.BytesIO()
    with first.mean():
        torch.save({"model": cut.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = model(dtype, seed=5)
    again = LMD(fresh.named_parameters(), form=form, state=state, seed=7)
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    kinds = {key: value.dtype for p in cut.parameters() for key, value in first.state[p].items()}
    assert kinds == {key: value.dtype for p in fresh.parameters() for key, value in again.state[p].items()}
    assert {torch.int8} <= set(kinds.values()) or state != "int8-log"
    train(fresh, again, 3, 6)
    assert same(whole, fresh)


def test_another_seed_draws_other_noise() -> None:
    nets = [model(), model()]
    for net, seed in zip(nets, (0, 1)):
        train(net, LMD(net.parameters(), seed=seed), 0, 2)
    assert not same(*nets)


@pytest.mark.parametrize("what", ["mean", "sampled"])
@pytest.mark.parametrize("form", FORMS)
def test_contexts_give_the_sample_back_after_errors_too(form: str, what: str) -> None:
    net = model()
    optimizer = LMD(net.parameters(), form=form)
    train(net, optimizer, 0, 2)
    before = [p.detach().clone() for p in net.parameters()]
    pointers = [p.data_ptr() for p in net.parameters()]

    def fails() -> None:
        with getattr(optimizer, what)():
            assert not torch.equal(net[0].weight, before[0])
            assert torch.equal(net[0].bias, before[1])  # AdamW's
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fails()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))
    assert pointers == [p.data_ptr() for p in net.parameters()]  # never bound anew: views and graphs stay valid
    train(net, optimizer, 2, 3)


def test_steps_in_a_context_are_refused() -> None:
    net = model()
    optimizer = LMD(net.parameters())
    train(net, optimizer, 0, 1)
    for call in (optimizer.step, optimizer.next_sample, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        with optimizer.mean(), pytest.raises(ConfigError, match="inside mean"):
            call()
    with optimizer.sampled(), pytest.raises(ConfigError, match=r"mean\(\) inside sampled"), optimizer.mean():
        pass
    train(net, optimizer, 1, 2)


def test_micro_batches_under_one_noise_are_one_batch() -> None:
    whole, parts = model().double(), model().double()
    a, b = LMD(whole.parameters()), LMD(parts.parameters())
    for step in range(3):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 16, generator=draw).double(), torch.randn(8, 8, generator=draw).double()
        a.zero_grad()
        b.zero_grad()
        (whole(x) - y).square().mean().backward()
        for i in (0, 4):
            ((parts(x[i : i + 4]) - y[i : i + 4]).square().mean() / 2).backward()
        a.step()
        b.step()
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["lambda", "onecycle", "cosine"])
def test_schedulers_move_its_lr(kind: str) -> None:
    net = model()
    optimizer = LMD(split_parameters(net), lr=0.02, aux={"lr": 1e-3})
    schedule: Any = {
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.05, 1e-2], total_steps=10),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    }[kind]()
    seen = set()
    for step in range(5):
        optimizer.zero_grad()
        backward(net, step)
        before = optimizer.state.get(net[0].weight, {}).get("log_pos", torch.zeros(())).clone()
        optimizer.step()
        after = optimizer.state[net[0].weight]["log_pos"]
        if step:
            pulled = 1 + optimizer.param_groups[0]["decay"] * before.abs()
            assert float(((after - before).abs() / pulled).max()) <= float(optimizer.param_groups[0]["lr"]) * 1.001
        seen.add(float(optimizer.param_groups[0]["lr"]))
        schedule.step()
    assert len(seen) == 5


def test_an_lr_that_a_schedule_drives_above_a_factor_e_is_refused() -> None:
    net = model()
    optimizer = LMD(net.parameters())
    optimizer.param_groups[0]["lr"] = 1.2
    backward(net, 0)
    with pytest.raises(ConfigError, match="log units per step"):
        optimizer.step()


def test_groups_have_their_own_settings_and_may_come_later() -> None:
    net = model()
    optimizer = LMD([{"params": net[0].parameters(), "sigma": 0.2, "lr": 0.1}], lr=0.01)
    train(net, optimizer, 0, 2)
    late = dict(net[2].named_parameters())
    optimizer.add_param_group({"params": list(late.values())})
    assert [group["optimizer"] for group in optimizer.param_groups] == ["lmd", "adamw", "lmd", "adamw"]
    assert [group.get("sigma") for group in optimizer.param_groups] == [0.2, None, 0.05, None]
    before = net[2].weight.detach().clone()
    train(net, optimizer, 2, 4)
    assert int(optimizer.state[net[0].weight]["draws"]) == 4
    assert int(optimizer.state[net[2].weight]["draws"]) == 2
    assert not torch.equal(net[2].weight, before)
    with pytest.raises(ConfigError, match="lmd or by adamw"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2, 2))], "optimizer": "lmb"})
    with pytest.raises(ConfigError, match="AdamW has no sigma"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2))], "optimizer": "adamw", "sigma": 0.1})


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.detach().clone()
    optimizer = LMD(net.parameters())
    train(net, optimizer, 0, 2)
    assert torch.equal(net[0].weight, before)
    with optimizer.sampled():
        assert torch.equal(net[0].weight, before)


def test_copies_and_pickles_go_on_alike() -> None:
    net = model()
    optimizer = LMD(net.parameters(), samples=2, seed=3)
    train(net, optimizer, 0, 2)
    twin_net, twin = copy.deepcopy((net, optimizer))
    third_net, third = pickle.loads(pickle.dumps((net, optimizer)))
    for a, b in ((net, optimizer), (twin_net, twin), (third_net, third)):
        train(a, b, 2, 4)
    assert same(net, twin_net)
    assert same(net, third_net)
    assert twin.samples == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_hold_rounded_samples_of_exact_medians(dtype: torch.dtype, form: str) -> None:
    """Steps far below an ulp of bf16 add up in the medians; AdamW on bf16 weights, the control, stands still."""
    wide = nn.Parameter(0.7 + 0.3 * torch.rand(32, 32, generator=torch.Generator().manual_seed(0)))
    half, plain = nn.Parameter(wide.detach().to(dtype)), nn.Parameter(wide.detach().to(dtype))
    start = half.detach().clone()
    optimizer, control = LMD([half], lr=1e-4, sigma=0.01, decay=0.0, form=form), torch.optim.AdamW([plain], lr=7e-5, weight_decay=0)
    for _ in range(100):
        half.grad, plain.grad = torch.ones_like(half), torch.ones_like(plain)
        optimizer.step()
        control.step()
    with optimizer.mean():
        moved = float((half.detach().float() / start.float()).log().mean())
    gross = 1.2 if form == "split" else 1.02  # (m+ + m-) / w at an offset of 0.1
    assert moved == pytest.approx(-0.01 * gross, rel=0.1)
    assert torch.equal(plain, start)


def test_a_loss_scaler_unscales_and_skips() -> None:
    net, plain = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, control = LMD(net.parameters()), LMD(plain.parameters())
    for step in range(4):
        optimizer.zero_grad()
        control.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        if step == 2:
            x = x * math.inf
        scaler.scale(net(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        plain(x).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        control.step()
    assert same(net, plain)
    assert control.skipped == 1
    assert scaler.get_scale() == 512.0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {}, {"form": "hypentropy"}, {"state": "int8-log"}, {"state": "bf16", "form": "hypentropy"}, {"betas": 0.9},
], ids=str)  # fmt: skip
def test_a_compiled_step_is_one_graph_and_a_schedule_does_not_compile_again(settings: dict[str, Any]) -> None:
    eager_net, net = model(), model()
    eager = LMD(split_parameters(eager_net), lr=torch.tensor(0.02), aux={"lr": torch.tensor(1e-3)}, kernel="reference", **settings)
    optimizer = LMD(split_parameters(net), lr=torch.tensor(0.02), aux={"lr": torch.tensor(1e-3)}, kernel="reference", **settings)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=count)
    for step in range(5):
        for group in (*eager.param_groups, *optimizer.param_groups):
            group["lr"].mul_(0.9)
        for each in (eager, optimizer):
            each.zero_grad()
        backward(eager_net, step)
        backward(net, step)
        if step == 3:
            net[2].bias.grad[0] = eager_net[2].bias.grad[0] = math.nan
        eager.step()
        optimizer.step() if step == 0 else compiled()  # the first step makes the state
    assert len(graphs) == 1
    assert optimizer.skipped == eager.skipped == 1
    for p, q in zip(net.parameters(), eager_net.parameters()):
        assert optimizer.state[p].keys() == eager.state[q].keys()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_inductor_makes_the_same_step() -> None:
    net, plain = model(), model()
    optimizer, control = (LMD(split_parameters(x), lr=torch.tensor(0.02), kernel="reference") for x in (net, plain))
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True)
    for step in range(3):
        for each in (optimizer, control):
            each.zero_grad()
        backward(net, step)
        backward(plain, step)
        control.step()
        optimizer.step() if step == 0 else compiled()
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def bytes_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    count = sum(p.numel() for p in net.parameters())
    held = [*net.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    return sum(x.numel() * x.element_size() for x in held) / count


@pytest.mark.parametrize(("settings", "dtype", "most"), [
    ({"form": "split"}, torch.float32, 20), ({"form": "hypentropy"}, torch.float32, 12),
    ({"form": "split", "state": "int8-log"}, torch.bfloat16, 6),
    ({"form": "hypentropy", "state": "int8-log"}, torch.bfloat16, 4),
    ({"form": "hypentropy", "state": "bf16"}, torch.bfloat16, 6),
], ids=str)  # fmt: skip
def test_persistent_bytes_per_parameter(settings: dict[str, Any], dtype: torch.dtype, most: int) -> None:
    """Weights and state, no gradient. AdamW in float32: 12."""
    net = nn.Linear(1024, 1024, bias=False).to(dtype)
    optimizer = LMD(net.parameters(), **settings)
    net(torch.ones(1, 1024, dtype=dtype)).sum().backward()
    optimizer.step()
    assert bytes_of(net, optimizer) == pytest.approx(most, abs=1e-3)
    plain = nn.Linear(1024, 1024, bias=False)
    control = torch.optim.AdamW(plain.parameters())
    plain(torch.ones(1, 1024)).sum().backward()
    control.step()
    assert bytes_of(plain, control) == pytest.approx(12, abs=1e-3)
