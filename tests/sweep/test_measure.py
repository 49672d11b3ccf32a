"""How many workers: what is picked from which rates, and one measurement for real."""

import math
import subprocess
import sys

import pytest

from isoscale._base.errors import IsoscaleError
from isoscale.sweep import measure
from isoscale.sweep.measure import Measured, counts, pick, pick_workers


@pytest.mark.parametrize(("limit", "wanted"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])])
def test_counts_double_up_to_the_limit(limit, wanted):
    assert counts(limit) == wanted


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [({1: 10.0}, 1), ({1: 10.0, 2: 19.0}, 2), ({1: 10.0, 2: 10.4}, 1), ({1: 10.0, 2: 9.0}, 1),
     ({1: 10.0, 2: 20.0, 4: 20.5}, 2), ({1: 10.0, 2: 20.0, 4: 39.0, 8: 60.0}, 8)],
)  # fmt: skip
def test_a_larger_count_is_taken_for_more_throughput_only(rates, wanted):
    assert pick(rates) == wanted


def test_the_time_of_a_search():
    found = Measured(workers=2, seconds_per_step=0.05, rates={1: 20.0, 2: 40.0})
    assert int(found) == 2
    assert found.seconds(runs=16, steps=300) == pytest.approx(8 * 300 * 0.05)
    assert found.seconds(runs=17, steps=300) == pytest.approx(9 * 300 * 0.05)


class Fake:
    """Stands in for a process: answers what a count of processes is said to do."""

    table, alive, closed = {}, 0, 0

    def __init__(self, folder, number, cards):
        assert (folder / "run.json").exists()
        Fake.alive += 1
        self.ready = False

    def tell(self, line):
        assert float(line) > 0

    def hear(self):
        if not self.ready:
            self.ready = True
            if Fake.table[Fake.alive] is None:
                raise IsoscaleError("out of memory")
            return "ready"
        return str(Fake.table[Fake.alive] / Fake.alive)

    def close(self):
        Fake.closed += 1


@pytest.mark.parametrize(
    ("table", "wanted", "started"),
    [({1: 10, 2: 20, 4: 40, 8: 40}, 4, 8), ({1: 10, 2: 9}, 1, 2), ({1: 10, 2: 20, 4: None}, 2, 4)],
)
def test_it_stops_where_more_does_not_help_or_does_not_fit(tiny, monkeypatch, table, wanted, started):
    monkeypatch.setattr(measure, "_Process", Fake)
    monkeypatch.setattr(Fake, "table", table)
    monkeypatch.setattr(Fake, "alive", 0)
    monkeypatch.setattr(Fake, "closed", 0)
    said = []
    found = pick_workers(tiny(), 8, on_line=said.append)
    assert (int(found), Fake.alive, Fake.closed) == (wanted, started, started)
    assert found.seconds_per_step == pytest.approx(wanted / table[wanted])
    assert len(said) == len([n for n in (1, 2, 4, 8) if n <= started])


def test_a_run_that_cannot_start_at_all_says_why(tiny):
    with pytest.raises(IsoscaleError, match=r"a measured run ended: .*no-such-file"):
        pick_workers(tiny(**{"data.source": "no-such-file.txt"}), 1)


def test_a_command_of_its_own_is_not_measured(tiny, monkeypatch):
    monkeypatch.setattr(measure, "_Process", None)
    found = pick_workers(tiny(**{"sweep.command": ("python", "train.py")}), 3)
    assert int(found) == 3
    assert math.isnan(found.seconds_per_step)


def test_one_worker_for_real_leaves_no_process_behind(tiny, monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: started.append(real(*args, **kw)) or started[-1])
    monkeypatch.setattr(measure, "WINDOW", 0.2)
    found = pick_workers(tiny(), 1)
    assert found.rates[1] > 0
    assert len(started) == 1
    assert started[0].args[0] == sys.executable
    assert started[0].poll() is not None
