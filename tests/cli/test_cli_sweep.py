"""isoscale sweep: its flags, what it prints, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isoscale.cli import main
from isoscale.cli.sweep import _points, closing, table
from isoscale.config import RunConfig
from isoscale.sweep.result import TrialRow, load, summarise
from isoscale.sweep.space import identity

TINY = ["--set", "model.width=16", "--set", "model.head_size=8", "--set", "model.depth=1", "--set", "data.seq_len=32",
        "--set", "train.steps=8", "--set", "train.batch=4", "--set", "train.eval_batches=2", "--executor", "inline"]  # fmt: skip


def sweep(small_text, out, *words):
    return main(["sweep", *TINY, "--data", str(small_text), "--out", str(out), *words])


def test_flags_are_settings(small_text, tmp_path, capsys):
    words = ["--strategy", "random", "--runs", "4", "--set", "sweep.seeds=[0,1]", "--budget-tokens", "1e5",
             "--budget-flops", "1e15", "--workers", "auto", "--json", "--quiet"]  # fmt: skip
    assert sweep(small_text, tmp_path / "s", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trials"]) == 4  # two points, two seeds
    saved = RunConfig.model_validate_json((tmp_path / "s" / "run.json").read_text()).sweep
    assert (saved.trials, saved.budget_runs, saved.workers, saved.executor) == (2, 4, "auto", "inline")
    study = json.loads((tmp_path / "s" / "study.json").read_text())
    assert study["budget"] == {"runs": 4, "tokens": 1e5, "flops": 1e15, "seconds": None}
    assert study["spent"]["tokens"] == 4 * 8 * 4 * 32


def test_the_estimate_comes_first_and_the_budget_is_named(small_text, tmp_path, capsys):
    assert sweep(small_text, tmp_path / "s", "--set", "sweep.space={lr=[1.0, 2.0, 4.0]}", "--runs", "2") == 0
    said = capsys.readouterr()
    assert "estimate: at most 2 runs, 2.05e+03 tokens" in said.err
    assert "cut by sweep.budget_runs" in " ".join(said.err.split())
    assert "stopped early by sweep.budget_runs" in said.out


def test_a_resumed_search_needs_no_flags_again_and_other_flags_are_another_search(small_text, tmp_path, capsys):
    words = ["--strategy", "random", "--runs", "2", "--set", "sweep.space={lr=[1.0, 4.0]}", "--quiet"]
    assert sweep(small_text, tmp_path / "s", *words) == 0
    assert main(["sweep", "--out", str(tmp_path / "s"), "--resume", "--quiet", "--json"]) == 0
    first = capsys.readouterr().out
    assert len(json.loads(first.splitlines()[-1])["trials"]) == 2
    assert main(["sweep", "--out", str(tmp_path / "s"), "--resume", "--runs", "3", "--quiet", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 3  # a larger number of runs goes on
    wrong = ["sweep", "--out", str(tmp_path / "s"), "--resume", "--quiet", "--set", "model.depth=2"]
    assert main(wrong) == 2
    assert "model.depth" in capsys.readouterr().err


@pytest.mark.parametrize(("runs", "seeds", "confirm", "wanted"), [
    (8, 1, 2, 2), (9, 1, 2, 3), (20, 1, 2, 14), (6, 2, 0, 3), (1, 1, 3, 1), (12, 2, 1, 4),
])  # fmt: skip
def test_runs_are_shared_between_points_and_their_confirmation(runs, seeds, confirm, wanted):
    section = RunConfig().with_values(**{
        "sweep.seeds": tuple(range(seeds)), "sweep.confirm_seeds": confirm, "sweep.confirm": 3,
    }).sweep  # fmt: skip
    found = _points(runs, section)
    assert found == wanted
    assert found == 1 or found * seeds + min(found, 3) * confirm <= runs


def test_the_best_at_an_end_is_said_of_every_number(small_text, tmp_path, capsys):
    space = "sweep.space={lr=[1.0, 2.0, 4.0], alpha_res=[0.25, 1.0, 4.0]}"
    assert sweep(small_text, tmp_path / "s", "--strategy", "independent", "--set", space, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    points = [trial["point"] for trial in found["trials"]]
    assert len(points) == 5
    assert not any(point.get("alpha_res") == 1.0 for point in points)  # the config's own: the line's run was that
    at_end = found["best"].get("alpha_res", 1.0) in (0.25, 4.0)
    assert any("best alpha_res is at an end" in text for text in found["warnings"]) == at_end
    assert at_end  # eight steps of a tiny model: otherwise this tests nothing
    saved = json.loads((tmp_path / "s" / "study.json").read_text())
    assert load(tmp_path / "s").warnings == tuple(saved["warnings"])  # once, however often it is read


@pytest.mark.parametrize(("words", "told"), [
    (["--workers", "0"], ["--workers", "above zero"]), (["--workers", "many"], ["--workers", "'many'"]),
    (["--strategy", "bayes"], ["sweep.strategy", "bayes"]), (["--executor", "slurm"], ["sweep.executor", "'ray'"]),
    (["--storage", "postgresql://me:hush@127.0.0.1:9/db"], ["refuses", "does it run", "me:***@"]),
    (["--storage", "what"], ["no database URL"]), (["--budget-flops", "3"], ["pays for no run", "budget_flops"]),
    (["--budget-tokens", "-1"], ["sweep.budget_tokens"]), (["--runs", "0"], ["--runs"]),
    (["--set", "sweep.space={alpha_rez=[1.0]}", "--runs", "3"], ["where: --set sweep.space=", "did you mean alpha_res"]),
    (["--set", 'modules."lr/attn.zz"=0.5'], ["lr/attn.zz"]), (["--budget-tokens", "10"], ["one costs 1024 tokens"]),
    (["--set", "sweep.space={lr=[-1.0, 1.0]}"], ["start it at 1e-4 or so"]),
    (["--set", "sweep.ray_address=auto"], ["the executor is another"]),
    (["--set", 'sweep.command=["/no/such/program"]', "--set", "sweep.max_failures=1"], ["cannot be started"]),
])  # fmt: skip
def test_refusals_are_words_on_one_screen(words, told, small_text, tmp_path, capsys):
    assert sweep(small_text, tmp_path / "s", "--quiet", *words) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in told), error
    assert "Traceback" not in error
    assert "hush" not in error
    assert len(error.splitlines()) <= 12


def result(points, losses, **more):
    rows = tuple(TrialRow(identity(p, 0), p, 0, "done", x, 1.0, 1) for p, x in zip(points, losses))
    return summarise(Path("runs/s"), RunConfig(), rows + tuple(more.pop("extra", ())), **more)


def test_points_of_forty_factors_still_fit_a_screen():
    names = [f"lr/attn.q@{k / 40:g}" for k in range(40)]
    points = [{name: 2.0 ** (0.37 * i + j / 7) for j, name in enumerate(names)} for i in range(3)]
    found = result(points, [3.0, 2.0, 2.5])
    lines = [*table(found).splitlines(), *closing(found, 256).splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(found.trials[1].id)  # the best comes first
    assert all(name in "\n".join(lines) for name in names)  # in full, once
    assert sum(f"{names[0]}=" in line for line in lines) == 1


def test_states_reasons_and_confidence_are_shown():
    bad = TrialRow("x", {"lr": 8.0}, 0, "failed", float("nan"), 0.0, 1, error="ValueError: no\nmore")
    fresh = [TrialRow(f"f{lr}{seed}", {"lr": lr}, seed, "done", lr + seed / 100, 1.0, 1, confirm=True)
             for lr in (1.0, 2.0) for seed in (5, 6, 7)]  # fmt: skip
    found = result([{"lr": 1.0}, {"lr": 2.0}], [2.0, 2.1], extra=[bad, *fresh], stopped="sweep.enough", warnings=("old",))
    text = table(found) + "\n" + closing(found, 256)
    assert "failed\n  ValueError: no\n" in text
    assert text.count("confirms") == 6
    assert "confirmed on 3 fresh seeds: 1.0600" in text
    assert "the second is 1.0000 worse" in text
    assert "settled" in text
    assert "stopped early by sweep.enough" in text
    assert "warning: old" in text


def test_a_failed_search_says_the_reason_once(small_text, tmp_path, capsys):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "trials").write_text("a file in the way")
    assert sweep(small_text, tmp_path / "s", "--quiet", "--set", "sweep.space={lr=[1.0, 2.0, 4.0, 8.0]}") == 2
    error = capsys.readouterr().err
    assert "3 points failed" in error
    assert "--resume tries again" in error
