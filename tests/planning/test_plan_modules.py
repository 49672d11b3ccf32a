"""Factors by module type and depth: what they reach, how they carry to another depth, what is refused."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import isoscale as iso
from isoscale._base.errors import ConfigError, PlanError
from isoscale.config import RunConfig
from isoscale.models import Decoder, DecoderConfig
from isoscale.planning.modules import curve, depth_of, scaled_beta, type_of, types
from isoscale.train.setup import meta_plan

MUP = {"model.separate": True, "model.qk_norm": True, "model.norm": "trainable", "rules.parametrisation": "complete-d",
       "base.width": 32, "base.depth": 4, "hps.weight_decay": 0.1}  # fmt: skip


def made(modules, **values):
    return meta_plan(RunConfig().with_values(**{**MUP, "modules": modules, **values}))


def test_types_are_names_without_the_blocks():
    plan = made({})
    assert types(plan.rows, plan.sites, "lr") == (
        "embed", "attn_norm", "attn.q", "attn.k", "attn.v", "attn.out", "attn.q_norm", "attn.k_norm", "mlp_norm",
        "mlp.gate", "mlp.up", "mlp.down", "norm", "head")  # fmt: skip
    assert types(plan.rows, plan.sites, "init_std") == (
        "embed", "attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down", "head")
    assert types(plan.rows, plan.sites, "residual") == ("attn", "mlp")
    assert type_of("model.layers.3.self_attn.q_proj.weight") == "self_attn.q_proj"
    assert type_of("model.layers.3.self_attn.q_proj.bias") == "self_attn.q_proj.bias"
    assert [depth_of(f"blocks.{i}.attn.q.weight", 4) for i in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert depth_of("head.weight", 4) is None


@pytest.mark.parametrize("parametrisation", ["complete-d", "u-mup", "sp", "u-complete-d"])
def test_each_factor_moves_what_it_names_and_nothing_else(parametrisation):
    modules = {"lr/attn.q": 0.5, "weight_decay/mlp.up": 3.0, "eps/head": 10.0, "beta2/embed": 0.1, "init_std/attn.v": 2.0,
               "residual/mlp": 0.25, "lr@0": 1.0, "lr@0.5": 4.0}  # fmt: skip
    how = {"rules.parametrisation": parametrisation}
    plain, split = made({}, **how), made(modules, **how)
    independent = parametrisation in ("u-mup", "u-complete-d")
    depth = {0: 1.0, 1: 2.0, 2: 4.0, 3: 4.0}
    for before, after in zip(plain.rows, split.rows):
        kind = type_of(before.name)
        block = int(before.name.split(".")[1]) if before.name.startswith("blocks") else None
        lr = (0.5 if kind == "attn.q" else 1.0) * (depth[block] if block is not None else 1.0)
        decay = 3.0 if kind == "mlp.up" else 1.0
        assert after.lr == pytest.approx(before.lr * lr, rel=1e-12)
        assert after.relative.lr == pytest.approx(before.relative.lr * lr)
        # independent decay: what a step takes away does not follow the LR
        assert after.weight_decay == pytest.approx(before.weight_decay * decay / (lr if independent else 1), rel=1e-12)
        assert after.eps == pytest.approx(before.eps * (10 if kind == "head" else 1))
        assert after.init_std == pytest.approx(before.init_std * (2 if kind == "attn.v" else 1))
        beta = before.betas[1]
        assert after.betas == (before.betas[0], pytest.approx(beta / (beta + (1 - beta) * 0.1)) if kind == "embed" else beta)
        assert (after == before) == (kind == "norm")  # the one that no factor names
        if lr != 1:
            assert "times" in after.reasons["lr"]
    for before, after in zip(plain.sites, split.sites):
        factor = 0.25 if before.kind == "residual_ffn" else 1.0
        assert after.multiplier == (before.multiplier if factor == 1 else pytest.approx((before.multiplier or 1.0) * factor))
    assert "lr/attn.q" in str(split)
    assert iso.Plan.from_json(split.to_json()) == split


def test_the_reasons_multiply_to_the_number():
    row = made({"lr/attn.q": 0.5, "lr@0": 1.0, "lr@0.5": 4.0}).row("blocks.1.attn.q.weight")
    assert row.reasons["lr"].endswith("times 1 = lr/attn.q 0.5 x lr 2 at depth 0.25")


def test_a_depth_curve_carries_to_another_depth_and_keeps_its_ends():
    modules = {"lr@0": 1.0, "lr@0.25": 2.0, "lr@0.5": 4.0, "lr@0.75": 8.0}
    at = lambda depth: [r.lr / s.lr for r, s in zip(  # noqa: E731
        made(modules, **{"model.depth": depth}).rows, made({}, **{"model.depth": depth}).rows) if r.name.endswith("attn.q.weight")]
    assert at(4) == pytest.approx([1, 2, 4, 8])
    assert at(8) == pytest.approx([1, 2**0.5, 2, 2**1.5, 4, 2**2.5, 8, 8])
    how = {"model.depth": 2, "base.depth": 2}
    pairs = zip(made(modules, **how).rows, made({}, **how).rows)
    assert [r.lr / s.lr for r, s in pairs if r.name.endswith("attn.q.weight")] == pytest.approx([1, 4])
    free = made({"lr/attn.q@0": 3.0, "lr/attn.q@0.5": 5.0})
    assert [r.lr / s.lr for r, s in zip(free.rows, made({}).rows) if "attn.q.w" in r.name] == pytest.approx([3, 15**0.5, 5, 5])


@given(st.dictionaries(st.floats(0, 0.99), st.floats(0.01, 100), min_size=1, max_size=5), st.floats(0, 0.999))
def test_a_curve_stays_between_its_knots(knots, depth):
    value = curve(knots, depth)
    assert min(knots.values()) * 0.999 <= value <= max(knots.values()) * 1.001
    for place, factor in knots.items():
        assert curve(knots, place) == pytest.approx(factor)


@given(st.floats(0.01, 0.9999), st.floats(1e-3, 1e3))
def test_no_factor_drives_a_beta_out(beta, factor):
    moved = scaled_beta(beta, factor)
    assert 0 < moved < 1 or factor < 1e-2
    assert (1 - moved) / moved == pytest.approx((1 - beta) / beta * factor, rel=1e-6)


@pytest.mark.parametrize(("modules", "match", "hint"), [
    ({"lr/atn.q": 1.0}, "no module type", "attn.q"), ({"init_std/norm": 2.0}, "has no init_std", "head"),
    ({"residual/attn.q": 2.0}, "has no residual", "attn"), ({"weight_decay/head": 2.0}, "no module of this model has weight_decay", ""),
])  # fmt: skip
def test_a_factor_that_would_act_on_nothing_is_refused(modules, match, hint):
    with pytest.raises(PlanError, match=match) as error:
        made(modules, **({"hps.weight_decay": 0.0} if "decay" in match else {}))
    assert hint in error.value.hint


@pytest.mark.parametrize("modules", [{"lr": 1.0}, {"lr@1.5": 1.0}, {"lt/head": 1.0}, {"lr/": 1.0}, {"lr/head": 0.0}, {"lr@x": 2.0}])
def test_a_name_that_is_none_is_refused_with_an_example(modules):
    with pytest.raises(ConfigError):
        RunConfig().with_values(modules=modules)
    with pytest.raises(PlanError):
        iso.plan(Decoder(DecoderConfig(width=16, depth=1)), modules=modules)


def test_any_module_takes_factors():
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inp = nn.Linear(8, width)
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(4))
            self.out = nn.Linear(width, 4)

        def forward(self, x):
            x = self.inp(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.out(x)

    torch.manual_seed(0)
    model, base, example = Net(32), Net(16), torch.randn(2, 8)
    how = {"base": base, "hps": {"lr": 0.01, "weight_decay": 0.1}, "example": example}
    plain = iso.plan(copy.deepcopy(model), "complete-d", **how)
    kinds = types(plain.rows, plain.sites, "lr")
    assert "out" in kinds
    split = iso.plan(copy.deepcopy(model), "complete-d", **how, modules={"lr/out": 0.5, "lr@0": 2.0})
    for before, after in zip(plain.rows, split.rows):
        factor = 0.5 if before.name == "out.weight" else 2.0 if before.name.startswith("layers") else 1.0
        assert after.lr == pytest.approx(before.lr * factor)
    with pytest.raises(PlanError, match="residual"):
        iso.plan(copy.deepcopy(model), "complete-d", **how, modules={"residual/attn": 0.5})
    other = iso.plan(copy.deepcopy(model), "complete-d", **how, modules={"beta1/out": 0.5})
    with pytest.raises(PlanError, match="betas differ"):
        other.param_groups(model, [{"params": list(model.parameters()), "lr": 0.01, "weight_decay": 0.1, "eps": 1e-8}])


def test_a_batch_ramp_keeps_the_factors():
    split = made({"lr/head": 0.5, "beta2/head": 0.5}, **{"base.batch": 8})
    plain = made({}, **{"base.batch": 8})
    moved, other = (plan.at(batch_tokens=2 * 1024).row("head.weight") for plan in (split, plain))
    assert moved.lr == pytest.approx(other.lr * 0.5)
    assert moved.betas[1] == pytest.approx(scaled_beta(other.betas[1], 0.5))
    assert not math.isclose(other.betas[1], plain.row("head.weight").betas[1])


@pytest.mark.parametrize("scaling", ["unit", "plain"])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_separate_projections_are_the_same_function_and_gradient(scaling, kv_heads):
    torch.manual_seed(0)
    config = {"vocab": 17, "width": 32, "depth": 2, "head_size": 8, "kv_heads": kv_heads, "qk_norm": True, "scaling": scaling}
    fused, split = Decoder(DecoderConfig(**config)), Decoder(DecoderConfig(**config, separate=True))
    state, groups = fused.state_dict(), fused.config.groups * 8
    for i in range(2):
        parts = state.pop(f"blocks.{i}.attn.qkv.weight").split((32, groups, groups))
        state |= {f"blocks.{i}.attn.{name}.weight": part for name, part in zip("qkv", parts)}
        gate, up = state.pop(f"blocks.{i}.mlp.gate_up.weight").chunk(2)
        state |= {f"blocks.{i}.mlp.gate.weight": gate, f"blocks.{i}.mlp.up.weight": up}
    split.load_state_dict(state)
    fused, split = fused.double(), split.double()
    ids = torch.randint(0, 17, (3, 12))
    for model in (fused, split):
        model(ids, ids).backward()
    torch.testing.assert_close(split(ids), fused(ids), rtol=1e-5, atol=1e-5)
    for i in range(2):
        whole, part = fused.blocks[i].attn.qkv.weight.grad, split.blocks[i].attn
        torch.testing.assert_close(torch.cat([part.q.weight.grad, part.k.weight.grad, part.v.weight.grad]), whole, rtol=1e-4, atol=1e-6)
        both = torch.cat([split.blocks[i].mlp.gate.weight.grad, split.blocks[i].mlp.up.weight.grad])
        torch.testing.assert_close(both, fused.blocks[i].mlp.gate_up.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(split.embed.weight.grad, fused.embed.weight.grad, rtol=1e-4, atol=1e-6)
    seen = []
    with torch.no_grad():
        split(ids, ids, probe=lambda path, port, value, factor: seen.append((path, port)))
    assert seen == [(site.path, site.port) for site in split.sites()]
