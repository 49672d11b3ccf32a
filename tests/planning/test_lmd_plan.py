"""A plan for LMD: rows, groups that its optimiser takes as they are, a user's own groups, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.models import Decoder, DecoderConfig
from isoscale.optim import LMD, make_optimizer


def decoder(width: int = 64, **more: Any) -> Decoder:
    return Decoder(DecoderConfig(**{"width": width, "depth": 2, "scaling": "plain", "norm": "trainable", **more}))


def planned(model: nn.Module, **more: Any) -> iso.Plan:
    return iso.plan(model, "complete-d", base=iso.Scale(width=32, depth=2), optimizer="lmd", **more)


def test_what_the_user_leaves_out_is_lmds() -> None:
    plan = planned(decoder(32))
    row = plan.row("blocks.0.attn.qkv.weight")
    assert (row.optimizer, row.lr, row.sigma, row.weight_decay, row.betas) == ("lmd", 0.02, 0.05, 0.1, (0.9, 0.99))
    assert plan.row("embed.weight").lr == pytest.approx(0.003)
    assert plan.row("embed.weight").sigma is None
    said = planned(decoder(32), hps={"sigma": 0.2, "weight_decay": 0.0}).row("blocks.0.attn.qkv.weight")
    assert (said.sigma, said.weight_decay, said.lr) == (0.2, 0.0, 0.02)
    assert iso.plan(decoder(32), "complete-d", base=iso.Scale(width=32, depth=2)).hps["lr"] == 1.0  # AdamW's as before
    unit = iso.plan(Decoder(DecoderConfig(width=64, depth=1)), "u-mup", optimizer="lmd")
    row = unit.row("blocks.0.attn.qkv.weight")
    assert (row.lr, row.weight_decay) == pytest.approx((0.01, 0.2))  # at fan-in 64 and one block


def test_groups_go_into_lmd_as_they_are_and_update_moves_them() -> None:
    model = decoder()
    plan = planned(model)
    groups = plan.param_groups(model)
    keys = {"lmd": {"lr", "sigma", "betas", "decay"}, "adamw": {"lr", "weight_decay", "betas", "eps"}}
    for group in groups:
        assert set(group) == {"params", "optimizer", *keys[group["optimizer"]]}
    made = LMD(groups)
    assert [group["optimizer"] for group in made.param_groups] == [group["optimizer"] for group in groups]
    assert {group["optimizer"] for group in plan.param_groups(model, part="lmd")} == {"lmd"}
    before = [group["lr"] for group in made.param_groups]
    longer = iso.plan(model, "complete-d", base=iso.Scale(width=32, depth=2, batch_tokens=64, tokens=6400),
                      target=iso.Scale(batch_tokens=64, tokens=6400), optimizer="lmd")  # fmt: skip
    moved = longer.at(tokens=25600)
    moved.update(made, model)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([lr / 2 for lr in before])
    lmd = next(group for group in made.param_groups if group["optimizer"] == "lmd" and group["lr"] < 0.009)
    assert lmd["decay"] == pytest.approx(0.1 * 2**0.5 / 2)
    assert lmd["betas"] == pytest.approx((0.975, 0.9975))


def test_the_plan_explains_itself_and_comes_back_from_json() -> None:
    plan = planned(decoder())
    assert iso.Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["rows"][0]["sigma"] is None
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 80
    assert "sigma" in text
    assert "lambda" in text
    assert "sigma" not in str(iso.plan(decoder(), "complete-d", base=iso.Scale(width=32, depth=2)))
    reasons = plan.row("blocks.0.attn.qkv.weight").reasons
    assert reasons["lr"] == "0.0141421 = lr 0.02 x fan_in_ratio^-1/2 (fan_in_ratio 2)"
    assert reasons["weight_decay"] == "0.141421 = weight_decay 0.1 x fan_in_ratio^1/2 (fan_in_ratio 2)"
    assert reasons["sigma"] == "0.05 = sigma 0.05"
    assert [c.quantity for c in plan.diff(planned(decoder(), hps={"sigma": 0.1}))].count("sigma") > 0


@pytest.mark.parametrize(("hps", "key", "words"), [
    ({"lr": 1.5}, "hps.lr", "by more than a factor e"), ({"sigma": 1.5}, "hps.sigma", "at most 1"),
    ({"sigma": 0.0}, "hps.sigma", "must be positive"), ({"decay": 0.1}, "hps.decay", "unknown hyperparameter"),
])  # fmt: skip
def test_refusals(hps: dict[str, float], key: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        planned(decoder(32), hps=hps)
    assert caught.value.key == key
    assert caught.value.hint
    if key == "hps.lr":
        assert "0.02 is the default" in caught.value.hint
        at_most = float(caught.value.hint.split()[2])
        assert planned(decoder(32), hps={"lr": at_most}).row("blocks.0.attn.qkv.weight").lr <= 1
        assert iso.plan(decoder(32), "complete-d", base=iso.Scale(width=32, depth=2), hps=hps).hps["lr"] == 1.5


def test_a_batch_ramp_into_too_large_an_lr_is_refused() -> None:
    plan = iso.plan(decoder(32), "complete-d", base=iso.Scale(width=32, depth=2, batch_tokens=64), optimizer="lmd",
                    target=iso.Scale(batch_tokens=64), hps={"lr": 0.6})  # fmt: skip
    assert plan.at(batch_tokens=128).row("blocks.0.attn.qkv.weight").lr == pytest.approx(0.6 * 2**0.5)
    with pytest.raises(PlanError, match="by more than a factor e"):
        plan.at(batch_tokens=256)


def test_a_users_own_groups() -> None:
    model = decoder()
    plan = planned(model)
    rows = {row.name: row for row in plan.rows}
    parts: dict[str, list[nn.Parameter]] = {"lmd": [], "adamw": []}
    for name, p in model.named_parameters():
        parts[rows[name].optimizer].append(p)
    own = [{"params": parts["lmd"], "optimizer": "lmd", "lr": 0.1, "decay": 0.2, "sigma": 0.3, "mine": 1},
           {"params": parts["adamw"], "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1}]  # fmt: skip
    made = plan.param_groups(model, own)
    hidden = next(g for g in made if any(p is model.get_parameter("blocks.0.attn.qkv.weight") for p in g["params"]))
    assert (hidden["lr"], hidden["decay"]) == pytest.approx((0.1 / 2**0.5, 0.2 * 2**0.5))
    assert (hidden["sigma"], hidden["mine"]) == (0.3, 1)
    assert sum(len(group["params"]) for group in LMD(made).param_groups) == len(rows)
    for change, words in (({"optimizer": None}, "does not say which optimiser"), ({"optimizer": "adamw"}, "is for adamw")):
        group = {k: v for k, v in {**own[0], **change}.items() if v is not None}
        with pytest.raises(PlanError, match=words) as caught:
            plan.param_groups(model, [group, own[1]])
        assert caught.value.key == "groups.optimizer"
    with pytest.raises(PlanError, match="no decay"):
        plan.param_groups(model, [{k: v for k, v in own[0].items() if k != "decay"}, own[1]])
    small = decoder(32)
    same = planned(small)
    groups = same.param_groups(small)
    back = same.param_groups(small, groups)
    assert [{k: v for k, v in g.items() if k != "params"} for g in back] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]


def test_a_tied_readout_is_adamws() -> None:
    plan = planned(decoder(tied=True))
    assert {row.optimizer for row in plan.rows if row.role in ("embedding", "gain", "final_norm")} == {"adamw"}
    assert {row.optimizer for row in plan.rows if row.role == "hidden"} == {"lmd"}


def test_switches_reach_the_rest_too() -> None:
    model = Decoder(DecoderConfig(width=64, depth=1))
    plain, fixed = (iso.plan(model, "u-mup", optimizer="lmd", embedding_lr=said).row("embed.weight")
                    for said in ("rule", "constant"))  # fmt: skip
    assert fixed.lr == pytest.approx(8 * plain.lr)
    told = iso.plan(model, "u-mup", optimizer="lmd", decay="independent", hps={"weight_decay": 0.001, "lr": 0.3})
    assert {round(row.lr * row.weight_decay, 9) for row in told.rows} == {0.001}


class Zeros(nn.Module):
    """Somebody's residual net whose branches start at zero."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.up = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)
        for layer in self.down:
            nn.init.zeros_(layer.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for up, down in zip(self.up, self.down):
            x = x + down(torch.relu(up(x)))
        return self.head(self.norm(x))


def test_what_starts_at_zero_has_no_size_and_is_adamws() -> None:
    torch.manual_seed(0)
    model = Zeros(64, 4)
    plan = iso.plan(model, "complete-d", base=Zeros(32, 2), optimizer="lmd", example=torch.zeros(1, 4, dtype=torch.long))
    by = {row.name: row.optimizer for row in plan.rows}
    assert by["up.0.weight"] == by["head.weight"] == "lmd"
    assert by["down.0.weight"] == by["embed.weight"] == by["head.bias"] == "adamw"
    plan.apply(model)
    made = make_optimizer(plan, model)
    model(torch.zeros(1, 4, dtype=torch.long)).square().mean().backward()
    made.step()
    assert model.down[0].weight.any()
    with pytest.raises(Exception, match="all zeros"):  # the control: LMD itself cannot start there
        LMD([{"params": [nn.Parameter(torch.zeros(3, 3))], "optimizer": "lmd"}])


def test_a_branch_multiplier_goes_into_the_init_and_leaves_alpha() -> None:
    torch.manual_seed(0)
    model = Zeros(32, 8)
    for layer in model.down:
        nn.init.normal_(layer.weight, std=0.1)
    base = Zeros(32, 2)
    for layer in base.down:
        nn.init.normal_(layer.weight, std=0.1)
    example = torch.zeros(1, 4, dtype=torch.long)
    rows = {kind: iso.plan(model, "complete-d", base=base, optimizer=kind, example=example, hps={"lr": 0.01}).row("down.0.weight")
            for kind in ("lmd", "adamw")}  # fmt: skip
    assert rows["lmd"].init_std == pytest.approx(rows["adamw"].init_std)
    assert rows["lmd"].init_std == pytest.approx(0.1 / 4, rel=0.1)
    assert (rows["lmd"].lr, rows["adamw"].lr) == pytest.approx((0.01, 0.01 / 4))
    assert rows["lmd"].hook == 1
