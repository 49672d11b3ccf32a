"""The whole check: SP fails, muP and Complete(d)P pass, one wrong LR is named, finished cells are kept."""

import json

import pytest
import torch
from torch import nn

import isoscale as iso
from isoscale._base import log
from isoscale._base.errors import CheckpointError, PlanError
from isoscale.check import run_check
from isoscale.models import Decoder, DecoderConfig
from isoscale.report.check_page import check_page, write_check_page

WIDE = {"widths": (64, 128, 256), "steps": 5, "seeds": 1}


@pytest.fixture(scope="module")
def sp(quick, tmp_path_factory):
    return run_check("isoscale", tmp_path_factory.mktemp("sp"), quick(rule="none", depths=(2, 4), **WIDE))


def test_control_sp_grows_with_width_and_depth(sp):
    assert sp.verdict == "fails"
    assert not sp.passes
    assert {one.axis for one in sp.suspects} == {"width", "depth"}
    broken = [one for one in sp.findings if one.ok is False]
    assert {one.verdict for one in broken} == {"grows"}


@pytest.mark.parametrize("rule", ["mup", "complete-d"])
def test_mup_and_its_heirs_are_flat_over_width(quick, tmp_path, rule):
    found = run_check("isoscale", tmp_path, quick(rule=rule, **WIDE))
    assert found.passes
    assert not found.suspects


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "lmd", "madam", "lion"])
def test_other_optimisers_follow_the_rule_too(quick, tmp_path, optimizer):
    assert run_check("isoscale", tmp_path, quick(optimizer=optimizer, **WIDE)).passes


def test_complete_d_is_flat_over_depth_and_mup_is_not(quick, tmp_path):
    settings = {"widths": (32,), "depths": (2, 4, 8)}
    assert run_check("isoscale", tmp_path / "a", quick(rule="complete-d", **settings)).passes
    found = run_check("isoscale", tmp_path / "b", quick(rule="mup", **settings))
    assert found.verdict == "fails"
    assert "residual" in found.suspects[0].name or "branches" in found.suspects[0].why


def own_groups(wrong):
    """muP by hand, as a user has it; the LR of the parameter named is left as it is at the base."""

    def build(width, depth):
        model = Decoder(DecoderConfig(width=width, depth=depth, scaling="plain", norm="trainable"))
        plan = iso.plan(model, "mup", base=iso.Scale(width=64), hps={"lr": 1.0})
        plan.apply(model, seed=torch.initial_seed() % 2**31)
        named = dict(model.named_parameters())
        model.param_groups = lambda lr: [
            {"params": [named[row.name]], "lr": lr if row.name == wrong else lr * row.lr} for row in plan.rows
        ]
        return model

    return build


HAND = {"rule": "none", "widths": (64, 128, 256), "steps": 5, "seeds": 1, "data": None}


def test_mup_by_hand_passes(quick, tmp_path):
    assert run_check(own_groups(""), tmp_path, quick(**HAND)).passes


@pytest.mark.parametrize("wrong", ["blocks.0.attn.qkv", "blocks.1.attn.out"])
def test_one_layer_whose_lr_is_not_scaled_is_found_by_name(quick, tmp_path, wrong):
    found = run_check(own_groups(f"{wrong}.weight"), tmp_path, quick(**HAND))
    assert found.verdict == "fails"
    assert found.suspects[0].name == wrong
    assert "LR does not shrink" in found.suspects[0].why


def mlp(width):
    """A regression with a loss of its own, SP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    batch = torch.randn(16, 4), torch.randn(16, 1)
    return model, batch, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])


def test_any_model_with_a_loss_of_its_own(quick, tmp_path):
    found = run_check(mlp, tmp_path, quick(rule="none", lr=1e-2))
    assert [one.name for one in found.findings if one.quantity == "change"] == ["0", "1", "2", "3", "4"]
    assert found.suspects[0].axis == "width"
    assert {one.axis for one in found.findings} == {"width"}
    assert "its own batch and loss" in found.notes[-1]


def test_finished_cells_are_not_run_again_and_edited_ones_are(quick, tmp_path):
    def build(width):
        torch.manual_seed(1)
        model, batch, loss = mlp(width)
        with torch.no_grad():
            model[2].weight.mul_(factor)
        return model, batch, loss

    factor = 1.0
    first = run_check(build, tmp_path, quick(rule="none"))
    rows = log.read(tmp_path / "rows.jsonl")
    assert len(rows) == 6
    again = run_check(build, tmp_path, quick(rule="none"))
    assert again.to_dict() == first.to_dict()
    assert log.read(tmp_path / "rows.jsonl") == rows
    factor = 2.0
    run_check(build, tmp_path, quick(rule="none"))
    assert len(log.read(tmp_path / "rows.jsonl")) == 12


def test_a_torn_row_is_run_again(quick, tmp_path):
    first = run_check(mlp, tmp_path, quick(rule="none"))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert run_check(mlp, tmp_path, quick(rule="none")).to_dict() == first.to_dict()
    assert len(log.read(path)) == 6


def test_a_folder_in_use_is_refused(quick, tmp_path):
    from isoscale.train.folder import locked

    with locked(tmp_path), pytest.raises(CheckpointError, match="lock"):
        run_check(mlp, tmp_path, quick(rule="none"))


def test_the_status_counts_to_the_end(quick, tmp_path):
    seen = []
    run_check(mlp, tmp_path, quick(rule="none"), on_status=seen.append)
    assert (seen[-1].done, seen[-1].total) == (6, 6)
    assert seen[-1].seconds_left == 0
    assert seen[0].label == "width 32, depth 2, seed 0"


def test_check_json_is_strict_and_complete(sp):
    data = json.loads((sp.out / "check.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["verdict"] == "fails"
    assert data["version"] == 1
    assert {"name", "kind", "axis", "quantity", "slope", "stderr", "init_slope", "expected", "verdict", "ok", "rms"} == \
        set(data["tensors"][0])  # fmt: skip
    assert set(data["tensors"][0]["rms"]) == {"64", "128", "256"}
    assert data["settings"]["lr"] == 1e-3


def test_a_rule_that_needs_unit_ops_is_refused_for_other_models(quick, tmp_path):
    with pytest.raises(PlanError):
        run_check(lambda width, depth: Decoder(DecoderConfig(width=width, depth=depth, scaling="plain")), tmp_path,
                  quick(rule="u-mup"))  # fmt: skip


def test_the_transfer_check_trains_and_says_what_moved(quick, tmp_path):
    found = run_check(mlp, tmp_path, quick(rule="none", widths=(8, 16), seeds=2, transfer=True, transfer_steps=20, lr=1e-2))
    (moved,) = found.transfer
    assert (moved.small, moved.large) == (8, 16)
    assert moved.found.verdict in ("confirmed", "refuted", "undecided")
    assert all(3 <= len(curve) <= 9 for curve in moved.curves.values())
    page = write_check_page(tmp_path).read_text()
    assert "Transfer, width 8 to 16" in page
    count = len(log.read(tmp_path / "rows.jsonl"))
    run_check(mlp, tmp_path, quick(rule="none", widths=(8, 16), seeds=2, transfer=True, transfer_steps=20, lr=1e-2))
    assert len(log.read(tmp_path / "rows.jsonl")) == count


def test_the_page_shows_curves_slopes_and_suspects_and_fetches_nothing(sp):
    page = write_check_page(sp.out).read_text()
    assert page.startswith("<!doctype html>")
    assert "https://cdn" not in page.split("<script")[0]
    for text in ("Over width: change since the first step", "Over depth: size", "suspect: blocks.", "blocks.0.attn.qkv"):
        assert text in page
    with pytest.raises(CheckpointError, match="no finished check"):
        check_page(sp.out / "none")
