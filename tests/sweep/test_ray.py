"""The Ray executor: one cluster for the tests, small and quiet."""

from __future__ import annotations

import pytest
from sweep_objectives import bowl

from isoscale._base.errors import StorageError
from isoscale.config import RunConfig
from isoscale.sweep import sweep
from isoscale.sweep.job import Job

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow


def config(**values):
    return RunConfig().with_values(**{"sweep.executor": "ray", "sweep.workers": 2, **values})


@pytest.fixture(scope="module")
def cluster():
    """A cluster that searches join, so that each need not start one."""
    import os
    from pathlib import Path

    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init("local", num_cpus=3, num_gpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False,
             logging_level="CRITICAL", runtime_env={"env_vars": {"PYTHONPATH": path}})  # fmt: skip
    yield
    ray.shutdown()


def test_a_search_on_ray_finds_what_any_other_finds(cluster, tmp_path):
    settings = config(**{"sweep.space": {"lr": (0.5, 1.0, 2.0, 4.0, 8.0)}})
    result = sweep(settings, tmp_path, objective="sweep_objectives:bowl")
    assert {t.point["lr"]: t.loss for t in result.trials} == {
        t.point["lr"]: bowl(Job("", t.point, t.seed, "", "", ""), None) for t in result.trials}  # fmt: skip
    assert ray.is_initialized()  # a cluster that was there stays


def test_errors_and_pruning_on_ray(cluster, tmp_path):
    space = {"lr": (0.1, 16.0), "weight_decay": (0.01, 0.3)}
    settings = config(**{"sweep.strategy": "random", "sweep.trials": 24, "sweep.prune": "median", "sweep.space": space,
                         "sweep.max_failures": 30})  # fmt: skip
    result = sweep(settings, tmp_path / "prune", objective="sweep_objectives:curves")
    assert {t.state for t in result.trials} == {"done", "pruned"}
    failed = sweep(settings, tmp_path / "fail", objective="sweep_objectives:some_fail")
    bad = [t for t in failed.trials if t.state == "failed"]
    assert {t.point["lr"] > 3 for t in bad} == {True}
    assert all(t.error.startswith("ValueError: no model at") for t in bad)
    assert all(t.attempts == 1 for t in failed.trials)  # an error is no death


def test_a_training_run_on_ray_equals_one_in_a_process(cluster, tiny, tmp_path):
    space = {"sweep.space": {"lr": (1.0, 2.0)}, "sweep.workers": 2}
    result = sweep(tiny(**space, **{"sweep.executor": "ray"}), tmp_path / "ray")
    calm = sweep(tiny(**space, **{"sweep.executor": "processes"}), tmp_path / "processes")
    assert {t.id: t.loss for t in result.trials} == {t.id: t.loss for t in calm.trials}


def test_trials_share_the_cards(cluster, tmp_path):
    """Three workers, two cards (Ray counts what it is told): half a card each, all three at once."""
    settings = config(**{"sweep.workers": 3, "sweep.space": {"lr": (1.0, 2.0, 4.0)}})
    result = sweep(settings, tmp_path, objective="sweep_objectives:three_at_once")
    assert {t.loss for t in result.trials} == {0.0, 1.0}  # the cards that they saw
    blind = config(**{"sweep.workers": 3, "sweep.space": {"lr": (1.0, 2.0, 4.0)}, "train.device": "cpu"})
    assert {t.loss for t in sweep(blind, tmp_path / "cpu", objective="sweep_objectives:three_at_once").trials} == {-1.0}


def test_a_cluster_that_is_not_there(tmp_path):
    ray.shutdown()
    with pytest.raises(StorageError, match="cannot be reached") as error:
        sweep(config(**{"sweep.ray_address": "127.0.0.1:1"}), tmp_path, objective="sweep_objectives:bowl")
    assert error.value.key == "sweep.ray_address"
