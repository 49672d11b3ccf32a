"""u-muP completed is Complete(d)P moved by the abc symmetry: equal trajectories in float64, equal factors."""

from __future__ import annotations

import math

import pytest
import torch

import isoscale as iso
from isoscale.models import Decoder, DecoderConfig
from isoscale.nn.factors import attention_factor, silu_glu_factor

VOCAB, LENGTH, BATCH = 32, 12, 4
SHAPE = {"vocab": VOCAB, "head_size": 8, "norm_eps": 1e-20}
HPS = {"lr": 0.5, "weight_decay": 0.02, "eps": 1e-4}
EXACT = {"embedding_lr": "constant", "decay": "coupled"}  # the settings under which it is Complete(d)P


def unit_and_plain(alpha: float, **said: object) -> tuple[Decoder, iso.Plan, Decoder, dict[str, float]]:
    """A unit-scaled decoder at target size with its plan; its plain twin with equal effective weights; theta by name."""
    unit = Decoder(DecoderConfig(width=32, depth=4, scaling="unit", **SHAPE)).double()  # type: ignore[arg-type]
    plain = Decoder(DecoderConfig(width=32, depth=4, scaling="plain", **SHAPE)).double()  # type: ignore[arg-type]
    plan = made(unit, alpha, **said)
    plan.apply(unit, seed=1)
    weight = math.sqrt(0.5 * (4 / 2) ** (-2 * alpha))  # share of a branch: 1 / base depth x m_L^-2 alpha
    theta = {row.name: row.factors.forward for row in plan.rows}
    for index, (mine, other) in enumerate(zip(unit.blocks, plain.blocks)):
        other.attn_tau = other.mlp_tau = weight
        other.attn.logit_scale = mine.attn.logit_scale
        theta[f"blocks.{index}.attn.out.weight"] *= attention_factor(mine.attn.logit_scale * 8, 8, LENGTH, True, 0.0)
        theta[f"blocks.{index}.mlp.down.weight"] *= silu_glu_factor(1.0)
    twin = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in unit.named_parameters():
            twin[name].copy_(theta[name] * parameter)
    return unit, plan, plain, theta


def made(model: Decoder, alpha: float, **said: object) -> iso.Plan:
    """The plan of a unit decoder tuned at width 16, depth 2."""
    return iso.plan(model, "u-complete-d", base=iso.Scale(width=16, depth=2), hps=HPS, alpha=alpha,
                    **{**EXACT, **said})  # type: ignore[arg-type]  # fmt: skip


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(VOCAB, (2, BATCH, LENGTH), generator=draw)) for _ in range(steps)]  # type: ignore[misc]


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*batches(1)[0]).backward()
    out = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return out


def losses(model: Decoder, optimizer: torch.optim.Optimizer, steps: int = 12) -> tuple[list[float], list[torch.Tensor]]:
    """Loss and logits of every step (the loss itself is a float32 sum, the logits are not)."""
    out, logits = [], []
    for ids, targets in batches(steps):
        logits.append(model(ids).detach())
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(float(loss.detach()))
    return out, logits


def apart(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right))


def twin_groups(plan: iso.Plan, unit: Decoder, plain: Decoder, theta: dict[str, float]) -> list[dict[str, object]]:
    """Groups of the plain twin by the abc law; eps by each tensor's gradient factor."""
    left, right = gradients(unit), gradients(plain)
    parameters = dict(plain.named_parameters())
    groups = []
    for row in plan.rows:
        ratio = left[row.name] / right[row.name]
        seen = right[row.name].abs() > 1e-12
        factor = float(ratio[seen].median())
        torch.testing.assert_close(ratio[seen], torch.full_like(ratio[seen], factor), rtol=1e-5, atol=0)  # one number
        groups.append({"params": [parameters[row.name]], "lr": row.lr * theta[row.name], "betas": row.betas,
                       "eps": row.eps / factor, "weight_decay": row.weight_decay / theta[row.name]})  # fmt: skip
    return groups


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_is_complete_d_step_for_step_under_the_listed_settings(alpha: float) -> None:
    unit, plan, plain, theta = unit_and_plain(alpha)
    groups = twin_groups(plan, unit, plain, theta)
    falls, ours = losses(unit, torch.optim.AdamW(plan.param_groups(unit)))
    _, theirs = losses(plain, torch.optim.AdamW(groups))
    assert falls[-1] < falls[0]
    assert apart(ours, theirs) < 1e-9


@pytest.mark.parametrize("forgotten", ["eps", "weight_decay", "lr"])
def test_control_a_shift_that_forgets_a_column_drifts(forgotten: str) -> None:
    unit, plan, plain, theta = unit_and_plain(1.0)
    groups = twin_groups(plan, unit, plain, theta)
    for row, group in zip(plan.rows, groups):
        group[forgotten] = getattr(row, forgotten)
    _, ours = losses(unit, torch.optim.AdamW(plan.param_groups(unit)))
    _, theirs = losses(plain, torch.optim.AdamW(groups))
    assert apart(ours, theirs) > 1e-5


SIZES = {"target": iso.Scale(batch_tokens=4096, tokens=10**6)}
RUN = iso.Scale(width=16, depth=2, batch_tokens=1024, tokens=5 * 10**5)


def factors(name: str, alpha: float, **said: object) -> dict[str, dict[str, float]]:
    """Effective init, LR and decay of every parameter at target over base: A B, A C and decay / A."""
    out = []
    for depth, width in ((2, 16), (4, 64)):
        with torch.device("meta"):
            kind = "unit" if name.startswith("u-") else "plain"
            model = Decoder(DecoderConfig(width=width, depth=depth, scaling=kind, **SHAPE))  # type: ignore[arg-type]
        sizes = SIZES["target"] if depth == 4 else iso.Scale(batch_tokens=RUN.batch_tokens, tokens=RUN.tokens)
        out.append(iso.plan(model, name, base=RUN, target=sizes, hps={"weight_decay": 0.1}, alpha=alpha, **said))  # type: ignore[arg-type]
    base, target = out
    first = {row.name: row for row in base.rows}
    ratios = {}
    for row in target.rows:
        old = first[row.name.replace("blocks.3", "blocks.1").replace("blocks.2", "blocks.0")]
        a, b = row.factors.forward, old.factors.forward
        ratios[row.name] = {"init": a * row.init_std / (b * old.init_std), "lr": a * row.lr / (b * old.lr),
                            "decay": row.lr * row.weight_decay / (old.lr * old.weight_decay)}  # fmt: skip
    return ratios


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_effective_factors_are_complete_ds(alpha: float) -> None:
    ours, theirs = factors("u-complete-d", alpha, **EXACT), factors("complete-d", alpha)
    for name, want in theirs.items():
        assert ours[name] == pytest.approx(want, rel=1e-9), name


def test_the_departures_are_the_documented_ones() -> None:
    ours, theirs = factors("u-complete-d", 0.5), factors("complete-d", 0.5)
    different = {(name, key) for name in ours for key in ours[name] if ours[name][key] != pytest.approx(theirs[name][key])}
    lr = {name for name, key in different if key == "lr"}
    assert lr == {"embed.weight"}  # fan_out^-1/2
    assert ours["embed.weight"]["lr"] == pytest.approx(theirs["embed.weight"]["lr"] / 2)
    decay = {name for name, key in different if key == "decay"}
    assert decay == {name for name in ours if name.startswith("blocks")}  # no depth factor in independent decay
    assert not {name for name, key in different if key == "init"}


def test_alpha_one_half_at_base_depth_is_umup() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig(width=64, depth=6, **SHAPE))  # type: ignore[arg-type]
    ours = iso.plan(model, "u-complete-d", base=iso.Scale(width=16, depth=2), hps=HPS, alpha=0.5)
    plain = iso.plan(model, "u-mup", hps=HPS)
    for a, b in zip(ours.rows, plain.rows):
        assert (a.lr, a.weight_decay, a.eps) == pytest.approx((b.lr, b.weight_decay, b.eps)), a.name
    for a, b in zip(ours.sites, plain.sites):
        assert a.multiplier == pytest.approx(b.multiplier), a.name
    other = iso.plan(model, "u-complete-d", base=iso.Scale(width=16, depth=2), hps=HPS, alpha=1.0)
    assert other.row("blocks.0.mlp.down.weight").lr > 1.5 * plain.row("blocks.0.mlp.down.weight").lr  # the control
