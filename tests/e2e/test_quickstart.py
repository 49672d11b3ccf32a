"""The main job through the command line, tiny: every number it prints is recomputed from metric rows."""

import json
import math

import pytest

from isoscale._base.log import read
from isoscale.cli import main
from isoscale.config import load
from isoscale.train.folder import read_config

TINY = ["model.width=16", "model.head_size=8", "model.depth=1", "train.steps=10", "train.batch=4", "data.seq_len=32",
        "train.eval_batches=2", "train.eval_every=4", "train.checkpoint_every=4",
        "sweep.space={lr=[1.0, 4.0, 16.0]}"]  # fmt: skip
SETS = [part for text in TINY for part in ("--set", text)]


def words(seed, count=1200):
    return " ".join(f"w{(i * seed + i // 7) % 53} says {chr(97 + (i * seed) % 26) * 3}," for i in range(count))


def quickstart(folder, seed, *flags):
    text = folder / "text.txt"
    text.write_text(words(seed))
    return main(["quickstart", "--data", str(text), "--out", str(folder / "job"), "--seed", str(seed),
                 "--target-width", "64", *SETS, *flags])  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    assert quickstart(folder, 3, "--quiet") == 0
    return folder


def result_of(folder):
    return json.loads((folder / "job" / "result.json").read_text())


def final(run):
    """The loss after the last step, straight from the rows; none: it diverged."""
    steps = json.loads((run / "run.json").read_text())["train"]["steps"]
    rows = [row for row in read(run / "metrics.jsonl") if row["kind"] == "eval" and row["step"] == steps]
    return rows[-1]["val_loss"] if rows else math.inf


@pytest.mark.slow
def test_every_number_is_in_the_metric_rows(job):
    result, out = result_of(job), job / "job"
    found = {}
    for kind in ("proxy", "sp_proxy"):
        runs = list((out / kind / "trials").iterdir())
        found[kind] = {read_config(run).hps.lr: final(run) for run in runs}
        assert {read_config(run).seed for run in runs} == {3}
        assert {read_config(run).model.width for run in runs} == {16}
    losses = {float(lr): loss for lr, loss in result["proxy"]["losses"].items()}
    assert losses == found["proxy"]
    assert set(losses) == {1.0, 4.0, 16.0}  # what was asked for
    assert result["lr"] == min(losses, key=losses.get)
    assert result["proxy"]["loss"] == losses[result["lr"]]
    target = result["target"]
    assert (target["loss_fp32"], target["loss_fp8"]) == (final(out / "target/fp32"), final(out / "target/fp8"))
    assert target["fp8_gap"] == target["loss_fp8"] - target["loss_fp32"] != 0
    assert (result["proxy"]["width"], target["width"], target["recipe"], target["backend"]) == (16, 64, "fp8", "emulated")
    for name in ("fp32", "fp8"):
        config = read_config(out / "target" / name)
        assert (config.hps.lr, config.model.width, config.seed) == (result["lr"], 64, 3)  # unchanged in base units
    sp = result["sp"]
    assert {float(lr): loss for lr, loss in sp["losses"].items()} == found["sp_proxy"]
    assert sp["proxy_loss"] == min(found["sp_proxy"].values()) == found["sp_proxy"][sp["lr"]]
    wide = {read_config(run).hps.lr: final(run) for run in (out / "target").glob("sp_*")}
    assert {float(lr): loss for lr, loss in sp["target_losses"].items()} == wide
    assert (sp["target_loss"], sp["target_best_loss"]) == (wide[sp["lr"]], min(wide.values()))
    assert result["seconds"] > 1
    assert any("width 16 is below" in text for text in result["warnings"])


@pytest.mark.slow
def test_the_page_shows_the_numbers(job):
    result = result_of(job)
    page = (job / "job" / "report.html").read_text()
    assert result["report"] == str(job / "job" / "report.html")
    for number in (result["proxy"]["loss"], result["target"]["loss_fp32"], result["target"]["loss_fp8"],
                   result["sp"]["proxy_loss"], result["sp"]["target_loss"]):  # fmt: skip
        assert f"{number:.4f}" in page


@pytest.mark.slow
def test_resume_after_the_end_trains_nothing_and_says_the_same(job, capsys):
    before = {path: path.stat().st_mtime_ns for path in job.rglob("metrics.jsonl")}
    first = result_of(job)
    capsys.readouterr()
    assert quickstart(job, 3, "--resume", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out) == first == result_of(job)
    assert {path: path.stat().st_mtime_ns for path in job.rglob("metrics.jsonl")} == before


@pytest.mark.slow
def test_nothing_is_canned_another_text_and_seed_give_other_numbers(job, tmp_path, capsys):
    assert quickstart(tmp_path, 4, "--quiet") == 0
    shown = capsys.readouterr().out
    one, two = result_of(job), result_of(tmp_path)
    assert one["target"]["loss_fp32"] != two["target"]["loss_fp32"]
    assert not set(one["proxy"]["losses"].values()) & set(two["proxy"]["losses"].values())
    assert not set(one["sp"]["losses"].values()) & set(two["sp"]["losses"].values())
    assert f"{two['target']['loss_fp8']:.4f}" in shown


def test_a_used_folder_and_settings_of_the_quickstarts_own_are_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "job" / "proxy").mkdir(parents=True)
    config = load(None, "", None, TINY).config
    (tmp_path / "job" / "proxy" / "run.json").write_text(config.model_dump_json())
    assert quickstart(tmp_path, 3) == 2
    assert "--resume" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    for flags, key in ((["--set", "rules.parametrisation=sp"], "rules.parametrisation"),
                       (["--set", "numerics.recipe=fp8"], "numerics.recipe"),
                       (["--set", "sweep.strategy=independent"], "sweep.strategy"),
                       (["--target-width", "60"], "model.width"), (["--target-width", "16"], "--target-width")):  # fmt: skip
        assert quickstart(other, 3, *flags) == 2
        assert key in capsys.readouterr().err
    assert not (other / "job").exists()
