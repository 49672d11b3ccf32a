"""Building the kernels: the cache, damage, no compiler, two at once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isoscale._base.errors import ConfigError
from isoscale.kernels import build, cpu

needs_compiler = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
SCRIPT = """
import torch
from isoscale.kernels import cpu
from isoscale.kernels.spec import CastSpec
spec = CastSpec(4, 1, 1, 0, 2, 6.0, False, "e8m0", "floor", 1, 32)
print(cpu.available(), cpu.why_not())
if cpu.available():
    print(cpu.fake_cast(torch.arange(32.0), spec, (1, 1, 32)).sum().item())
"""


def start(cache: Path, **env: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ISOSCALE_CACHE": str(cache), **env}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answer(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and builds without optimisation."""
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if f == "-O3" else f for f in build.FLAGS))
    monkeypatch.setenv("ISOSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_struct_is_the_same_on_both_sides() -> None:
    if cpu.available():
        assert build.library().isoscale_size() == ctypes.sizeof(cpu._Cast)


@needs_compiler
def test_a_build_is_kept_and_used_again(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build._build()
    (folder,) = (quick / "kernels").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["cast.so", "sha256"]
    monkeypatch.setattr(build, "_compile", None)  # any compilation would now fail
    assert build._build().isoscale_size() == ctypes.sizeof(cpu._Cast)


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "garbage", "no digest", "no library"])
def test_a_damaged_build_is_made_again(quick: Path, damage: str) -> None:
    build._build()
    (folder,) = (quick / "kernels").iterdir()
    library = folder / "cast.so"
    data = library.read_bytes()
    fresh = folder / "new"  # another file: the one that is loaded must not change under its process
    fresh.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"no library" * 999)
    if damage in ("truncated", "garbage"):
        fresh.replace(library)
    else:
        fresh.unlink()
        (folder / ("sha256" if damage == "no digest" else "cast.so")).unlink()
    assert not build._whole(folder)
    assert build._build().isoscale_size() == ctypes.sizeof(cpu._Cast)
    assert build._whole(folder)
    assert [p.name for p in (quick / "kernels").iterdir()] == [folder.name]


@needs_compiler
def test_another_source_is_another_build(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build._build()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build._build()
    assert len(list((quick / "kernels").iterdir())) == 2


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    both = [start(tmp_path / "cache") for _ in range(2)]
    first, second = map(answer, both)
    assert first == second
    assert first[0].startswith("True")
    (folder,) = (tmp_path / "cache" / "kernels").iterdir()
    assert build._whole(folder)


@needs_compiler
def test_a_cache_that_cannot_be_written_builds_aside(quick: Path) -> None:
    quick.write_text("a file, not a folder")
    assert build._build().isoscale_size() == ctypes.sizeof(cpu._Cast)


def test_without_a_compiler_there_are_no_kernels(tmp_path: Path) -> None:
    out = answer(start(tmp_path, PATH=str(tmp_path), CXX=""))
    assert len(out) == 1
    assert out[0].startswith("False no C++ compiler found")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'x.cpp:1: error: out of paint' >&2\nexit 1\n")
    fake.chmod(0o755)
    out = answer(start(tmp_path, CXX=str(fake)))
    assert out == [f"False {fake} failed: x.cpp:1: error: out of paint"]
    assert not list((tmp_path / "kernels").iterdir())


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOSCALE_KERNELS", "off")
    assert not cpu.available()
    assert cpu.why_not() == "switched off by ISOSCALE_KERNELS=off"


def test_a_call_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_library", lambda _name: (None, "no C++ compiler found"))
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler found"):
        build.library()
