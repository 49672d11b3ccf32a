"""`iso.train(...)` works whatever was imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
config = iso.RunConfig().with_values(**{"data.source": ("TEXT",), "data.seq_len": 16, "model.width": 16,
    "model.depth": 1, "train.steps": 2, "train.batch": 2})
assert iso.train(config, "OUT").steps == 2
"""


@pytest.mark.parametrize("before", ["", "import isoscale.train.data\n", "from isoscale.train import train\n", "iso.sweep\n"])
def test_train_is_callable(before: str, text_file: Path, tmp_path: Path) -> None:
    code = "import isoscale as iso\n" + before + RUN.replace("TEXT", str(text_file)).replace("OUT", str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
