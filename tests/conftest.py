"""One thread, one cache for the whole session, no help from outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token caches go to a temporary folder, also in child processes."""
    before = os.environ.get("ISOSCALE_CACHE")
    os.environ["ISOSCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ISOSCALE_CACHE"]
    else:
        os.environ["ISOSCALE_CACHE"] = before


@pytest.fixture(autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A small text with structure, 40 kB."""
    words = [f"word{i % 37} and {i % 11} more, said {chr(97 + i % 26)}." for i in range(2000)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(words))
    return path


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of `text_file`, one for the session."""
    words = [f"word{i % 37} and {i % 11} more, said {chr(97 + i % 26)}." for i in range(2000)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(words))
    return path


@pytest.fixture(scope="session")
def tiny(small_text: Path) -> Callable[..., Any]:
    """`tiny(**dotted)`: a config that trains in a tenth of a second, 8 steps, evaluations and checkpoints every 3."""
    from isoscale.config import RunConfig

    def make(**values: object) -> RunConfig:
        return RunConfig().with_values(**{
            "model.width": 16, "model.head_size": 8, "model.depth": 1, "data.seq_len": 32, "data.source": str(small_text),
            "train.steps": 8, "train.batch": 4, "train.eval_every": 3, "train.eval_batches": 2,
            "train.checkpoint_every": 3, **values,
        })  # fmt: skip

    return make
