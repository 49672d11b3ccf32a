"""isoscale check on the screen: exit codes, 80 columns, JSON, and what a typo reads like."""

import json

import pytest

from isoscale.cli import main

SMALL = ("--width", "64,128,256", "--depth", "2", "--seeds", "1", "--quiet")


@pytest.fixture
def check(capsys, monkeypatch, tmp_path, small_text):
    """Run `isoscale check` in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        capsys.readouterr()
        code = main(["check", *words, "--data", str(small_text)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_control_a_model_that_grows_fails_with_code_1(check):
    code, out, _ = check("isoscale", "--rule", "none", *SMALL)
    assert code == 1
    assert "verdict: fails" in out
    assert "suspect: blocks." in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_flat_one_passes_with_code_0_and_json_is_one_object(check, tmp_path):
    code, out, _ = check("isoscale", "--rule", "mup", *SMALL, "--json", "--out", "there")
    assert code == 0
    assert out.count("\n") == 1
    data = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert data["verdict"] in ("passes", "undecided")
    assert (tmp_path / "there" / "report.html").exists()
    assert json.loads((tmp_path / "there" / "check.json").read_text())["verdict"] == data["verdict"]


@pytest.mark.parametrize(("words", "message"), [
    (("isoscale", "--width", "64,big"), "sizes are whole numbers"), (("isoscale", "--width", "64,,128"), "sizes are whole"),
    (("isoscale", "--rule", "complet-d"), "did you mean complete-d"), (("no:thing",), "no module 'no'"),
    (("isoscale", "--optimizer", "adam"), "did you mean adamw"), (("isoscale", "--width", "40,80"), "head_size"),
])  # fmt: skip
def test_a_users_error_is_code_2_and_says_what_to_write(check, words, message):
    code, out, err = check(*words, "--quiet")
    assert code == 2
    assert out == ""
    assert message in err


def test_a_refusal_stands_alone_on_the_screen(check):
    code, _, err = check("isoscale", "--rule", "complet-d")
    assert code == 2
    assert err.startswith("isoscale: ")


def test_the_bar_says_what_runs_and_ends_full(check):
    _, out, err = check("isoscale", "--rule", "none", "--width", "32,64", "--depth", "1", "--steps", "1", "--seeds", "1")
    assert "2/2" in err
    assert "check" not in out.splitlines()[0] or "isoscale" in out
