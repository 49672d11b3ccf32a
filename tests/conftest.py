"""One thread, one cache for the whole session, no help from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture()
def text_file(tmp_path: Path) -> Path:
    """A small text with structure, 40 kB."""
    words = [f"word{i % 37} and {i % 11} more, said {chr(97 + i % 26)}." for i in range(2000)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(words))
    return path
