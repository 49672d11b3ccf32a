"""What a sweep's page says: winners, what matters, interactions, searches beside each other."""

import json
import math

import numpy as np
import pytest

from isoscale._base.errors import CheckpointError
from isoscale._base.log import dumps
from isoscale.config import RunConfig
from isoscale.report import analysis, write_report
from isoscale.sweep.space import Space
from isoscale.sweep.strategies import Trial, make

POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)


def searched(folder, loss, seed=0, width=64, **values):
    """A sweep folder as `isoscale sweep` leaves it, of a function instead of runs."""
    config = RunConfig().with_values(seed=seed, **{"model.width": width, **{f"sweep.{k}": v for k, v in values.items()}})
    space = Space.of(config)
    strategy, trials = make(config, space), []
    while (points := strategy.ask(trials, 4)) is not None:
        trials += [Trial(point, "done", loss(point)) for point in points]
    best = min(trials, key=lambda t: t.loss)
    rows = [{"id": f"t{i}", "point": dict(t.point), "seed": 0, "state": "done", "loss": t.loss, "seconds": 1.0,
             "attempts": 1, "tokens": 1000, "error": "", "confirm": False} for i, t in enumerate(trials)]  # fmt: skip
    folder.mkdir(parents=True)
    data = {"finished": True, "search": {"strategy": config.sweep.strategy, "space": space.to_dict()}, "best": dict(best.point),
            "loss": best.loss, "edge": False, "seconds": 1.0, "confidence": None, "warnings": [], "trials": rows,
            "spent": {"tokens": 1000 * len(rows), "flops": 1e9 * len(rows)}}  # fmt: skip
    (folder / "study.json").write_text(dumps(data))
    (folder / "run.json").write_text(config.model_dump_json())
    return data


def bowl(**best):
    return lambda point: 2 + sum(w * (math.log2(point.get(n, 1.0)) - math.log2(v)) ** 2 for n, (v, w) in best.items())


def test_what_matters_is_found_and_what_does_not_is_not(tmp_path):
    loss = bowl(lr=(4.0, 1.0), alpha_res=(2.0, 0.1))
    data = searched(tmp_path / "s", loss, strategy="random", trials=120,
                    space=dict.fromkeys(("lr", "alpha_res", "alpha_attn"), (1 / 16, 16.0)))  # fmt: skip
    found = analysis.importance(data, {})
    assert found["lr"] > 3 * found["alpha_res"]
    assert found["alpha_res"] > found["alpha_attn"]
    assert sum(found.values()) == pytest.approx(1)
    page = write_report(tmp_path / "s").read_text()
    for text in ("Which hyperparameters matter", "Parallel coordinates", "Best so far against what was spent"):
        assert f"<h2>{text}</h2>" in page
    assert analysis.importance({**data, "trials": data["trials"][:19]}, {}) == {}  # too few to say


def test_the_best_so_far_only_falls_and_counts_every_run():
    data = {"spent": {"tokens": 40, "flops": 400.0}, "trials": [
        {"state": "done", "loss": 3.0, "tokens": 10}, {"state": "pruned", "loss": 1.0, "tokens": 5},
        {"state": "done", "loss": "inf", "tokens": 10}, {"state": "done", "loss": 2.0, "tokens": 10},
        {"state": "done", "loss": 0.5, "tokens": 10, "confirm": True}]}  # fmt: skip
    assert analysis.best_so_far(data) == ([100.0, 150.0, 250.0, 350.0], [3.0, 3.0, 3.0, 2.0])


def test_transfer_error_is_zero_without_interaction_and_not_with():
    x = np.arange(5.0)
    apart = (x[:, None] - 2) ** 2 + (x[None, :] - 1) ** 2
    assert analysis.transfer_error(apart) == 0
    ridge = (x[:, None] - x[None, :]) ** 2 + 0.01 * (x[:, None] - 2) ** 2
    # the best row is 2; tuned at row r the column is r, which at row 2 costs (r - 2)^2 = 4, 1, 1, 4, at most 1
    assert analysis.transfer_error(ridge) == pytest.approx(1.0)
    assert analysis.transfer_error(ridge / 10) == pytest.approx(0.25)
    assert analysis.transfer_error(np.where(ridge > 3, np.inf, ridge)) == pytest.approx(1.0)
    by_hand = np.array([[0.0, 0.3], [0.2, 0.1]])  # at the wrong row 1 the second column is best; at row 0 it costs 0.3
    assert analysis.transfer_error(by_hand) == pytest.approx(0.3)
    assert analysis.transfer_error(by_hand.T) == pytest.approx(0.2)


def test_a_grid_shows_interactions_of_every_pair(tmp_path):
    ridge = lambda p: 2 + (math.log2(p["lr"]) - math.log2(p["alpha_attn"])) ** 2  # noqa: E731
    data = searched(tmp_path / "g", ridge, strategy="grid", space={"lr": POWERS, "alpha_attn": POWERS})
    ((pair, (rows, columns, loss)),) = analysis.grids(data).items()
    assert pair == ("lr", "alpha_attn")
    assert (rows, columns) == (list(POWERS), list(POWERS))
    assert loss[4, 0] == ridge({"lr": 4.0, "alpha_attn": 0.25})
    page = write_report(tmp_path / "g").read_text()
    assert "<h2>Interaction of lr and alpha_attn</h2>" in page
    assert f"transfer error {analysis.transfer_error(loss):.4f} (lr wrong)" in page


def test_a_line_is_of_what_was_moved_alone(tmp_path):
    """What a sampler drew at many LRs is no line; what an independent search moved is, with the config's own value."""
    drawn = searched(tmp_path / "tpe", bowl(lr=(2.0, 1.0)), strategy="tpe", trials=12,
                     space={"lr": (0.25, 4.0), "alpha_res": (0.25, 4.0)})  # fmt: skip
    assert all(len(line) == 1 for line in analysis.lines(drawn, {"alpha_res": 1.0}).values())
    moved = searched(tmp_path / "lines", bowl(lr=(2.0, 1.0), alpha_res=(4.0, 0.3)), strategy="independent",
                     space={"lr": POWERS, "alpha_res": POWERS})  # fmt: skip
    assert sum(trial["point"].get("alpha_res") == 1.0 for trial in moved["trials"]) == 0
    lines = analysis.lines(moved, {"alpha_res": 1.0})
    assert lines["alpha_res"] == pytest.approx({v: 2 + 0.3 * (math.log2(v) - 2) ** 2 for v in POWERS})
    assert set(lines["lr"]) == set(POWERS)
    assert 1.0 not in analysis.lines(moved)["alpha_res"]  # nobody said what the config's own was


def test_searches_beside_each_other(tmp_path):
    for width, best in ((64, 2.0), (128, 2.0), (256, 4.0)):
        searched(tmp_path / f"w{width}", bowl(lr=(best, 1.0)), width=width, space={"lr": POWERS})
    page = write_report(tmp_path / "w64", beside=[tmp_path / "w128", tmp_path / "w256"]).read_text()
    for text in ("<h2>Optimum against size</h2>", "width 128, w128", "lr (w256)", "<h2>The searches</h2>", "<td>w256</td>"):
        assert text in page
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="only sweeps"):
        write_report(tmp_path / "w64", beside=[tmp_path / "run"])
    with pytest.raises(CheckpointError, match="no such folder"):
        write_report(tmp_path / "w64", beside=[tmp_path / "w12"])


def test_a_per_module_search_shows_its_factors_and_the_contenders(tmp_path):
    values = {"strategy": "trust-region", "trials": 41, "space": {}, "modules": {"hps": ["lr", "residual"], "reach": 8.0}}
    data = searched(tmp_path / "m", bowl(**{"lr/head": (4.0, 1.0), "lr@0": (0.5, 0.5)}), **values)
    interval = {"low": 2.0, "high": 2.2, "count": 3}
    data["confidence"] = {"settled": False, "gap": None, "contenders": [
        {"point": data["best"], "mean": 2.1, "losses": {}, **interval}, {"point": {}, "mean": 2.15, "losses": {}, **interval}]}  # fmt: skip
    data["trials"][3] |= {"state": "failed", "error": "a <word> of why"}
    (tmp_path / "m" / "study.json").write_text(json.dumps(data))
    page = write_report(tmp_path / "m").read_text()
    for text in ("The winner&#x27;s factors", "The winner's factors"):
        if f"<h2>{text}</h2>" in page:
            break
    else:
        raise AssertionError
    for text in ("<td>head</td>", "l/L = 0", "The same by hyperparameter", "cannot be told from the second", "a &lt;word&gt; of why"):
        assert text in page
