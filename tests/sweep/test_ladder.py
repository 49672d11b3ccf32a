"""The ladder: a power law is found, its interval covers, and what it cannot say is said."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from isoscale._base.errors import CheckpointError, ConfigError
from isoscale.cli import main
from isoscale.config import RunConfig
from isoscale.sweep import sweep
from isoscale.sweep.budget import run_cost
from isoscale.sweep.ladder import Rung, fit, predict, rung
from isoscale.train import train

WIDTHS = (16, 32, 64, 96)


def size(width, **values):
    return RunConfig().with_values(**{"model.width": width, **values})


def ladder(law, widths=WIDTHS):
    out = []
    for width in widths:
        tokens, flops = run_cost(size(width))
        out.append(Rung(f"w{width}", flops, law(flops), width, 4, tokens))
    return out


def test_a_power_law_is_found_exactly():
    law = lambda flops: 40 * flops**-0.1  # noqa: E731
    found = predict(ladder(law), size(160))
    _, flops = run_cost(size(160))
    assert found.loss == pytest.approx(law(flops))
    assert found.slope == pytest.approx(0.1)
    assert found.low == pytest.approx(found.high) == pytest.approx(found.loss)
    assert found.flops == flops
    assert found.notes == ()


@pytest.mark.parametrize("widths", [WIDTHS, (16, 32, 64)])
def test_the_interval_covers_what_it_says(widths):
    """95 % of 400 noisy ladders: between 92 and 98 %. The control: an interval half as wide covers less than that."""
    law = lambda flops: 40 * flops**-0.1  # noqa: E731
    _, flops = run_cost(size(160))
    exact = ladder(law, widths)
    draw, inside, half = np.random.default_rng(1), 0, 0
    for _ in range(400):
        noisy = [replace(r, loss=r.loss * math.exp(0.01 * draw.normal())) for r in exact]
        middle, wide, _ = fit(noisy, flops)
        truth = math.log(law(flops)) + 0.01 * draw.normal()
        inside += abs(truth - middle) <= wide
        half += abs(truth - middle) <= wide / 2
    assert 0.92 <= inside / 400 <= 0.98
    assert half / 400 < 0.92


@pytest.mark.parametrize(("target", "law", "text"), [
    (size(512), lambda f: f**-0.1, "more than 8x"), (size(16, **{"model.depth": 1}), lambda f: f**-0.1, "smaller than every rung"),
    (size(160), lambda f: f**0.1, "do not fall"), (size(160, **{"model.depth": 8}), lambda f: f**-0.1, "one depth only"),
    (size(160, **{"train.steps": 900}), lambda f: f**-0.1, "one tokens only"),
])  # fmt: skip
def test_what_the_ladder_does_not_cover_is_said(target, law, text):
    assert any(text in note for note in predict(ladder(law), target).notes)


def test_too_few_sizes_and_diverged_rungs_are_refused():
    law = lambda flops: flops**-0.1  # noqa: E731
    with pytest.raises(ConfigError, match="at least 3 sizes, and the ladder has 2"):
        predict([*ladder(law, (16, 32)), *ladder(law, (16, 32))], size(160))
    with pytest.raises(ConfigError, match="not finite"):
        predict([*ladder(law), Rung("bad", 1e12, math.inf, 8, 4, 9)], size(160))


def test_transfer_on_the_command_line_writes_config_plan_and_prediction(tiny, tmp_path, capsys):
    proxy = tiny(**{"sweep.space": {"lr": (2.0, 4.0)}, "sweep.executor": "inline", "sweep.workers": 1})
    best = sweep(proxy, tmp_path / "sweep").best
    for width in (24, 32):
        train(proxy.with_values(**{"model.width": width, "hps.lr": best["lr"]}), tmp_path / f"w{width}")
    (tmp_path / "target.toml").write_text("[model]\nwidth = 64\n[train]\nsteps = 12\n")
    flags = [str(tmp_path / "sweep"), "--target", str(tmp_path / "target.toml")]
    rungs = [flag for width in (24, 32) for flag in ("--ladder", str(tmp_path / f"w{width}"))]
    assert main(["transfer", *flags, *rungs, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prediction"]["low"] <= said["prediction"]["loss"] <= said["prediction"]["high"]
    assert len(said["prediction"]["rungs"]) == 3
    assert said["target"]["model"]["width"] == 64
    folder = tmp_path / "sweep" / "target"
    assert "lr          " in (folder / "plan.txt").read_text()
    assert main(["plan", "--config", str(folder / "config.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["target"]["width"] == 64
    assert main(["train", "--config", str(folder / "config.toml"), "--out", str(tmp_path / "run"), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 12
    before = (folder / "config.toml").read_text()
    rung = ["transfer", flags[0], "--width", "24", "--train", "--out", str(tmp_path / "rung"), "--quiet", "--json"]
    assert main(rung) == 0
    assert json.loads(capsys.readouterr().out)["saved"] == str(tmp_path / "rung" / "target")
    assert (folder / "config.toml").read_text() == before  # a rung that is trained leaves the target alone
    assert main(["transfer", *flags, *rungs[:2]]) != 0
    assert "at least 3 sizes" in capsys.readouterr().err
    (tmp_path / "wrong.toml").write_text("[model]\nwidht = 64\n")
    assert main(["transfer", flags[0], "--target", str(tmp_path / "wrong.toml")]) != 0
    assert "model.width" in capsys.readouterr().err


def test_a_ladder_that_does_not_fall_gives_no_number(tiny, tmp_path, capsys):
    proxy = tiny(**{"sweep.space": {"lr": (2.0,)}, "sweep.executor": "inline", "train.steps": 16})
    sweep(proxy, tmp_path / "sweep")
    rungs = []
    for width, steps in ((24, 8), (32, 1)):  # the bigger, the less trained
        config = proxy.with_values(**{"model.width": width, "hps.lr": 2.0, "train.steps": steps, "train.batch": 128 // steps})
        train(config, tmp_path / f"w{width}")
        rungs += ["--ladder", str(tmp_path / f"w{width}")]
    assert main(["transfer", str(tmp_path / "sweep"), "--width", "48", *rungs]) == 0
    said = capsys.readouterr().out
    assert "\nno prediction\nwarning: the ladder's losses do not fall with size" in said
    assert "predicted loss" not in said


def test_an_unfinished_run_is_no_rung(tiny, tmp_path):
    config = tiny()

    def stop(tick):
        if tick.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop)
    with pytest.raises(CheckpointError, match="has not finished"):
        rung(tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    assert rung(tmp_path / "run").width == 16
