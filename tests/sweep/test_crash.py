"""Searches under fire: workers, drivers and Ray's processes are killed, and nothing is lost, doubled or invented."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from servers import postgres
from sweep_objectives import workers

from isoscale.config import RunConfig
from isoscale.sweep import load, sweep

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in /proc")]

GRID = {"lr": tuple(2.0**e for e in range(-6, 10)), "weight_decay": tuple(0.05 * 2.0**e for e in range(-5, 5))}
POINTS = 160  # 16 x 10: 20 trials for each of 8 workers


def grid(**values):
    return RunConfig().with_values(**{"sweep.strategy": "grid", "sweep.space": GRID, "sweep.workers": 8, **values})


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """What the search finds when nothing happens, without the waits."""
    out = tmp_path_factory.mktemp("calm")
    return sweep(grid(**{"sweep.executor": "inline"}), out, objective="sweep_objectives:bowl")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


class Killer(threading.Thread):
    """Kills a random one of some processes, again and again."""

    def __init__(self, find, every=2.0, until=20.0):
        super().__init__(daemon=True)
        self.find, self.every, self.until, self.killed = find, every, time.monotonic() + until, 0
        self.done = threading.Event()
        self.random = random.Random(0)

    def run(self):
        while time.monotonic() < self.until and not self.done.wait(self.every):
            found = self.find()
            if found:
                try:
                    os.kill(self.random.choice(found), signal.SIGKILL)
                    self.killed += 1
                except ProcessLookupError:
                    pass

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.done.set()
        self.join()


def losses(result):
    return {(trial.id, trial.seed): trial.loss for trial in result.trials}


def once(result, calm):
    """Every point ended exactly once, as in the calm run."""
    assert len(result.trials) == POINTS
    assert Counter(trial.state for trial in result.trials) == {"done": POINTS}
    assert losses(result) == losses(calm)
    assert (result.best, result.loss) == (calm.best, calm.loss)


def ends(out):
    """How often each trial was finished, by its own notes."""
    return Counter(len((folder / "ends").read_text().split()) for folder in (out / "trials").iterdir())


def stored(url, name):
    """States in the storage."""
    return Counter(trial.state.name for trial in optuna.load_study(study_name=name, storage=url).get_trials())


def test_a_worker_killed_every_two_seconds_sqlite(calm, tmp_path):
    with Killer(workers) as killer:
        result = sweep(grid(), tmp_path, objective="sweep_objectives:noted")
    assert killer.killed >= 3
    once(result, calm)
    again = [trial for trial in result.trials if trial.attempts > 1]
    assert len(again) >= killer.killed / 2  # the kills did hit trials
    assert sum(trial.attempts for trial in result.trials) == POINTS + sum(trial.attempts - 1 for trial in again)
    assert ends(tmp_path) == {1: POINTS}  # no trial was run to its end twice
    assert stored(f"sqlite:///{tmp_path}/study.db", "isoscale") == {"COMPLETE": POINTS}


def test_a_worker_killed_every_two_seconds_postgres(calm, tmp_path, database):
    with Killer(workers) as killer:
        result = sweep(grid(**{"sweep.storage": database, "seed": 0}), tmp_path, objective="sweep_objectives:noted")
    assert killer.killed >= 3
    once(result, calm)
    assert any(trial.attempts > 1 for trial in result.trials)
    assert ends(tmp_path) == {1: POINTS}
    assert "hush" not in (tmp_path / "study.json").read_text()  # the password


def test_control_a_worker_that_always_dies_is_given_up(tmp_path):
    config = RunConfig().with_values(**{"sweep.space": {"lr": (1.0, 2.0, 4.0)}, "sweep.workers": 2})
    result = sweep(config, tmp_path, objective="sweep_objectives:kills_itself")
    (bad,) = [trial for trial in result.trials if trial.state == "failed"]
    assert (bad.point, bad.attempts) == ({"lr": 2.0}, 4)
    assert bad.error == "its worker died 4 times, last by signal 9"
    assert sum(trial.state == "done" for trial in result.trials) == 2


def driver(out, *settings, objective="noted"):
    """A driver in a process of its own."""
    code = (
        "import sys; from isoscale.config import load; from isoscale.sweep import sweep\n"
        f"if __name__ == '__main__':\n    sweep(load(None, '', None, sys.argv[2:]).config, sys.argv[1],"
        f" resume=True, objective='sweep_objectives:{objective}')"
    )
    space = f"sweep.space={{lr={list(GRID['lr'])}, weight_decay={list(GRID['weight_decay'])}}}"
    words = [sys.executable, "-c", code, str(out), "sweep.strategy=grid", space, "sweep.workers=6", *settings]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def finished(out):
    return len(list(out.glob("trials/*/ends")))


def test_a_killed_driver_leaves_no_workers_and_resumes(calm, tmp_path):
    process = driver(tmp_path, "sweep.workers=8")
    wait_for(lambda: finished(tmp_path) >= 20)
    left = workers(process.pid)
    assert left
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), 10)
    before = finished(tmp_path)
    assert before < POINTS
    result = sweep(grid(), tmp_path, resume=True, objective="sweep_objectives:noted")
    once(result, calm)
    assert max(ends(tmp_path)) <= 2  # one that had ended while the driver died is run again, never more
    assert ends(tmp_path)[1] >= POINTS - 8


def test_two_drivers_share_one_study_and_one_survives_the_other(calm, tmp_path, database):
    storage = f"sweep.storage={database}"
    outs, seed = [tmp_path / "a", tmp_path / "b"], "train.steps=299"  # another config: a study of its own
    pair = [driver(out, storage, seed) for out in outs]
    wait_for(lambda: all(finished(out) >= 2 for out in outs))
    pair[0].kill()  # whether or not it leads: what it ran comes back after the grace
    pair[0].communicate()
    _, errors = pair[1].communicate(timeout=90)
    assert pair[1].returncode == 0, errors
    result = load(outs[1])
    once(result, calm)
    both = Counter(folder.name for out in outs for folder in (out / "trials").iterdir() if (folder / "ends").exists())
    assert set(both) == {trial.id for trial in result.trials}
    assert sum(count > 1 for count in both.values()) <= 4  # at most what was being written down when it died


def test_two_drivers_to_the_end_without_a_double(calm, tmp_path, database):
    outs, seed = [tmp_path / "a", tmp_path / "b"], "train.steps=298"
    pair = [driver(out, f"sweep.storage={database}", seed) for out in outs]
    for process in pair:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
    for out in outs:
        once(load(out), calm)
    runs = Counter(folder.name for out in outs for folder in (out / "trials").iterdir())
    assert set(runs.values()) == {1}
    assert len(runs) == POINTS
    assert min(finished(out) for out in outs) >= 20  # both worked


def ray_workers():
    """Processes that run a task of ours."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::_run" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_ray_worker_killed_every_two_seconds(calm, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    config = grid(**{"sweep.executor": "ray", "sweep.workers": 4})
    with Killer(ray_workers) as killer:
        result = sweep(config, tmp_path, objective="sweep_objectives:noted")
    assert killer.killed >= 2
    once(result, calm)
    assert any(trial.attempts > 1 for trial in result.trials)
    assert ends(tmp_path) == {1: POINTS}
