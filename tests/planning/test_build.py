from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import isoscale as iso
from isoscale._base.errors import ConfigError, PlanError
from isoscale.models import Decoder
from isoscale.rules import by_name, hp

Make = Callable[..., Decoder]


def test_umup_numbers_as_in_the_paper(make: Make) -> None:
    """arXiv 2407.17465 table 2 at width 32, depth 2, LR 2."""
    plan = iso.plan(make(), "u-mup", hps={"lr": 2.0, "weight_decay": 0.01})
    embed, head = plan.row("embed.weight"), plan.row("head.weight")
    qkv, down = plan.row("blocks.1.attn.qkv.weight"), plan.row("blocks.0.mlp.down.weight")
    assert embed.lr == pytest.approx(2 / 32**0.5)
    assert qkv.lr == pytest.approx(2 / 32**0.5 / 2**0.5)
    assert down.lr == pytest.approx(2 / 96**0.5 / 2**0.5)
    assert head.lr == 2.0
    assert {row.init_std for row in plan.rows} == {1.0}
    assert head.factors.forward == pytest.approx(1 / 32)
    assert head.factors.input_grad == pytest.approx(64**-0.5)
    assert qkv.factors.forward == pytest.approx(32**-0.5)
    for row in plan.rows:
        assert row.lr * row.weight_decay == pytest.approx(0.01)
        assert row.reasons["lr"].startswith(f"{row.lr:.6g} = lr 2")


def test_mup_ratios_are_to_the_base_models_own_fan_in(make: Make) -> None:
    plan = iso.plan(make(width=128, scaling="plain"), "mup", base=iso.Scale(width=32), hps={"lr": 0.01})
    small = iso.plan(make(scaling="plain"), "mup", base=iso.Scale(width=32), hps={"lr": 0.01})
    down, base = plan.row("blocks.0.mlp.down.weight"), small.row("blocks.0.mlp.down.weight")
    assert down.lr == pytest.approx(0.01 / 4)
    assert down.init_std == pytest.approx(base.init_std / 2)
    assert plan.row("embed.weight").lr == 0.01
    site = next(s for s in plan.sites if s.kind == "readout")
    assert site.multiplier == pytest.approx(0.25)


@pytest.mark.parametrize("base", [iso.Scale(width=32, depth=2), "model"])
def test_base_equals_target_is_sp_bit_for_bit(make: Make, base: object) -> None:
    """Identity at base: muP at its base has SP's groups, init and logits."""
    left, right = make(scaling="plain"), make(scaling="plain")
    mup = iso.plan(left, "mup", base=make(scaling="plain") if base == "model" else base, hps={"lr": 0.01})
    sp = iso.plan(right, "sp", hps={"lr": 0.01})
    mup.apply(left, seed=3)
    sp.apply(right, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values()))
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(left(ids), right(ids))
    strip = [[{k: v for k, v in g.items() if k != "params"} for g in p.param_groups(m)]
             for p, m in ((mup, left), (sp, right))]  # fmt: skip
    assert strip[0] == strip[1]


def test_sites_carry_the_residual_rule_and_the_alphas(make: Make) -> None:
    model = make()
    plan = iso.plan(model, "u-mup", hps={"alpha_res": 2.0, "alpha_res_attn_ratio": 0.5, "alpha_attn": 4.0,
                                         "alpha_ffn_act": 3.0, "alpha_loss": 0.5})  # fmt: skip
    plan.apply(model)
    from isoscale.nn.factors import transformer_residual_taus

    taus = transformer_residual_taus(4, 2.0, 0.5)
    assert (model.blocks[0].attn_tau, model.blocks[1].mlp_tau) == (pytest.approx(taus[0]), pytest.approx(taus[3]))
    assert model.blocks[0].attn.logit_scale == 4.0 / 16
    assert model.blocks[1].mlp.act_mult == 3.0
    assert model.loss_mult == 0.5
    logits = next(s for s in plan.sites if s.name == "blocks.0.attn.logits")
    assert logits.expected_scale == pytest.approx(4 / 16**0.5)
    assert "alpha_attn 4" in logits.reasons["multiplier"]


def test_tokens_make_the_weight_gradient_factor_known(make: Make) -> None:
    known = iso.plan(make(), "u-mup", target=iso.Scale(batch_tokens=4096)).row("head.weight")
    assert known.factors.weight_grad == pytest.approx(1 / 64)
    assert iso.plan(make(), "u-mup").row("head.weight").factors.weight_grad is None


def test_decay_modes(make: Make) -> None:
    coupled = iso.plan(make(), "u-mup", hps={"lr": 2.0, "weight_decay": 0.1}, decay="coupled")
    assert {row.weight_decay for row in coupled.rows} == {0.1}
    independent = iso.plan(make(scaling="plain"), "sp", hps={"lr": 0.5, "weight_decay": 0.1}, decay="independent")
    assert all(row.lr * row.weight_decay == pytest.approx(0.1) for row in independent.rows)


def test_embedding_lr_switch(make: Make) -> None:
    plan = iso.plan(make(), "u-mup", hps={"lr": 2.0}, embedding_lr="constant")
    assert plan.row("embed.weight").lr == 2.0


def test_a_table_of_ones_own(make: Make) -> None:
    table = by_name("u-mup").with_role("readout", lr=hp("lr") * 0.5)
    assert iso.plan(make(), table, hps={"lr": 2.0}).row("head.weight").lr == 1.0


def test_tied_embeddings_have_one_row(make: Make) -> None:
    plan = iso.plan(make(tied=True), "u-mup")
    assert [row.name for row in plan.rows if "embed" in row.name or "head" in row.name] == ["embed.weight"]


def test_trainable_norms_get_gain_rows(make: Make) -> None:
    plan = iso.plan(make(norm="trainable", qk_norm=True), "u-mup", hps={"lr": 2.0, "weight_decay": 0.1})
    gain = plan.row("blocks.0.attn_norm.weight")
    assert (gain.role, gain.init_value, gain.weight_decay) == ("gain", 1.0, 0.0)
    assert gain.lr == pytest.approx(2 / 2**0.5)
    assert plan.row("norm.weight").lr == 2.0


def test_meta_and_real_models_have_the_same_plan(make: Make) -> None:
    with torch.device("meta"):
        meta = make()
    assert iso.plan(meta, "u-mup") == iso.plan(make(), "u-mup")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: iso.plan(m(), "umup"), "unknown parametrisation"),
        (lambda m: iso.plan(m(), "sp"), "apply factors twice"),
        (lambda m: iso.plan(m(scaling="plain"), "u-mup"), "needs a model made of unit-scaled ops"),
        (lambda m: iso.plan(m(scaling="plain"), "mup"), "needs base="),
        (lambda m: iso.plan(m(), "u-mup", hps={"lrr": 1.0}), "unknown hyperparameter"),
        (lambda m: iso.plan(m(), "u-mup", hps={"lr": 0.0}), "must be positive"),
        (lambda m: iso.plan(m(), "u-mup", hps={"lr": -1.0}), "must be positive"),
        (lambda m: iso.plan(m(), "u-mup", hps={"lr": float("nan")}), "must be positive"),
        (lambda m: iso.plan(m(), "u-mup", target=iso.Scale(width=64)), "target says width 64, the model has 32"),
        (lambda m: iso.plan(m(), "u-mup", roles={"nope.*": "hidden"}), "matches no parameter"),
        (lambda m: iso.plan(m(), "u-mup", roles={"embed.weight": "hiden"}), "unknown role"),
        (lambda m: iso.plan(m(), "u-mup", roles={"head.weight": "hidden"}), "is not the rule's"),
        (lambda m: iso.plan(m(), "u-mup", optimizer="sgd"), "no rules for the optimiser"),
        (lambda m: iso.plan(m(scaling="plain"), "mup", base=nn.Linear(2, 2)), "base is a Linear"),
    ],
)
def test_refusals_say_what(make: Make, call: Callable[[Make], object], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        call(make)
    assert caught.value.hint


def test_unknown_recipe(make: Make) -> None:
    with pytest.raises(ConfigError, match="unknown recipe") as caught:
        iso.plan(make(), "u-mup", recipe="fp88")
    assert "fp8" in caught.value.hint


def test_bad_scale() -> None:
    with pytest.raises(ConfigError, match="positive"):
        iso.Scale(width=0)


class Odd(nn.Module):
    """A parameter no rule can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8, bias=False)
        self.mystery = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def test_a_parameter_no_role_fits_is_named_and_can_be_tagged() -> None:
    with pytest.raises(PlanError, match=r"the forward never used 1 parameter: mystery \(3, 3\)") as caught:
        iso.plan(Odd(), "sp")
    assert 'roles={"mystery": "hidden"}' in caught.value.hint
    assert iso.plan(Odd(), "sp", roles={"mystery": "gain"}).row("mystery").role == "gain"
