"""muP's rules against microsoft/mup, tensor by tensor, on models that it supports."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mup
import pytest
import torch
from torch import Tensor, nn

import isoscale as iso


class Net(nn.Module):
    """An MLP; `head` is the class of the readout."""

    def __init__(self, width: int, head: type[nn.Linear]) -> None:
        super().__init__()
        self.first = nn.Linear(10, width)
        self.middle = nn.Linear(width, 2 * width)
        self.back = nn.Linear(2 * width, width, bias=False)
        self.out = head(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.back(torch.relu(self.middle(torch.relu(self.first(x)))))))


class Conv(nn.Module):
    """Plain and grouped convolutions with batch norm."""

    def __init__(self, width: int, head: type[nn.Linear]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.out = head(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Transformer(nn.Module):
    """One block, untied."""

    def __init__(self, width: int, head: type[nn.Linear]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.last = nn.LayerNorm(width)
        self.out = head(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        return self.out(self.last(x + self.down(torch.relu(self.up(x)))))


MODELS: list[Callable[[int, type[nn.Linear]], nn.Module]] = [Net, Conv, Transformer]


def theirs(make: Callable[[int, type[nn.Linear]], nn.Module]) -> nn.Module:
    """mup's model at width 64, base 16, as its README says."""
    torch.manual_seed(0)
    model = make(64, mup.MuReadout)
    mup.set_base_shapes(model, make(16, mup.MuReadout), delta=make(32, mup.MuReadout))
    return model


def settings(optimizer: torch.optim.Optimizer, model: nn.Module, key: str) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group[key] for group in optimizer.param_groups for p in group["params"]}


def ours(make: Callable[[int, type[nn.Linear]], nn.Module], optimizer: str = "adamw") -> iso.Plan:
    torch.manual_seed(0)
    return iso.plan(make(64, nn.Linear), "mup", base=make(16, nn.Linear), optimizer=optimizer, absorb=False,
                    hps={"lr": 0.01, "weight_decay": 0.1})  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_adam_lr_and_decay(make: Callable[[int, type[nn.Linear]], nn.Module]) -> None:
    model = theirs(make)
    optimizer = mup.MuAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    rates, decays = settings(optimizer, model, "lr"), settings(optimizer, model, "weight_decay")
    for row in ours(make).rows:
        assert row.lr == pytest.approx(rates[row.name]), row.name
        if row.role == "hidden":  # ours leaves gains and biases undecayed, mup decays all
            assert row.weight_decay == pytest.approx(decays[row.name]), row.name
    assert len(set(rates.values())) == 2


@pytest.mark.parametrize("make", MODELS)
def test_sgd_lr(make: Callable[[int, type[nn.Linear]], nn.Module]) -> None:
    model = theirs(make)
    rates = settings(mup.MuSGD(model.parameters(), lr=0.01), model, "lr")
    for row in ours(make, "sgd").rows:
        if row.name == "out.bias":  # finite in mup: LR unscaled; so it is here
            assert rates[row.name] == 0.01
        assert row.lr == pytest.approx(rates[row.name]), row.name
    assert len(set(rates.values())) == 2


@pytest.mark.parametrize("make", MODELS)
def test_readout_multiplier_and_initial_scale(make: Callable[[int, type[nn.Linear]], nn.Module]) -> None:
    model = theirs(make)
    made = ours(make)
    assert made.row("out.weight").hook == pytest.approx(model.out.output_mult / model.out.width_mult())  # type: ignore[union-attr,operator]
    plain = make(64, nn.Linear)
    made.apply(plain)
    plain = copy.deepcopy(plain)
    there = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        name = name.replace("parametrizations.weight.original", "weight")
        if parameter.dim() > 1:
            noise = 4 / (2 * parameter.numel()) ** 0.5
            assert float(parameter.detach().std()) == pytest.approx(float(there[name].detach().std()), rel=2 * noise), name


def test_the_comparison_can_fail() -> None:
    model = theirs(Net)
    rates = settings(mup.MuAdamW(model.parameters(), lr=0.01), model, "lr")
    sp = iso.plan(Net(64, nn.Linear), "sp", hps={"lr": 0.01})
    assert any(row.lr != pytest.approx(rates[row.name]) for row in sp.rows)
