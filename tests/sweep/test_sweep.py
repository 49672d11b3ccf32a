"""Real sweeps of tiny models: end to end, interrupted, killed, diverged."""

import json
import math
import os
import signal

import optuna
import pytest
from sweep_objectives import workers

from isoscale._base.errors import CheckpointError, ConfigError, IsoscaleError
from isoscale._base.log import read
from isoscale.sweep import load, pool, sweep
from isoscale.sweep.store import url
from isoscale.train import train

LRS = (0.5, 2.0, 8.0)


@pytest.fixture(scope="module")
def proxy(tiny):
    return tiny(**{"sweep.space": {"lr": LRS}, "sweep.workers": 1, "seed": 3})


@pytest.fixture(scope="module")
def calm(proxy, tmp_path_factory):
    statuses = []
    out = tmp_path_factory.mktemp("calm") / "sweep"
    return sweep(proxy, out, on_status=statuses.append), statuses


def losses(result):
    return {trial.point["lr"]: trial.loss for trial in result.trials}


def test_a_sweep_end_to_end(calm, proxy, tmp_path):
    result, statuses = calm
    assert sorted(losses(result)) == sorted(LRS)
    assert {trial.seed for trial in result.trials} == {3}  # the run's own seed
    assert all(trial.state == "done" and trial.attempts == 1 for trial in result.trials)
    for trial in result.trials:
        rows = read(result.out / "trials" / trial.id / "metrics.jsonl")
        assert rows[-1]["val_loss"] == trial.loss
    alone = train(proxy.with_values(**{"hps.lr": 2.0}), tmp_path / "alone")
    assert losses(result)[2.0] == alone.val_loss  # a trial is the run that isoscale train makes
    assert result.loss == min(losses(result).values()) == losses(result)[result.best["lr"]]
    assert (statuses[-1].done, statuses[-1].total) == (3, 3)
    saved = json.loads((result.out / "study.json").read_text())
    assert saved["best"] == dict(result.best)
    assert load(result.out).best == result.best


def test_a_finished_sweep_resumes_to_the_same_and_trains_nothing(calm, proxy):
    result, _ = calm
    before = {path: path.stat().st_mtime_ns for path in result.out.glob("trials/*/metrics.jsonl")}
    again = sweep(proxy, result.out, resume=True)
    assert losses(again) == losses(result)
    assert {path: path.stat().st_mtime_ns for path in result.out.glob("trials/*/metrics.jsonl")} == before


def test_a_used_or_foreign_folder_is_refused(calm, proxy, tmp_path):
    with pytest.raises(CheckpointError, match="holds a sweep already"):
        sweep(proxy, calm[0].out)
    with pytest.raises(CheckpointError, match="another config"):
        sweep(proxy.with_values(**{"train.steps": 9}), calm[0].out, resume=True)
    with pytest.raises(CheckpointError, match="holds a sweep"):
        train(proxy, calm[0].out, resume=True)
    train(proxy, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a single run"):
        sweep(proxy, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="no sweep here"):
        load(tmp_path / "nothing")


def test_two_seeds_are_averaged_diverged_trials_are_infinite_and_the_edge_is_told(proxy, tmp_path):
    config = proxy.with_values(**{"sweep.seeds": [0, 1], "sweep.space": {"lr": (2.0, 8.0, 1e30)}})
    result = sweep(config, tmp_path)
    by = {}
    for trial in result.trials:
        by.setdefault(trial.point["lr"], []).append(trial.loss)
    assert all(len(found) == 2 for found in by.values())
    assert by[1e30] == [math.inf, math.inf]
    assert result.loss == sum(by[result.best["lr"]]) / 2
    assert result.edge == (result.best["lr"] == 2.0)
    text = (tmp_path / "study.json").read_text()
    assert "Infinity" not in text  # strict JSON
    assert '"inf"' in text


def test_every_trial_diverged_is_an_error_in_words(proxy, tmp_path):
    with pytest.raises(ConfigError, match="every run of the sweep diverged"):
        sweep(proxy.with_values(**{"sweep.space": {"lr": (1e30,)}}), tmp_path)


def test_a_cut_budget_runs_the_middle_and_more_budget_the_rest(proxy, calm, tmp_path):
    config = proxy.with_values(**{"sweep.budget_runs": 1})
    assert set(losses(sweep(config, tmp_path))) == {2.0}
    assert losses(sweep(proxy, tmp_path, resume=True)) == losses(calm[0])


def interrupt_when(condition):
    def on_status(status):
        if condition(status):
            raise KeyboardInterrupt

    return on_status


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_as_often_as_it_takes(proxy, calm, tmp_path):
    """Each interruption stops a worker politely; no number of them uses a trial up."""
    slow = proxy.with_values(**{"train.steps": 400, "train.eval_every": 400, "sweep.space": {"lr": (2.0,)}})
    started = lambda: any((tmp_path / "sweep").glob("trials/*/metrics.jsonl"))  # noqa: E731
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            sweep(slow, tmp_path / "sweep", resume=True, on_status=interrupt_when(lambda status: started()))
    result = sweep(slow, tmp_path / "sweep", resume=True)
    rows = [row for path in result.out.glob("trials/*/metrics.jsonl") for row in read(path)]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(400))
    assert result.loss == train(slow.with_values(**{"hps.lr": 2.0}), tmp_path / "alone").val_loss


@pytest.mark.slow
def test_a_killed_workers_trial_comes_back_and_continues(proxy, tmp_path):
    config = proxy.with_values(**{"train.steps": 300, "train.eval_every": 300, "train.checkpoint_every": 20,
                                  "sweep.space": {"lr": (2.0, 4.0)}})  # fmt: skip
    killed, out = [], tmp_path / "killed"

    def kill(status):
        if any(out.glob("trials/*/checkpoints/step_*")) and not killed:
            killed.append(next(iter(out.glob("trials/*/checkpoints/step_*"))).parents[1].name)
            for pid in workers():
                os.kill(pid, signal.SIGKILL)

    result = sweep(config, out, on_status=kill)
    assert len(killed) == 1
    victim = next(trial for trial in result.trials if trial.id == killed[0])
    assert (victim.state, victim.attempts) == ("done", 2)
    rows = read(out / "trials" / victim.id / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(300))
    calm = sweep(config, tmp_path / "calm")
    assert losses(result) == losses(calm)
    states = [t.state.name for t in optuna.load_study(study_name="isoscale", storage=url(out)).get_trials()]
    assert states == ["COMPLETE", "COMPLETE"]  # a trial that is started again is the same trial


@pytest.mark.slow
def test_an_error_in_a_trial_is_told_and_resume_tries_again(proxy, tmp_path, calm):
    from isoscale.sweep.space import identity

    (tmp_path / "trials").mkdir()
    blocked = tmp_path / "trials" / identity({"lr": LRS[0]}, 3)
    blocked.write_text("a file in the way")
    with pytest.raises(IsoscaleError, match="file, not a folder"):
        sweep(proxy.with_values(**{"sweep.max_failures": 1}), tmp_path)
    result = sweep(proxy.with_values(**{"sweep.max_failures": 2}), tmp_path, resume=True)
    row = next(trial for trial in result.trials if trial.state == "failed")
    assert "file, not a folder" in row.error
    assert sum(trial.state == "done" for trial in result.trials) == len(LRS) - 1
    blocked.unlink()
    assert losses(sweep(proxy, tmp_path, resume=True)) == losses(calm[0])


def test_independent_runs_on_a_pool(tiny, tmp_path):
    jobs = {"good": tiny(), "bad": tiny(**{"hps.lr": 1e30})}
    seen = []
    found = pool.run_all(jobs, tmp_path, workers=1, on_status=seen.append)
    assert found["bad"] == math.inf
    assert found["good"] == read(tmp_path / "good" / "metrics.jsonl")[-1]["val_loss"]
    assert (seen[-1].runs_done, seen[-1].runs) == (2, 2)


def test_a_run_that_a_pool_cannot_start_is_named(tiny, tmp_path):
    (tmp_path / "second").write_text("a file in the way")
    with pytest.raises(IsoscaleError, match=r"second: .*file, not a folder"):
        pool.run_all({"first": tiny(), "second": tiny()}, tmp_path, workers=2)
    assert pool.run_all({"first": tiny()}, tmp_path)["first"] > 0  # what was under way goes on


@pytest.mark.slow
def test_a_sweep_over_lmds_three(tiny, tmp_path):
    """Learning rate, then noise and pull at the best of it; what is not swept is LMD's own default in every trial."""
    space = {"lr": (0.05, 0.2), "sigma": (0.02, 0.5), "weight_decay": (0.003, 0.1)}
    config = tiny(**{"optim.name": "lmd", "sweep.strategy": "independent", "sweep.space": space, "sweep.workers": 1})
    result = sweep(config, tmp_path / "sweep")
    points = [set(trial.point) for trial in result.trials]
    assert points.count({"lr"}) == 2
    assert points.count({"lr", "sigma"}) == points.count({"lr", "weight_decay"}) == 2
    assert len({trial.loss for trial in result.trials}) == len(result.trials)
    for trial in result.trials:
        plan = json.loads((result.out / "trials" / trial.id / "plan.json").read_text())
        assert plan["hps"] == {**plan["hps"], "lr_rest": 12.0, "beta2": 0.99, **trial.point}
    alone = train(config.with_values(**{f"hps.{name}": value for name, value in result.best.items()}), tmp_path / "alone")
    assert alone.val_loss == result.loss
    with pytest.raises(IsoscaleError, match="by more than a factor e"):  # the default grid is AdamW's
        sweep(tiny(**{"optim.name": "lmd", "sweep.space": {"lr": (4.0,)}, "sweep.workers": 1}), tmp_path / "large")
