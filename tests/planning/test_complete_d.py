"""Complete(d)P on the reference decoder against the printed table, the named variant of it, and its ablations."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.models import Decoder, DecoderConfig
from isoscale.planning import PlanWarning

PRINTED = json.loads((Path(__file__).parent.parent / "rules" / "complete_d_printed.json").read_text())["rows"]
HPS = {"lr": 2.0**-8, "weight_decay": 0.1, "eps": 1e-6, "init_std": 0.03}
BASE = iso.Scale(width=32, depth=2, batch_tokens=1024, tokens=2**20)
BIG = {"width": 96, "depth": 6}
TARGET = iso.Scale(batch_tokens=3072, tokens=2**23)
M = {"m_N": 3.0, "m_L": 3.0, "m_B": 3.0, "m_D": 8.0}


def decoder(width: int = 32, depth: int = 2, **changes: object) -> Decoder:
    settings = {"vocab": 64, "head_size": 16, "qk_norm": True, "norm": "trainable", "scaling": "plain", **changes}
    with torch.device("meta"):
        return Decoder(DecoderConfig(width=width, depth=depth, **settings))  # type: ignore[arg-type]


def plan(name: str = "complete-d", base: iso.Scale = BASE, target: iso.Scale | None = TARGET, **said: object) -> iso.Plan:
    model = said.pop("model", None) or decoder(**BIG)
    return iso.plan(model, name, base=base, target=target, hps=HPS, **said)  # type: ignore[arg-type]


def factor(powers: list[float], alpha: float) -> float:
    n, constant, times, b, d = powers
    return M["m_N"] ** n * M["m_L"] ** (constant + times * alpha) * M["m_B"] ** b * M["m_D"] ** d


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_every_tensor_is_as_printed(alpha: float) -> None:
    made = plan(alpha=alpha)
    assert {row.name for row in made.rows if "blocks" not in row.name or ".0." in row.name} == set(PRINTED)
    for name, want in PRINTED.items():
        row = made.row(name)
        for quantity, powers in want.items():
            base = 0.0 if quantity == "init_std" and row.init_value is not None else HPS[quantity]
            assert getattr(row, quantity) == pytest.approx(base * factor(powers, alpha)), (name, quantity)
        assert row.betas == pytest.approx((1 - 0.1 * 3 / 8, 1 - 0.05 * 3 / 8))
        assert row.factors.forward == 1  # no multiplier on the readout
    multipliers = {site.kind: site.multiplier for site in made.sites}
    assert multipliers["residual_attn"] == multipliers["residual_ffn"] == pytest.approx(3.0**-alpha)
    assert multipliers["readout"] == 1


def test_the_golden_file_can_fail() -> None:
    made = plan(alpha=1.0, constant=("eps",))
    assert made.row("embed.weight").eps != pytest.approx(HPS["eps"] * factor(PRINTED["embed.weight"]["eps"], 1.0))


def test_final_norm_eps_is_a_named_variant() -> None:
    printed, derived = plan(), plan(final_norm_eps="derived")
    assert printed.row("norm.weight").eps == pytest.approx(3 * derived.row("norm.weight").eps)
    different = {row.name for row, other in zip(printed.rows, derived.rows) if row.eps != other.eps}
    assert different == {"norm.weight"}


def final_norm_gradient(width: int) -> float:
    model = Decoder(DecoderConfig(width=width, depth=2, vocab=64, head_size=16, norm="trainable", scaling="plain"))
    made = iso.plan(model, "complete-d", base=iso.Scale(width=32, depth=2), hps={**HPS, "init_std": 0.2})
    made.apply(model, seed=3)
    ids = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    model(ids, ids).backward()
    assert model.norm.weight is not None
    assert model.norm.weight.grad is not None
    return float(model.norm.weight.grad.square().mean().sqrt())


def test_why_the_variant_matters() -> None:
    """The final gain's gradient shrinks at least as 1/m_N at init, so a printed, constant eps of its size takes over."""
    small, big = final_norm_gradient(32), final_norm_gradient(256)
    slope = math.log2(big / small) / 3
    assert slope < -0.9
    eps = small  # an eps of the gradient's size at the base
    damped_at_base, printed, derived = small / (small + eps), big / (big + eps), big / (big + eps / 8)
    assert damped_at_base == 0.5
    assert printed < 0.15  # the update would be a quarter of the base's or less
    assert derived > 4 * printed


def test_completep_puts_the_multiplier_on_the_logits() -> None:
    made = plan("completep", base=iso.Scale(width=32, depth=2), target=None)
    assert {site.kind: site.multiplier for site in made.sites}["readout"] == pytest.approx(1 / 3)
    head = made.row("head.weight")
    assert (head.lr, head.init_std) == pytest.approx((HPS["lr"], HPS["init_std"]))
    assert made.row("embed.weight").eps == HPS["eps"]  # only the residual blocks have an eps rule there
    assert made.row("blocks.0.mlp.down.weight").eps == pytest.approx(HPS["eps"] / 9)
    half = plan("depth-mup", base=iso.Scale(width=32, depth=2), target=None, alpha=1.0)
    assert half.row("blocks.0.mlp.down.weight").lr == pytest.approx(HPS["lr"] / 3 / 3**0.5)


def test_tied_embeddings_are_an_embedding_row_and_a_multiplier_on_the_logits() -> None:
    made = plan(model=decoder(**BIG, tied=True))
    assert made.row("embed.weight").lr == plan().row("embed.weight").lr
    assert {site.kind: site.multiplier for site in made.sites}["readout"] == pytest.approx(1 / 3)


def test_base_equals_target_changes_nothing() -> None:
    model = decoder()
    made = iso.plan(model, "complete-d", base=BASE, target=iso.Scale(batch_tokens=1024, tokens=2**20), hps=HPS)
    assert {(row.lr, row.eps, row.weight_decay, row.betas) for row in made.rows} == {(2.0**-8, 1e-6, 0.1, (0.9, 0.95))}


@pytest.mark.parametrize("axis", ["width", "depth", "batch", "duration"])
def test_an_axis_can_be_switched_off(axis: str) -> None:
    others = tuple(name for name in ("width", "depth", "batch", "duration") if name != axis)
    part, whole = plan(axes=others, alpha=0.5), plan(alpha=0.5)
    same = {"width": M["m_N"], "depth": M["m_L"], "batch": M["m_B"], "duration": M["m_D"]}
    row, full = part.row("blocks.0.mlp.down.weight"), whole.row("blocks.0.mlp.down.weight")
    power = {"width": -1, "depth": -0.5, "batch": 0.5, "duration": -0.5}[axis]
    assert full.lr / row.lr == pytest.approx(same[axis] ** power)


def test_duration_rules() -> None:
    iso_horizon, tau, none = (plan(duration=name).row("head.weight") for name in ("iso-horizon", "tau-constant", "none"))
    base = plan(target=iso.Scale(batch_tokens=3072, tokens=2**20)).row("head.weight")
    assert iso_horizon.lr == pytest.approx(base.lr / 8**0.5)
    assert tau.lr == base.lr
    assert tau.lr * tau.weight_decay == pytest.approx(iso_horizon.lr * iso_horizon.weight_decay)  # the same share of a run
    assert none.lr * none.weight_decay == pytest.approx(base.lr * base.weight_decay)
    third = plan(duration_exponent=0.3).row("head.weight")
    assert third.lr == pytest.approx(base.lr / 8**0.3)
    assert third.lr * third.weight_decay == pytest.approx(iso_horizon.lr * iso_horizon.weight_decay)
    fewer = plan(tau_exponent=0.5).row("head.weight")
    assert fewer.weight_decay < iso_horizon.weight_decay  # fewer tokens per parameter here, so a longer timescale


def test_independent_decay_is_linear_in_the_step_ratio_and_free_of_width() -> None:
    made = plan(decay="independent", alpha=0.5)
    steps = {row.lr * row.weight_decay for row in made.rows}
    assert max(steps) == pytest.approx(min(steps)) == pytest.approx(0.1 * 3 / 8)


def test_betas_in_the_safe_form_and_where_the_linear_one_ends() -> None:
    far = iso.Scale(batch_tokens=1024 * 8, tokens=2**20)
    with pytest.warns(PlanWarning, match=r"beta1 0.9 becomes 0.2 at m_B / m_D = 8"):
        made = plan(target=far)
    assert made.rows[0].betas == pytest.approx((0.2, 0.6))
    assert "beta1 0.9 becomes 0.2" in str(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)
        assert plan(target=far, betas="power").rows[0].betas == pytest.approx((0.9**8, 0.95**8))
        assert plan(target=iso.Scale(batch_tokens=1024 * 4, tokens=2**20)).notes == ()


def test_a_linear_beta_below_zero_is_refused() -> None:
    far = iso.Scale(batch_tokens=1024 * 16, tokens=2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        with pytest.raises(PlanError, match="leaves the range") as caught:
            plan(target=far)
    assert "betas='power'" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"base": iso.Scale(width=192)}, "the base is larger than the target"),
        ({"base": iso.Scale(width=32, depth=12)}, "the base is larger than the target"),
        ({"base": iso.Scale(width=32, depth=2)}, "target says batch_tokens, base does not"),
        ({"alpha": 0.3}, "alpha must lie in"),
        ({"alpha": float("nan")}, "alpha must lie in"),
        ({"duration_exponent": float("nan")}, "duration_exponent must lie in"),
        ({"betas": "quadratic"}, "unknown betas"),
        ({"axes": ("widht",)}, "unknown name 'widht'"),
        ({"optimizer": "adamm"}, "unknown optimiser"),
    ],
)
def test_refusals(said: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(**said)  # type: ignore[arg-type]


def test_clip_norm_follows_the_gradients() -> None:
    made = plan(clip=1.0)
    assert made.clip is not None
    assert 0 < made.clip < 1  # gradients shrink with width and batch
    unit = decoder(**BIG, scaling="unit")
    grown = iso.plan(unit, "u-complete-d", base=iso.Scale(width=32, depth=2), clip=1.0)
    numbers = [sum(p.numel() for p in decoder(**size).parameters()) for size in (BIG, {"width": 32, "depth": 2})]
    assert grown.clip == pytest.approx(math.sqrt(numbers[0] / numbers[1]))


def test_a_plan_moves_to_another_batch_and_length() -> None:
    there = iso.Scale(batch_tokens=6144, tokens=2**22)
    moved, direct = plan().at(batch_tokens=6144, tokens=2**22), plan(target=there)
    for a, b in zip(moved.rows, direct.rows):
        assert (a.lr, a.eps, a.weight_decay, *a.betas) == pytest.approx((b.lr, b.eps, b.weight_decay, *b.betas))
        assert a.relative.lr == pytest.approx(b.relative.lr)
    with pytest.raises(PlanError, match="knows no base batch_tokens"):
        plan(base=iso.Scale(width=32, depth=2), target=None).at(batch_tokens=8)


def test_an_optimiser_is_updated_in_place() -> None:
    model = Decoder(DecoderConfig(width=96, depth=6, vocab=64, head_size=16, qk_norm=True, norm="trainable", scaling="plain"))
    first = plan(model=model)
    optimizer = torch.optim.AdamW(first.param_groups(model))
    later = first.at(batch_tokens=6144)
    later.update(optimizer, model)
    fresh = torch.optim.AdamW(later.param_groups(model))
    for a, b in zip(optimizer.param_groups, fresh.param_groups):
        assert (a["lr"], a["eps"], *a["betas"]) == pytest.approx((b["lr"], b["eps"], *b["betas"]))
        assert all(p is q for p, q in zip(a["params"], b["params"]))


def test_json_round_trip_with_options() -> None:
    made = plan(alpha=0.5, duration="tau-constant", clip=2.0, axes=("width", "depth"))
    assert iso.Plan.from_json(made.to_json()) == made
