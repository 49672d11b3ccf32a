"""The optimiser of a plan: every family torch has, Muon beside AdamW, saved and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import isoscale as iso
from isoscale._base.errors import PlanError
from isoscale.config import OptimSection, RunConfig
from isoscale.models import Decoder, DecoderConfig
from isoscale.optim import Together, make_optimizer
from isoscale.train import train

SETTINGS = {
    "rules.parametrisation": "complete-d", "base.width": 16, "base.depth": 1, "model.width": 16, "model.depth": 1,
    "model.head_size": 8, "data.seq_len": 16, "train.steps": 8, "train.batch": 2, "train.eval_every": 8,
    "train.eval_batches": 1, "train.checkpoint_every": 3, "hps.lr": 0.01, "optim.name": "muon", "model.norm": "trainable",
}  # fmt: skip


def planned(optimizer: str) -> tuple[Decoder, iso.Plan]:
    model = Decoder(DecoderConfig(width=32, depth=2, scaling="plain", norm="trainable"))
    return model, iso.plan(model, "complete-d", base=iso.Scale(width=16, depth=2), hps={"lr": 0.1}, optimizer=optimizer)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD),
                                            ("adafactor", torch.optim.Adafactor)])  # fmt: skip
def test_one_optimiser(name: str, kind: type) -> None:
    model, plan = planned(name)
    assert isinstance(make_optimizer(plan, model), kind)


@pytest.mark.parametrize(("name", "adjust"), [("muon", "original"), ("muon-rms", "match_rms_adamw")])
def test_muon_trains_matrices_inside_the_stack_and_adamw_the_rest(name: str, adjust: str) -> None:
    model, plan = planned(name)
    made = make_optimizer(plan, model)
    assert isinstance(made, Together)
    by_kind = {type(part): {id(p) for g in part.param_groups for p in g["params"]} for part in made.parts}
    hidden = {id(p) for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}
    assert by_kind[torch.optim.Muon] == hidden
    assert len(by_kind[torch.optim.AdamW]) == len(list(model.parameters())) - len(hidden)
    muon = next(part for part in made.parts if isinstance(part, torch.optim.Muon))
    assert muon.param_groups[0]["adjust_lr_fn"] == adjust
    assert len(plan.param_groups(model, part="adamw")) > 0
    with pytest.raises(PlanError, match="no part 'sgd'"):
        plan.param_groups(model, part="sgd")


def test_lion_takes_the_rows_betas_and_decay() -> None:
    model, plan = planned("lion")
    groups = make_optimizer(plan, model).param_groups
    assert set(plan.param_groups(model)[0]) == {"params", "lr", "weight_decay", "betas"}
    assert isinstance(make_optimizer(plan, model), iso.optim.Lion)
    assert {group["betas"] for group in groups} == {plan.rows[0].betas}


@pytest.mark.parametrize("name", ["lmd", "madam"])
def test_factors_move_matrices_and_adamw_the_rest(name: str) -> None:
    model, plan = planned(name)
    made = make_optimizer(plan, model)
    names = {p: n for n, p in model.named_parameters()}
    adam = {names[p] for g in made.param_groups if "weight_decay" in g for p in g["params"]}
    assert adam == {n for n, p in model.named_parameters() if p.dim() < 2 or n == "embed.weight"}
    rest = [group for group in made.param_groups if "weight_decay" not in group]
    assert sum(len(group["params"]) for group in rest) == len(names) - len(adam)
    if name == "lmd":
        assert isinstance(made, iso.optim.LMD)
        assert {group["optimizer"] for group in rest} == {"lmd"}
        assert {group["sigma"] for group in rest} == {0.05}
    else:
        assert isinstance(made, Together)
        assert {group["beta"] for group in rest} == {0.999}


def test_a_family_that_nobody_makes_is_refused() -> None:
    model, plan = planned("adamw")
    rows = tuple(replace(row, optimizer="adan") for row in plan.rows)
    with pytest.raises(PlanError, match="no adan is built in") as caught:
        make_optimizer(replace(plan, rows=rows), model)
    assert "plan.param_groups" in caught.value.hint


def test_lmd_takes_its_own_settings_from_the_config() -> None:
    model, plan = planned("lmd")
    made = make_optimizer(plan, model, OptimSection(name="lmd", form="hypentropy", state="bf16", offset=0.2), seed=3)
    assert isinstance(made, iso.optim.LMD)
    assert {(g["form"], g["state"], g["offset"], g["seed"]) for g in made.param_groups if g["optimizer"] == "lmd"} == {
        ("hypentropy", "bf16", 0.2, 3)
    }


def test_a_run_with_muon_resumes_bit_equal(tmp_path: Path) -> None:
    config = RunConfig().with_values(**SETTINGS)

    class Stop(Exception):
        pass

    def stop(tick: object) -> None:
        if tick.step == 5:  # type: ignore[attr-defined]
            raise Stop

    train(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(config, tmp_path / "cut", on_step=stop)
    train(config, tmp_path / "cut", resume=True)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    assert len({json.loads(line)["loss"] for line in whole.splitlines() if "loss" in json.loads(line)}) > 4
