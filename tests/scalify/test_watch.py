"""What scales predict against what is measured, in both directions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isoscale import scalify as sc


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 32))
    model, _ = sc.scalify(model, None, "fp16")
    x, y = torch.randn(64, 64), torch.randint(32, (64,))
    return sc.measure(model, lambda: F.cross_entropy(model(x), y))


def test_every_tensor_has_a_row_with_its_module_direction_and_operands(seen):
    forward = [row for row in seen.rows if row.direction == "forward"]
    assert [row.module for row in forward if row.op == "aten.addmm.default"] == ["0", "3"]
    assert any(row.op.startswith("aten.native_layer_norm") and row.module == "2" for row in forward)
    backward = [row for row in seen.rows if row.direction == "backward"]
    assert {"0", "2", "3"} <= {row.module for row in backward}
    by = {row.index: row for row in seen.rows}
    gelu = next(row for row in forward if row.op == "aten.gelu.default")
    assert [by[i].op for i in gelu.inputs] == ["isoscale.rescale.default"]  # of the linear layer in front
    assert seen.formulas["aten.gelu.default"].startswith("s =")


def test_predictions_hold_forward(seen):
    assert seen.within(3, "forward") == 1.0
    assert seen.within(3, "forward") >= seen.within(0.01, "forward")
    assert math.isnan(sc.Watched().within())


def test_the_loss_gradient_is_predicted(seen):
    row = next(row for row in seen.rows if row.op == "aten._log_softmax_backward_data.default")
    assert row.off < 1.5


def test_a_wrong_scale_is_found_first_and_a_rescale_proposed():
    x = sc.as_scaled(torch.randn(32, 32), scale=2.0**-12)  # data far above unit RMS
    with sc.watch() as seen:
        y = x * 2.0
        y.relu()
    row, text = seen.proposals(3)[0]
    assert row.op == "aten.mul.Tensor"
    assert row.rms > 11
    assert "rescale_l2(x) behind mul" in text
    assert len(seen.proposals(3)) == 1  # what follows from it is not named again
    assert seen.worst(1)[0].off > 11
    with sc.watch() as mended:
        sc.rescale_l2(x * 2.0).relu()
    assert [row.op for row, _ in mended.proposals(3)] == ["aten.mul.Tensor"]
    assert max(row.off for row in mended.rows if row.op == "aten.relu.default") < 2


def test_hooks_are_gone_and_rows_are_saved(seen, tmp_path):
    model = nn.Linear(4, 4)
    model, _ = sc.scalify(model, None, "fp16")
    before = len(model._forward_pre_hooks), len(model._forward_hooks)
    with pytest.raises(ZeroDivisionError), sc.watch(model):
        1 / 0  # noqa: B018
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before
    seen.save(tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == len(seen.rows) + 1
    assert lines[1]["op"] == seen.rows[0].op


def test_gradients_of_the_model_are_cleared():
    model, _ = sc.scalify(nn.Linear(4, 4), None, "fp16")
    sc.measure(model, lambda: model(torch.randn(2, 4)).sum())
    assert all(p.grad is None for p in model.parameters())
