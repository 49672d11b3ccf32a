"""Trials that are commands: filled in, read back, refused in words, ended as a group."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import optuna
import pytest

from isoscale._base.errors import IsoscaleError
from isoscale.config import RunConfig
from isoscale.config import load as load_config
from isoscale.sweep import sweep
from isoscale.sweep.job import LAUNCH, Job, Pruned, Reporter, execute
from isoscale.sweep.store import url


def job(folder, *command, lr=2.0):
    config = RunConfig().with_values(**{"sweep.command": command, "hps.lr": lr, "modules": {"lr/attn.q@0.5": 2.0}})
    return Job("x", {"lr": lr}, 0, config.model_dump_json(), str(folder), LAUNCH)


def run(folder, *command, report=lambda share, loss: None, **rest):
    return execute(job(folder, *command, **rest), report)


def python(text):
    return sys.executable, "-c", text, "{config}", "{out}"


WRITES = "import json, sys; open(sys.argv[2] + '/result.json', 'w').write(json.dumps({'val_loss': %s}))"


def test_the_words_are_filled_in_and_the_config_is_whole(tmp_path):
    found = run(tmp_path, *python(WRITES % "1.5"))
    assert (found.state, found.loss) == ("done", 1.5)
    said = load_config(file=tmp_path / "trial.toml").config
    assert said == RunConfig.model_validate_json(job(tmp_path, *python(WRITES % "1.5")).config)
    assert json.loads((tmp_path / "trial.json").read_text())["point"] == {"lr": 2.0}
    assert run(tmp_path, *python(WRITES % "float('nan')")).loss == float("inf")


@pytest.mark.parametrize(("command", "words"), [
    (python("print('so far'); raise SystemExit('no data on this disk')"), "ended with 1: no data on this disk"),
    (python("import os; os.kill(os.getpid(), 9)"), "ended with -9: no output"), (python("pass"), "file missing"),
    (python("import sys; open(sys.argv[2] + '/result.json', 'w').write('[1]')"), "has no val_loss"),
    (python("import sys; open(sys.argv[2] + '/result.json', 'w').write('{')"), "damaged JSON"),
    (("/no/such/command",), "cannot be started: No such file"),
])  # fmt: skip
def test_a_command_that_fails_does_so_in_words(command, words, tmp_path):
    (tmp_path / "result.json").write_text('{"val_loss": 1.0}')  # of an earlier attempt: must not count
    found = run(tmp_path, *command)
    assert found.state == "failed"
    assert words in found.error


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_whole_group_ends_with_the_trial(tmp_path):
    text = ("import subprocess, sys, time; child = subprocess.Popen(['sleep', '60']); "
            "open(sys.argv[2] + '/child', 'w').write(str(child.pid)); "
            "open(sys.argv[2] + '/reports.jsonl', 'w').write('{\"share\": 0.1, \"loss\": 9.0}\\n{\"sha'); time.sleep(60)")  # fmt: skip
    told = Reporter(lambda share, loss: True)
    begun = time.monotonic()
    found = run(tmp_path, *python(text), report=told)
    assert (found.state, told.told) == ("pruned", {0.1: 9.0})
    assert time.monotonic() - begun < 15
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 5
    while alive(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(child)


def test_control_without_a_wish_to_end_it_runs_on(tmp_path):
    text = WRITES % "1.0" + "; open(sys.argv[2] + '/reports.jsonl', 'w').write('{\"share\": 0.1, \"loss\": 9.0}\\n')"
    told = Reporter(lambda share, loss: False)
    assert run(tmp_path, *python(text), report=told).state == "done"
    assert told.told == {0.1: 9.0}
    with pytest.raises(Pruned):
        Reporter(lambda share, loss: True)(0.1, 9.0)


@pytest.mark.slow
def test_a_search_over_torchrun_jobs(tmp_path):
    script = Path(__file__).parent / "gloo_trial.py"
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
               "{config}", "{out}")  # fmt: skip
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = RunConfig().with_values(**{"sweep.command": command, "sweep.space": {"lr": (1.0, 2.0, 200.0)}})
    result = sweep(config, tmp_path)
    found = {trial.point["lr"]: trial for trial in result.trials}
    assert (found[1.0].loss, found[2.0].loss) == (3.0, 6.0)
    assert found[200.0].state == "failed"
    assert "ended with 1" in found[200.0].error
    assert result.best == {"lr": 1.0}
    assert {path.read_text() for path in tmp_path.glob("trials/*/ranks")} == {"2"}
    trials = optuna.load_study(study_name="isoscale", storage=url(tmp_path)).get_trials()
    assert sorted(loss for t in trials for loss in t.intermediate_values.values()) == [4.0, 7.0, 601.0]
    with pytest.raises(IsoscaleError, match=r"objective: isoscale.sweep.launch:objective -> isoscale.sweep.one"):
        sweep(config.with_values(**{"sweep.command": ()}), tmp_path, resume=True)
