"""LMD in the loop: it trains at samples and is judged and saved at the mean; the rest of the loop is as ever."""

import math

import pytest
import torch

from isoscale._base.errors import PlanError
from isoscale._base.log import read
from isoscale.optim import LMD
from isoscale.train import checkpoint, loop, state, train
from isoscale.train.inference import evaluate_run

LMD_RUN = {"optim.name": "lmd", "hps.sigma": 0.5}


def losses(out, kind="train", key="loss"):
    return [row[key] for row in read(out / "metrics.jsonl") if row["kind"] == kind]


def capture(monkeypatch):
    seen = []

    class Run(loop._Run):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(loop, "_Run", Run)
    return seen


def test_evaluations_and_checkpoints_are_of_the_mean(tiny, tmp_path, monkeypatch):
    seen = capture(monkeypatch)
    result = train(tiny(**LMD_RUN), tmp_path / "run")
    run = seen[0]
    assert evaluate_run(tmp_path / "run", batches=2).loss == pytest.approx(result.val_loss, abs=1e-6)
    saved = checkpoint.load_latest(tmp_path / "run").model["head.weight"]
    held = run.model.get_parameter("head.weight").detach().clone()
    with run.optimizer.mean():
        assert torch.equal(run.model.get_parameter("head.weight"), saved)
    assert torch.equal(run.model.get_parameter("head.weight"), held)
    assert not torch.allclose(held, saved, rtol=0.05)  # the control: what it trains at is a sample
    sampled = loop.evaluate(run.model, run.step_model, run.val, run.context())
    assert abs(sampled - result.val_loss) > 1e-3


def test_control_a_resume_without_the_sample_is_another_run(tiny, tmp_path, monkeypatch):
    def stop(tick):
        if tick.step == 3:
            raise KeyboardInterrupt

    train(tiny(**LMD_RUN), tmp_path / "whole")
    for name in ("cut", "lost"):
        with pytest.raises(KeyboardInterrupt):
            train(tiny(**LMD_RUN), tmp_path / name, on_step=stop)
        if name == "lost":
            monkeypatch.setattr(state, "LMD", torch.optim.Muon)  # state comes back, the sample does not
        train(tiny(**LMD_RUN), tmp_path / name, resume=True)
    whole, cut, lost = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut", "lost"))
    assert whole == cut
    assert whole != lost


def test_micro_batches_share_the_noise_of_their_step(tiny, tmp_path):
    quiet = {**LMD_RUN, "rules.parametrisation": "sp", "train.steps": 2, "hps.lr": 1e-4}
    for name, more in (("one", {}), ("four", {"train.accumulate": 4}), ("other", {"seed": 1})):
        train(tiny(**quiet, **more), tmp_path / name)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert four == pytest.approx(one, abs=2e-5)  # the second step is at a sample
    assert abs(losses(tmp_path / "other")[1] - one[1]) > 1e-4


def test_the_seed_of_the_run_is_that_of_the_noise(tiny, tmp_path, monkeypatch):
    seen = capture(monkeypatch)
    train(tiny(**LMD_RUN, seed=7), tmp_path / "run")
    assert {group["seed"] for group in seen[0].optimizer.param_groups if group["optimizer"] == "lmd"} == {7}


@pytest.mark.parametrize("samples", [1, 2])
def test_a_skipped_step_leaves_state_and_sample_alone(tiny, tmp_path, monkeypatch, samples):
    whole, seen, bad = loop._Run.gradients, capture(monkeypatch), []

    def gradients(self, step):
        loss = whole(self, step)
        if step == 4:
            if not bad:
                bad.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
            self.parameters[0].grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(loop._Run, "gradients", gradients)
    states = []
    monkeypatch.setattr(loop._Run, "refuse", (lambda was: lambda self, *a: (was(self, *a), states.append(
        {k: v.clone() for k, v in state.optimizer_tensors(self.model, self.optimizer).items() if "draws" not in k}
    )))(loop._Run.refuse))  # fmt: skip
    values = {**LMD_RUN, "optim.samples": samples, "train.on_non_finite": "skip", "train.steps": 5}
    result = train(tiny(**values), tmp_path)
    assert (result.skipped, result.steps) == (1, 5)
    run = seen[0]
    after = state.optimizer_tensors(run.model, run.optimizer)
    assert all(torch.equal(value, after[key]) for key, value in states[0].items())
    assert all(torch.isfinite(value).all() for value in after.values())
    if samples == 1:
        assert all(torch.equal(p, bad[0][name]) for name, p in run.model.named_parameters())
    assert math.isfinite(result.val_loss)
    assert not run.optimizer._sums


def test_samples_average_over_the_noise(tiny, tmp_path):
    """At a learning rate of nothing the loss of a step is its mean over samples, so more of them scatter less."""
    still = {**LMD_RUN, "hps.lr": 1e-9, "train.steps": 12, "train.schedule": "constant", "hps.sigma": 1.0,
             "rules.parametrisation": "sp", "hps.init_std": 0.3}  # fmt: skip
    for count in (1, 8):
        train(tiny(**still, **{"optim.samples": count}), tmp_path / str(count))
    train(tiny(**{**still, "hps.sigma": 1e-6}), tmp_path / "mean")
    mean = losses(tmp_path / "mean")

    def scatter(name):  # the first step is at the initial weights
        gaps = [a - b for a, b in zip(losses(tmp_path / name)[1:], mean[1:])]
        middle = sum(gaps) / len(gaps)
        return (sum((gap - middle) ** 2 for gap in gaps) / len(gaps)) ** 0.5

    assert scatter("8") < 0.6 * scatter("1")


def test_a_batch_ramp_moves_alpha_and_lambda(tiny, tmp_path, monkeypatch):
    ramp = {"rules.parametrisation": "complete-d", "base.width": 16, "base.depth": 1, "base.batch": 4, "base.steps": 8,
            "train.ramp": [[4, 16]], "train.schedule": "constant", "train.warmup": 0.0}  # fmt: skip
    seen, real = [], LMD.step

    def step(self, closure=None):
        group = next(group for group in self.param_groups if group["optimizer"] == "lmd")
        seen.append((group["lr"], group["decay"]))
        return real(self, closure)

    monkeypatch.setattr(LMD, "step", step)
    train(tiny(**{**LMD_RUN, **ramp, "hps.lr": 0.02}), tmp_path / "run")
    assert seen[4] == pytest.approx((2 * seen[3][0], 2 * seen[3][1]))
    with pytest.raises(PlanError, match="by more than a factor e"):  # before the first step
        train(tiny(**{**LMD_RUN, **ramp, "hps.lr": 0.9}), tmp_path / "large")
    assert not (tmp_path / "large" / "metrics.jsonl").exists() or not losses(tmp_path / "large")


@pytest.mark.slow
def test_a_compiled_model_follows_the_samples(tiny, tmp_path):
    for name, on in (("eager", False), ("compiled", True)):
        train(tiny(**{**LMD_RUN, "train.compile": on, "train.steps": 4}), tmp_path / name)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=5e-3)
    assert len(set(losses(tmp_path / "eager"))) == 4
