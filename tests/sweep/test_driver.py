"""The driver's promises, with objectives that cost nothing: budgets, failures, pruning, resume, interruption, winners."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import optuna
import pytest
from sweep_objectives import bowl, workers
from test_crash import driver, wait_for

from isoscale._base.errors import CheckpointError, ConfigError, IsoscaleError
from isoscale.config import RunConfig
from isoscale.sweep import Study, load, sweep
from isoscale.sweep.budget import ENOUGH, Budget, enough, run_tokens
from isoscale.sweep.driver import Driver
from isoscale.sweep.job import Job
from isoscale.sweep.store import url
from isoscale.sweep.strategies.base import Trial

LRS = (0.5, 1.0, 2.0, 4.0, 8.0)


def config(**values):
    return RunConfig().with_values(**{"sweep.executor": "inline", "sweep.space": {"lr": LRS}, **values})


def drawn(trials, **values):
    space = {"lr": (0.1, 16.0), "weight_decay": (0.01, 0.3)}
    return config(**{"sweep.strategy": "random", "sweep.trials": trials, "sweep.space": space, **values})


def run(settings, out, objective="bowl", **rest):
    return sweep(settings, out, objective=f"sweep_objectives:{objective}", **rest)


def by_lr(result):
    return {trial.point["lr"]: trial for trial in result.trials}


def stored(out):
    return optuna.load_study(study_name="isoscale", storage=url(out)).get_trials()


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_any_function_can_be_searched_and_the_storage_shows_it(executor, tmp_path):
    result = run(config(**{"sweep.executor": executor, "sweep.seeds": [0, 1]}), tmp_path)
    expected = {(lr, seed): bowl(Job("", {"lr": lr}, seed, "", "", ""), None) for lr in LRS for seed in (0, 1)}
    assert {(t.point["lr"], t.seed): t.loss for t in result.trials} == expected
    assert result.best == {"lr": 2.0}
    assert load(tmp_path).to_dict() == result.to_dict()
    trials = stored(tmp_path)
    assert {t.user_attrs["id"] for t in trials} == {t.id for t in result.trials}
    assert all(t.params == t.user_attrs["point"] and t.distributions["lr"].log for t in trials)
    assert {"id", "point", "seed", "seconds", "tokens", "folder"} <= trials[0].user_attrs.keys()
    data = json.loads((tmp_path / "study.json").read_text())
    assert data["format"] == 2
    assert data["finished"] is True
    assert data["search"]["space"] == {"lr": list(LRS)}
    assert data["spent"]["runs"] == 10


def test_workers_do_not_load_torch_before_a_job_does(tmp_path):
    assert run(config(**{"sweep.executor": "processes"}), tmp_path, "torch_free").loss == 0.5


def test_a_drivers_strategy_sees_points_not_seeds_and_dead_ends_are_dead(tmp_path):
    result = run(config(), tmp_path, "outcome")
    assert {lr: t.loss for lr, t in by_lr(result).items()} == {0.5: 1, 1: 1, 2: 1, 4: math.inf, 8: math.inf}
    assert by_lr(result)[4.0].diverged == "w"
    assert by_lr(result)[0.5].seconds == 7.0


def test_runs_that_fail_are_rows_and_too_many_end_the_search(tmp_path):
    result = run(config(), tmp_path / "some", "some_fail")
    assert [lr for lr, t in sorted(by_lr(result).items()) if t.state == "failed"] == [4.0, 8.0]
    assert by_lr(result)[4.0].error == "ValueError: no model at 4"
    with pytest.raises(IsoscaleError, match="3 points failed, for example trial") as error:
        run(config(), tmp_path / "all", "always_fails")
    assert str(error.value).count("nothing works") == 1
    assert "Traceback" not in str(error.value)
    assert [t.state.name for t in stored(tmp_path / "all")].count("FAIL") == 3  # the other two never ran
    with pytest.raises(ConfigError, match="the first error: ValueError: nothing works"):
        run(config(**{"sweep.space": {"lr": (1.0, 2.0)}}), tmp_path / "both", "always_fails")


def test_a_resumed_search_tries_failed_trials_again_and_only_those(tmp_path):
    run(config(), tmp_path, "some_fail")
    again = run(config(), tmp_path, "some_fail", resume=True)
    assert {lr: t.attempts for lr, t in by_lr(again).items()} == {0.5: 1, 1.0: 1, 2.0: 1, 4.0: 2, 8.0: 2}
    assert len(again.trials) == 5


@pytest.mark.parametrize(("change", "words"), [
    ({"sweep.space": {"lr": (0.5, 1.0)}}, r"space.lr: \[0.5, 1.0, 2.0, 4.0, 8.0\] -> \[0.5, 1.0\]"),
    ({"sweep.space": {"lr": LRS, "eps": (1e-8, 1e-6)}, "sweep.strategy": "grid"}, "strategy: lr -> grid; space.eps: not"),
    ({"sweep.storage": "sqlite:////tmp/other.db"}, "storage:  -> sqlite:////tmp/other.db"),
])  # fmt: skip
def test_another_search_is_refused_by_name(change, words, tmp_path):
    run(config(), tmp_path)
    with pytest.raises(CheckpointError, match=words):
        run(config(**change), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="objective: sweep_objectives:bowl -> sweep_objectives:outcome"):
        run(config(), tmp_path, "outcome", resume=True)


def test_other_formats_are_refused_and_other_versions_told(tmp_path):
    run(config(), tmp_path)
    path = tmp_path / "study.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "version": "0.0.1"}))
    assert "begun with isoscale 0.0.1" in run(config(), tmp_path, resume=True).warnings[0]
    path.write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(CheckpointError, match="another format"):
        run(config(), tmp_path, resume=True)
    path.unlink()  # a sweep from before there were such files
    with pytest.raises(CheckpointError, match="another format"):
        run(config(), tmp_path, resume=True)


def test_two_processes_in_one_folder_and_two_studies_are_refused(tmp_path):
    def during(status):
        if not refused:
            try:
                run(config(), tmp_path, resume=True, objective="curves")
            except CheckpointError as error:
                refused.append(error.message)

    refused = []
    run(config(), tmp_path, on_status=during, objective="curves")
    assert refused == ["another process works here"]
    with pytest.raises(CheckpointError, match="holds a sweep already"):
        run(config(), tmp_path)


def test_budgets_in_runs_tokens_flops_and_seconds(tmp_path):
    one = run_tokens(config())
    assert len(run(config(**{"sweep.budget_runs": 2}), tmp_path / "runs").trials) == 2
    cut = run(config(**{"sweep.budget_tokens": 3.5 * one}), tmp_path / "tokens")
    assert (len(cut.trials), cut.stopped) == (3, "sweep.budget_tokens")
    assert len(run(config(), tmp_path / "tokens", resume=True).trials) == 5
    with pytest.raises(ConfigError, match="pays for no run") as error:
        run(config(**{"sweep.budget_flops": 10}), tmp_path / "flops")
    assert error.value.key == "sweep.budget_flops"
    assert not (tmp_path / "flops").exists()
    begun = time.monotonic()
    late = run(drawn(400, **{"sweep.budget_seconds": 1.0}), tmp_path / "seconds", "curves")
    assert late.stopped == "sweep.budget_seconds"
    assert time.monotonic() - begun < 8
    assert 0 < len(late.trials) < 100
    rest = run(drawn(400, **{"sweep.budget_seconds": 0.5}), tmp_path / "seconds", "curves", resume=True)
    assert len(rest.trials) <= len(late.trials) + 1  # earlier sessions count


def test_the_estimate_is_an_upper_bound_and_says_what_cuts_it():
    one = run_tokens(config())
    budget = Budget(config(**{"sweep.seeds": [0, 1], "sweep.confirm_seeds": 2}), one, 1e6)
    assert (budget.estimate().runs, budget.estimate().tokens) == (5 * 2 + 3 * 2, 16 * one)
    small = Budget(config(**{"sweep.budget_runs": 4}), one, 1e6).estimate()
    assert str(small) == f"at most 4 runs, {4 * one:.3g} tokens, 4e+06 FLOPs (cut by sweep.budget_runs)"
    endless = config(**{"sweep.strategy": "coordinate"})
    assert Budget(endless, one, math.nan).estimate().runs is None


def test_enough_needs_29_points_without_a_gain():
    settings = drawn(60, **{"sweep.enough": 0.01})
    trials = [Trial({"lr": 1.0}, "done", 2.0)] + [Trial({"lr": 1.0}, "done", 3.0)] * ENOUGH
    assert math.ceil(math.log(0.05) / math.log(0.9)) == ENOUGH
    assert enough(settings, trials)
    assert not enough(settings, trials[:-1])
    assert not enough(settings, [*trials[:-1], Trial({"lr": 1.0}, "done", 1.98)])
    assert enough(settings, [*trials[:-1], Trial({"lr": 1.0}, "done", 1.995)])
    assert not enough(drawn(60), trials)
    assert not enough(config(**{"sweep.enough": 0.01}), trials)  # a line is not drawn


def test_a_search_stops_when_it_is_enough(tmp_path):
    result = run(drawn(200, **{"sweep.enough": 50.0}), tmp_path)
    assert result.stopped == "sweep.enough"
    assert len(result.trials) == ENOUGH + 1


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_hopeless_trials_are_pruned_at_a_rung_and_cost_less(executor, tmp_path):
    settings = drawn(30, **{"sweep.prune": "median", "sweep.executor": executor})
    result = run(settings, tmp_path, "curves")
    pruned = [t for t in result.trials if t.state == "pruned"]
    full = run(drawn(30), tmp_path / "full", "curves")
    assert 5 <= len(pruned) < 25
    assert result.best == full.best
    assert all(0 < t.tokens < run_tokens(settings) for t in pruned)
    trials = {t.user_attrs["id"]: t for t in stored(tmp_path)}
    assert all(trials[t.id].state.name == "PRUNED" for t in pruned)
    assert all(max(trials[t.id].intermediate_values) == t.tokens for t in pruned)
    assert not [t for t in full.trials if t.state == "pruned"]  # control: no rule, no pruning


def test_the_best_are_confirmed_on_fresh_seeds(tmp_path):
    settings = config(**{"sweep.seeds": [0, 4], "sweep.confirm": 2, "sweep.confirm_seeds": 3})
    result = run(settings, tmp_path)
    fresh = [t for t in result.trials if t.confirm]
    assert {t.seed for t in fresh} == {5, 6, 7}
    assert len(fresh) == 6
    assert result.best == {"lr": 2.0}
    assert result.loss == pytest.approx(sum(t.loss for t in fresh if t.point["lr"] == 2.0) / 3)
    assert result.confidence.settled
    assert result.confidence.gap.mean == pytest.approx(1.0, abs=0.05)
    again = run(settings, tmp_path, resume=True)
    assert len(again.trials) == len(result.trials)
    assert load(tmp_path).confidence == result.confidence
    assert json.loads((tmp_path / "study.json").read_text())["confidence"]["settled"] is True


def test_a_study_can_be_opened_and_asked(tmp_path):
    run(config(**{"sweep.budget_runs": 2}), tmp_path)
    study = Study.open(tmp_path)
    assert study.objective == "sweep_objectives:bowl"
    assert len(study.trials) == 2
    more = Study(config(), tmp_path, objective=study.objective).run()
    assert len(more.trials) == len(study.trials) == 5
    assert study.best == {"lr": 2.0}
    with pytest.raises(CheckpointError, match="no sweep here"):
        Study.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["no_such_module:f", "sweep_objectives:nothing", "sweep_objectives", "math:pi"])
def test_objectives_that_are_none(name, tmp_path):
    with pytest.raises(ConfigError) as error:
        sweep(config(), tmp_path / "x", objective=name)
    assert error.value.key == "objective"
    assert not (tmp_path / "x").exists()


def test_an_address_of_ray_needs_ray(tmp_path):
    with pytest.raises(ConfigError, match="the executor is another"):
        run(config(**{"sweep.ray_address": "auto"}), tmp_path)


def test_ray_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IsoscaleError, match="`ray`") as error:
        run(config(**{"sweep.executor": "ray"}), tmp_path)
    assert error.value.hint == 'pip install "isoscale[ray]"'


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "times"), [("forever", 1), ("stubborn", 2)])
def test_an_interruption_saves_and_a_second_kills_at_once(objective, times, tmp_path):
    process = driver(tmp_path, "sweep.workers=2", objective=objective)
    wait_for(lambda: len(list(tmp_path.glob("trials/*/started"))) == 2)
    left = workers(process.pid)
    begun = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=20)
    assert time.monotonic() - begun < 15
    assert len(list(tmp_path.glob("trials/*/saved"))) == (2 if times == 1 else 0)
    assert len(left) == 2
    assert not [pid for pid in left if subprocess.run(["kill", "-0", str(pid)], capture_output=True).returncode == 0]
    states = {t.state.name for t in stored(tmp_path)}
    assert states == {"WAITING"}  # nobody runs them now


def test_the_driver_stays_short():
    """What the loop must not become."""
    assert len([name for name in vars(Driver) if not name.startswith("__")]) < 30


def test_the_configs_own_values_may_win(tmp_path):
    """The first point of a drawing strategy is the config itself: an empty point, which is not no point."""
    space = {"lr": (0.1, 100.0), "weight_decay": (1e-4, 10.0)}
    own = {"hps.lr": 2.0, "hps.weight_decay": 0.05}
    result = run(config(**{"sweep.strategy": "tpe", "sweep.trials": 4, "sweep.space": space, **own}), tmp_path, "own_wins")
    assert (dict(result.best), result.loss) == ({}, 0.0)
    assert load(tmp_path).best == {}


def test_a_strategy_that_only_repeats_itself_ends_the_search(tmp_path, monkeypatch):
    class Stuck:
        def ask(self, trials, count):
            return [{"lr": 1.0}]

    monkeypatch.setattr("isoscale.sweep.study.make_strategy", lambda config, space: Stuck())
    result = run(config(), tmp_path)
    assert len(result.trials) == 1
    assert result.stopped.startswith("repetition")


@pytest.mark.parametrize(("visible", "device", "wanted"), [
    (None, "auto", {0.0, 1.0}), ("4,6", "cuda", {4.0, 6.0}), ("4,6", "cpu", {46.0}), (None, "cpu", {-1.0}),
])  # fmt: skip
def test_workers_are_spread_over_the_cards(tmp_path, monkeypatch, visible, device, wanted):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = config(**{"sweep.executor": "processes", "sweep.workers": 3, "train.device": device,
                         "sweep.space": {"lr": (1.0, 2.0, 4.0)}})  # fmt: skip
    result = run(settings, tmp_path, objective="three_at_once")
    assert {t.loss for t in result.trials} == wanted
