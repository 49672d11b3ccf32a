"""`isoscale scalify`: what it prints, writes and refuses."""

import builtins
import json
import re
import warnings

import pytest
from typer.main import get_command

from isoscale.cli import commands, main

TINY = [part for text in ("model.width=32", "model.head_size=8", "model.depth=2", "train.batch=4", "data.seq_len=32")
        for part in ("--set", text)]  # fmt: skip
MODULE = """
import torch
from torch import nn

def build(width, depth):
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.ReLU()] + [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 4)), torch.randn(16, 8)
"""


@pytest.fixture(autouse=True)
def _narrow(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def iso(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def one_object(text):
    assert text.count("\n") == 1, text[:300]
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(data, dict)
    return data


def test_text_page_and_files(iso, small_text, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a loss with a gradient is no number
        code, text, err = iso("scalify", "--report", "--steps", 2, *TINY, "--data", small_text, "--worst", 5, "--out", "out",
                              "--octaves", 0.5)  # fmt: skip
    assert code == 0, err
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("isoscale under fp16, after 2 steps; 10.00 bytes a parameter\n")
    for direction in ("forward", "backward"):
        assert re.search(rf"^{direction} +\d+ tensors, +\d+\.\d % within 0\.5 octaves of the prediction$", text, re.MULTILINE)
    worst = [float(found) for found in re.findall(r"^ +2\^([-+][\d.]+)  ", text, re.MULTILINE)]
    assert len(worst) == 5
    assert [abs(x) for x in worst] == sorted(map(abs, worst), reverse=True)
    assert "iso.scalify.rescale_l2" in text
    assert "2/2" in err
    assert "loss" in err
    assert "page: out/report.html" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Verdict" in page
    assert "The 40 worst" in page
    found = json.loads((tmp_path / "out" / "scalify.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "tensors.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"formulas"}
    measured = [row for row in lines[1:] if row["rms"] is not None and row["kind"] != "layout"]
    assert sum(part["tensors"] for part in found["directions"].values()) == len(measured)


def test_json_is_one_strict_object_and_the_same_again(iso, small_text):
    words = ["scalify", "--steps", 1, *TINY, "--data", small_text, "--json", "--out"]
    code, text, err = iso(*words, "a")
    data = one_object(text)
    assert (code, data["model"], data["recipe"], data["octaves"]) == (0, "isoscale", "fp16", 3.0)
    assert 0 < data["directions"]["forward"]["within"] <= 1
    assert data["bytes_per_parameter"]["all"] == pytest.approx(10, abs=0.1)  # scales too
    assert "page" not in data
    assert "train" not in err
    assert one_object(iso(*words, "b")[1]) == data


def test_proposals_name_each_place_once(iso, small_text):
    _, text, _ = iso("scalify", "--steps", 0, *TINY, "--data", small_text, "--json", "--octaves", 0.25)
    names = [p["tensor"] for p in one_object(text)["proposals"]]
    assert names
    assert len(set(names)) == len(names)


def test_a_function_of_the_user(iso, tmp_path):
    (tmp_path / "my_model_a.py").write_text(MODULE)
    words = ["scalify", "my_model_a:build", "--steps", 1, "--json", "-q"]
    small = one_object(iso(*words)[1])
    large = one_object(iso(*words, "--width", 32, "--depth", 5)[1])
    assert small["model"] == "my_model_a:build"
    assert large["directions"]["forward"]["tensors"] > small["directions"]["forward"]["tensors"]
    code, text, err = iso("scalify", "my_model_a:build", "--steps", 1, "--recipe", "fp8-fp16", "--width", 64)
    assert code == 0, err
    assert "under fp8-fp16" in text
    assert max(map(len, text.splitlines())) <= 80


def test_training_that_diverges_is_shown_not_hidden(iso, tmp_path):
    (tmp_path / "my_model_b.py").write_text(MODULE)
    code, text, _ = iso("scalify", "my_model_b:build", "--steps", 3, "--lr", 1e30, "--report", "--json", "-q")
    assert code == 0
    data = one_object(text)
    assert data["directions"]["forward"]["within"] < 1
    shown = iso("scalify", "my_model_b:build", "--steps", 3, "--lr", 1e30, "-q")[1]
    assert "2^+inf" in shown
    assert "2^+inf" in (tmp_path / "runs" / "scalify" / "report.html").read_text()


BAD = {
    "recipe": (["--recipe", "fp18"], ["recipe", "fp18", "did you mean", "fp16"]),
    "steps": (["--steps", "-1"], ["--steps", "greater than or equal to 0"]),
    "octaves": (["--octaves", "0"], ["--octaves", "0", "above 0"]),
    "worst": (["--worst", "-1"], ["--worst", "greater than or equal to 0"]),
    "LR": (["--lr", "-1"], ["--lr", "-1"]),
    "LR nan": (["--lr", "nan"], ["--lr", "nan"]),
    "width": (["my_model_c:build", "--width", "0"], ["--width", "greater than or equal to 1"]),
    "no model": (["isoscal"], ["isoscal", "names no model", "or isoscale"]),
    "function": (["my_model_c:biuld"], ["biuld", "did you mean build"]),
    "module": (["my_modle_c:build"], ["my_modle_c", "did you mean my_model_c"]),
    "width of the decoder": (["--width", "64"], ["--width", "--set model.width=64"]),
    "setting of a target": (["my_model_c:build", "--set", "model.width=64"], ["--set", "--width and --depth"]),
    "unknown key": (["--set", "model.widht=64"], ["did you mean model.width"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_2_and_says_what_is_near(iso, tmp_path, case):
    (tmp_path / "my_model_c.py").write_text(MODULE)
    words, wanted = BAD[case]
    code, out, err = iso("scalify", *words)
    assert code == 2
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24
    for text in wanted:
        assert text in err, (text, err)
    assert not (tmp_path / "runs").exists()
    code, out, _ = iso("scalify", *words, "--json")
    assert code == 2
    assert one_object(out)["error"]


def test_help_has_examples_that_parse(iso):
    _, out, _ = iso("scalify", "--help")
    examples = [line.split() for line in out.partition("Examples:")[2].splitlines() if line.strip().startswith("isoscale ")]
    assert len(examples) == 3
    command = get_command(commands.app).commands["scalify"]
    for words in examples:
        assert command.make_context("scalify", words[2:]).params["out"]


def test_a_page_without_plotly_is_refused_before_the_training(iso, monkeypatch, tmp_path):
    def no_plotly(name, *rest, real=builtins.__import__, **more):
        if name.split(".")[0] == "plotly":
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *rest, **more)

    monkeypatch.setattr("importlib.import_module", no_plotly)
    code, _, err = iso("scalify", "--report", *TINY)
    assert code == 2
    assert 'pip install "isoscale[report]"' in err
    assert "train" not in err
    assert not (tmp_path / "runs").exists()
