"""A step that is no number: named and stopped, or left out and counted; and what clipping counts."""

import math

import pytest
import torch

from isoscale._base.errors import NonFiniteError
from isoscale._base.log import read
from isoscale.train import checkpoint, loop, train


def poison(monkeypatch, steps, *, weight=None):
    """At these steps the gradients are NaN, or a weight is."""
    whole, seen = loop._Run.gradients, {}

    def gradients(self, step):
        if step in steps and weight is not None:
            with torch.no_grad():
                self.model.get_parameter(weight)[0, 0] = math.nan
        loss = whole(self, step)
        if step in steps and weight is None:
            seen[step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            self.parameters[0].grad[0, 0] = math.nan
        elif step - 1 in seen:
            seen[step - 1, "after"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return loss

    monkeypatch.setattr(loop._Run, "gradients", gradients)
    return seen


def test_stop_names_the_first_bad_tensor_and_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {5}, weight="blocks.0.attn.qkv.weight")
    with pytest.raises(NonFiniteError, match="step 5: loss nan") as error:
        train(tiny(), tmp_path)
    assert error.value.key.startswith("weight blocks.0.attn.qkv.weight: 1 NaN")
    assert "hps.lr" in error.value.hint
    saved = checkpoint.load_latest(tmp_path)
    assert saved.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in saved.model.values())


@pytest.mark.parametrize("values", [{}, {"train.accumulate": 2, "train.precision": "bf16"},
                                    {"rules.parametrisation": "sp"}])  # fmt: skip
def test_an_absurd_learning_rate_is_stopped_by_name(tiny, tmp_path, values):
    with pytest.raises(NonFiniteError) as error:
        train(tiny(**{"hps.lr": 1e30, "train.warmup": 0.0, **values}), tmp_path)
    assert error.value.key.split()[0] in ("weight", "output", "gradient", "the")


def test_skip_counts_and_leaves_the_weights_alone(tiny, tmp_path, monkeypatch):
    seen = poison(monkeypatch, {4})
    result = train(tiny(**{"train.on_non_finite": "skip", "hps.weight_decay": 0.1}), tmp_path)
    assert (result.skipped, result.steps) == (1, 8)
    for name, tensor in seen[4].items():
        assert torch.equal(tensor, seen[4, "after"][name]), name
    rows = read(tmp_path / "metrics.jsonl")
    assert math.isnan(next(row for row in rows if row["kind"] == "train" and row["step"] == 4)["grad_norm"])
    assert math.isfinite(result.val_loss)


def test_skip_gives_up_after_so_many_in_a_row(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3, 4, 5, 6})
    with pytest.raises(NonFiniteError, match=r"step 5.*3 steps in a row"):
        train(tiny(**{"train.on_non_finite": "skip", "train.max_skips": 2}), tmp_path)


def test_clipping_is_counted_and_does_something(tiny, tmp_path):
    free = train(tiny(), tmp_path / "free")
    cut = train(tiny(**{"train.clip": 1e-3}), tmp_path / "cut")
    loose = train(tiny(**{"train.clip": 1e6}), tmp_path / "loose")
    assert (free.clipped, cut.clipped, loose.clipped) == (0, 8, 0)
    assert loose.val_loss == free.val_loss != cut.val_loss


def test_loss_falls(tiny, tmp_path):
    result = train(tiny(**{"train.steps": 40, "hps.lr": 2.0}), tmp_path)
    rows = [row["loss"] for row in read(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert rows[0] == pytest.approx(math.log(256), abs=0.5)
    assert result.val_loss < rows[0] - 1.5
