"""The page: the numbers are in it, nothing is fetched, and odd folders are shown or refused in words."""

import json
import math
import re

import pytest

from isoscale._base.errors import CheckpointError, NonFiniteError
from isoscale._base.log import dumps
from isoscale.report import figures, write_report
from isoscale.report.load import Run
from isoscale.train import train


def self_contained(page):
    outside = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc\s*=\s*['\"]?(?:https?:)?//", page)
    outside += re.findall(r"<link[^>]*\bhref", page) + re.findall(r"@import|url\(\s*['\"]?https?:", page.split("<script")[0])
    return page.startswith("<!doctype html>") and not outside


def test_control_the_check_for_outside_sources_can_fail():
    for bad in ("<script src='https://cdn/x.js'>", "<link rel=stylesheet href='x'>", '<img src="//x/y.png">'):
        assert not self_contained(f"<!doctype html>{bad}")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run"
    return train(tiny(**{"numerics.recipe": "fp8", "numerics.log_casts": True, "name": "a <b> & c"}), out)


def test_a_run_page_has_loss_casts_and_plan(run):
    page = write_report(run.out).read_text()
    assert self_contained(page)
    assert f"{run.val_loss:.4f} nats/token after 8 steps" in page
    assert "a &lt;b&gt; &amp; c" in page
    assert "<b> & c" not in page.split("<script")[0]
    for text in ("blocks.0.attn.qkv.weight", "weight e4m3, input e4m3, grad e5m2", "fan_in^-1/2", "clipped", "flushed"):
        assert text in page


def test_the_page_goes_where_asked_and_is_small_enough_to_mail(run, tmp_path):
    path = write_report(run.out, tmp_path / "sub" / "page.html")
    assert path == tmp_path / "sub" / "page.html"
    assert path.stat().st_size < 8e6


def test_a_run_that_did_not_finish_says_so(tiny, tmp_path):
    with pytest.raises(NonFiniteError):
        train(tiny(**{"hps.lr": 1e30, "train.warmup": 0.0}), tmp_path / "early")
    page = write_report(tmp_path / "early").read_text()
    assert "did not finish" in page

    def stop(tick):
        if tick.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "cut", on_step=stop)
    (tmp_path / "cut" / "plan.json").unlink()
    page = write_report(tmp_path / "cut").read_text()
    assert "did not finish: 5 of 8 steps, last validation loss" in page
    assert "<h2>Plan</h2>" not in page


def sweep_folder(tmp_path, run, losses, points=None):
    points = points or [{"lr": 2.0**i} for i in range(len(losses))]
    (tmp_path / "trials").mkdir(parents=True)
    trials = []
    for i, (loss, point) in enumerate(zip(losses, points)):
        folder = tmp_path / "trials" / f"t{i}"
        folder.mkdir()
        for name in ("run.json", "plan.json", "metrics.jsonl"):
            (folder / name).write_bytes((run.out / name).read_bytes())
        trials.append({"id": f"t{i}", "point": point, "seed": 0, "state": "done", "loss": loss, "seconds": 1.0,
                       "attempts": 1})  # fmt: skip
    best = min(range(len(losses)), key=lambda i: losses[i])
    sweep = {"finished": True, "out": str(tmp_path), "best": points[best], "loss": losses[best], "edge": True, "seconds": 3.0, "trials": trials}
    (tmp_path / "study.json").write_text(dumps(sweep))
    return tmp_path


def test_a_sweep_page_has_every_trial_the_edge_and_the_diverged(run, tmp_path):
    folder = sweep_folder(tmp_path / "s", run, [3.0, 2.125, math.inf])
    page = write_report(folder).read_text()
    assert self_contained(page)
    for text in ("2.1250", "3.0000", "diverged", "lies at an end"):
        assert text in page, text


def test_other_hyperparameters_get_lines_of_their_own(run, tmp_path):
    points = [{"lr": 1.0}, {"lr": 1.0, "alpha_res": 0.5}, {"lr": 1.0, "alpha_res": 2.0}, {"lr": 1.0, "alpha_res": 1.0, "eps": 1e-6}]
    page = write_report(sweep_folder(tmp_path / "s", run, [3.0, 2.0, 2.5, 1.5], points)).read_text()
    assert "Loss against alpha_res" in page
    assert "Loss against eps" not in page  # that trial moved two things at once


def test_folders_that_cannot_be_reported_on(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(CheckpointError, match="nothing to report on"):
        write_report(tmp_path)
    (tmp_path / "study.db").write_bytes(b"")
    with pytest.raises(CheckpointError, match="nothing to report on") as error:
        write_report(tmp_path)
    assert "isoscale sweep --resume" in error.value.hint
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        write_report(tmp_path)


def fake(losses, evals=(), steps=8):
    rows = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    return Run(None, {"name": "x", "model": {"width": 1}, "train": {"steps": steps}}, rows,
               [{"step": step, "val_loss": loss} for step, loss in evals], [], None)  # fmt: skip


def test_curves_are_cut_above_the_first_loss_and_survive_nan():
    figure = figures.curves({"a": fake([5.0, 4.0, 3.0], [(3, 3.0)]), "b": fake([5.0, math.nan, 90.0])})
    low, high = figure.layout.yaxis.range
    assert low < 3.0 < 5.0 < high < 6.0
    assert "did not finish" in figure.data[2].name
    assert figures.curves({"a": fake([])}).layout.yaxis.range is None
    assert figures._smooth([1.0, math.nan, 3.0], 15)[2] == 2.0


def test_the_best_point_is_ringed_and_ticks_are_powers_of_two():
    figure = figures.lines({"width 64": {0.5: 3.0, 1.0: 2.0, 2.0: 2.5, 4.0: math.inf}}, "", "lr")
    ring = next(trace for trace in figure.data if trace.marker.symbol == "circle-open")
    assert (ring.x, ring.y) == ((1.0,), (2.0,))
    cross = next(trace for trace in figure.data if trace.marker.symbol == "x")
    assert cross.x == (4.0,)
    assert cross.y[0] > 3.0
    assert list(figure.layout.xaxis.ticktext) == ["2<sup>-1</sup>", "2<sup>0</sup>", "2<sup>1</sup>", "2<sup>2</sup>"]
    assert figures.power(0.3) == "0.3"


def test_casts_in_bf16_alone_make_no_figure():
    row = {"step": 1, "layer": "a", "operand": "input", "format": "bf16", "clipped": 0.0, "flushed": 0.0}
    assert figures.casts([row]) is None
    figure = figures.casts([row, {**row, "format": "e4m3", "clipped": 0.25}, {**row, "step": 0, "format": "e4m3"}])
    assert figure.data[0].x == (0.25,)
    assert json.loads(figure.to_json())
