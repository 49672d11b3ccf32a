"""Compiles the C++ kernels once per machine and compiler, and loads them.

How: plain C++ with a C interface, no torch headers, so that a build takes seconds; the result is kept in the cache
folder under a hash of the source, the flags, the compiler's version and the CPU's features, as a folder that is whole
or absent (two processes may build at once; one of them publishes). A digest beside the library is checked before it is
loaded, since loading a truncated library can kill the process; a damaged one is built again.

What is lost: the first use waits for the compiler. Without one there are no kernels, and `why_not` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from isoscale._base.cache import cache_folder
from isoscale._base.errors import ConfigError, IsoscaleError
from isoscale._base.files import atomic_dir, sha256, write_synced

# Each library is built when it is first asked for.
LIBRARIES = {
    "cast": ("cast.cpp", "norm.cpp", "lmd.cpp", "elements.h", "lanes.h", "norm_lines.h", "lmd_lanes.h", "threads.h"),
    "step": ("step.cpp", "elements.h", "lmd_lanes.h", "threads.h"),
}
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
# The first that compiles is taken. Wide vectors: the loops are long and straight, so they pay where they exist.
MACHINE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 300  # seconds


class _Failed(Exception):
    """The build failed; the message is the reason in one line."""


def _compiler() -> list[str]:
    said = shlex.split(os.environ.get("CXX", ""))
    for words in (said, ["c++"], ["g++"], ["clang++"]):
        if words and shutil.which(words[0]):
            return words
    raise _Failed(f"no C++ compiler found ({said[0] if said else '$CXX'}, c++, g++ and clang++ were tried)")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise _Failed(f"{command[0]} cannot be run: {error}") from error


def _cpu() -> str:
    """What the CPU can do: its features on Linux, else its name. A build for one CPU may not run on another."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return platform.processor()


def _compile(compiler: list[str], folder: Path, target: Path, name: str) -> None:
    sources = [str(folder / source) for source in LIBRARIES[name] if source.endswith(".cpp")]
    reason = ""
    for machine in MACHINE_FLAGS:
        done = _run([*compiler, *FLAGS, *machine, "-o", str(target), *sources])
        if done.returncode == 0 and target.exists():
            return
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
    raise _Failed(f"{compiler[0]} failed: {reason}")


def _whole(folder: Path, name: str = "cast") -> bool:
    with suppress(OSError):
        return (folder / "sha256").read_text() == sha256(folder / f"{name}.so")
    return False


def _fill(folder: Path, compiler: list[str], here: Path, name: str) -> None:
    _compile(compiler, here, folder / f"{name}.so", name)
    write_synced(folder / "sha256", sha256(folder / f"{name}.so"))


def _build(name: str = "cast") -> ctypes.CDLL:
    here = Path(__file__).parent
    compiler = _compiler()
    version = _run([*compiler, "--version"]).stdout
    texts = [(here / source).read_text() for source in LIBRARIES[name]]
    parts = [*texts, repr((compiler, FLAGS, MACHINE_FLAGS)), version, platform.machine(), _cpu()]
    folder = cache_folder() / "kernels" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    try:
        if not _whole(folder, name):
            # Replacing what is damaged; where another process was faster, its build is replaced by an equal one.
            with atomic_dir(folder, replace=True) as fresh:
                _fill(fresh, compiler, here, name)
        return ctypes.CDLL(str(folder / f"{name}.so"))
    except (IsoscaleError, OSError):  # no room, not writable, a race lost twice: build aside, for this process only
        with tempfile.TemporaryDirectory(prefix="isoscale-") as aside:
            _fill(Path(aside), compiler, here, name)
            return ctypes.CDLL(str(Path(aside) / f"{name}.so"))


@functools.cache
def _library(name: str = "cast") -> tuple[ctypes.CDLL | None, str]:
    try:
        return _build(name), ""
    except _Failed as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled kernels cannot be loaded: {error}"


def why_not(name: str = "cast") -> str:
    """Why a library of compiled kernels is not there, in one line; "" when it is. The first call compiles."""
    if os.environ.get("ISOSCALE_KERNELS", "").lower() == "off":
        return "switched off by ISOSCALE_KERNELS=off"
    return _library(name)[1]


def available(name: str = "cast") -> bool:
    """Whether the compiled kernels can be used. The first call compiles."""
    return not why_not(name)


def library(name: str = "cast") -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        ConfigError: there are none; says why.
    """
    found, reason = _library(name)
    if found is None:
        raise ConfigError("no compiled kernels: " + reason, key="ISOSCALE_KERNELS", hint="install a C++ compiler")
    return found
