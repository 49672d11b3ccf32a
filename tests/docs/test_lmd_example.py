"""The example of the LMD page: 30 lines, runs, learns; the mean is better than a sample."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "lmd.py"


@pytest.mark.slow
def test_the_example_learns(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = dict(re.findall(r"(\w+): (\S+) nats/byte", capsys.readouterr().out))
    assert float(found["mean"]) < 3.1  # unigrams: 3.05 to 3.1; 5.55 at the start
    assert float(found["mean"]) < float(found["sampled"]) + 0.01


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 30
