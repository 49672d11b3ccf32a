"""A batch ramp: no sequence twice, betas and LR from the plan at every stage, resume bit-equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isoscale._base.errors import ConfigError, PlanError
from isoscale.config import RunConfig
from isoscale.train import loop, train

SETTINGS = {
    "rules.parametrisation": "complete-d", "base.width": 16, "base.depth": 1, "base.batch": 2, "base.steps": 12,
    "model.width": 16, "model.depth": 1, "model.head_size": 8, "data.seq_len": 16, "train.steps": 12, "train.batch": 2,
    "train.ramp": [[4, 4], [8, 8]], "train.eval_every": 12, "train.eval_batches": 1, "train.checkpoint_every": 3,
    "hps.lr": 0.01, "train.schedule": "constant", "train.warmup": 0.0,
}  # fmt: skip


def config(**changes: object) -> RunConfig:
    return RunConfig().with_values(**{**SETTINGS, **changes})


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_sizes_and_positions() -> None:
    cfg = config().train
    assert [cfg.batch_at(step) for step in (0, 3, 4, 7, 8, 11)] == [2, 2, 4, 4, 8, 8]
    assert [cfg.sequences_before(step) for step in (0, 4, 5, 8, 12)] == [0, 8, 12, 24, 56]
    assert config(**{"train.ramp": []}).train.sequences_before(12) == 24


def test_lr_and_betas_follow_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, tuple[float, float]]] = []
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        group = self.param_groups[0]
        seen.append((len(seen), group["lr"], group["betas"]))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    result = train(config(), tmp_path / "run")
    assert result.tokens == 56 * 16
    first, second, third = seen[0], seen[4], seen[8]
    assert second[1] / first[1] == pytest.approx(2**0.5)
    assert third[1] / first[1] == pytest.approx(2.0)
    shares = [1 - stage[2][1] for stage in (first, second, third)]
    assert [share / shares[0] for share in shares] == pytest.approx([1, 2, 4])
    assert seen[3][1:] == first[1:]


def test_without_a_batch_rule_the_rate_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Run, "follow", lambda self, plan: pytest.fail("nothing to follow"))
    result = train(config(**{"rules.parametrisation": "u-mup"}), tmp_path / "run")
    assert result.tokens == 56 * 16


def test_a_stage_that_no_rule_can_serve_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="leaves the range"):
        train(config(**{"train.ramp": [[4, 64]], "base.steps": 100}), tmp_path / "run")
    assert not rows(tmp_path / "run")


def test_a_resumed_ramp_equals_an_uncut_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config(), whole)

    class Stop(Exception):
        pass

    def stop(tick: loop.Tick) -> None:
        if tick.step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(config(), cut, on_step=stop)
    train(config(), cut, resume=True)
    assert rows(cut) == rows(whole)


@pytest.mark.parametrize(("ramp", "words"), [([[8, 4], [4, 8]], "do not rise"), ([[12, 4]], "past the last")])
def test_refusals(ramp: list[list[int]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**{"train.ramp": ramp})
