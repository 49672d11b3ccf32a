"""The GPT-2 example of the Scalify page: 30 lines, runs, learns, in six bytes a parameter."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "scalify_gpt2.py"


@pytest.mark.slow
def test_the_example_learns_in_six_bytes_a_parameter(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"loss (\S+)", out)]
    assert losses[-1] < losses[0] - 0.5
    assert "float16" in out
    assert "6.00 bytes a parameter" in out


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 30
