"""Ratchets: import direction, import cost, public names, flags, file length. Each changes only on purpose."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isoscale

SRC = Path(isoscale.__file__).parent
# Left may be imported by right; folders in one tuple are siblings and do not import each other.
ORDER = [
    ("_base",), ("config",), ("rules",), ("kernels",), ("formats",), ("nn",), ("models",), ("planning",),
    ("optim", "numerics", "probe"), ("scalify",), ("train",), ("sweep",), ("check",), ("cli",),
]  # fmt: skip
RANK = {name: i for i, group in enumerate(ORDER) for name in group}
SPECIAL = {"report": {"_base", "config", "rules"}, "presets": {"_base", "config"},
           "interop": {"_base", "config", "models", "planning"}}  # fmt: skip
LONGEST = 440


def edges(root: Path) -> set[tuple[str, str, str]]:
    """(folder, imported folder, file) for every import of isoscale inside isoscale, those in functions too."""
    out = set()
    for path in root.rglob("*.py"):
        folder = path.relative_to(root).parts[0] if path.parent != root else ""
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "isoscale":
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name.split(".")[1] for a in node.names if a.name.startswith("isoscale.")]
            out |= {(folder, name, str(path.relative_to(root))) for name in names if name != folder}
    return out


def allowed(folder: str, name: str) -> bool:
    """Whether `folder` may import `name`."""
    if folder == "cli":
        return True
    if folder in SPECIAL:
        return name in SPECIAL[folder]
    return name in RANK and folder in RANK and RANK[name] < RANK[folder]


def test_imports_go_one_way() -> None:
    wrong = [f"{file}: {folder} -> {name}" for folder, name, file in edges(SRC) if folder and not allowed(folder, name)]
    assert not wrong, wrong


def test_the_import_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "x.py").write_text("def f():\n    from isoscale.train import train\n")
    (found,) = edges(tmp_path)
    assert found[:2] == ("rules", "train")
    assert not allowed("rules", "train")
    assert not allowed("optim", "numerics")


@pytest.mark.parametrize("code", ["import isoscale", "from isoscale.cli import main\nassert main(['--help']) == 0"])
def test_import_and_help_load_no_torch_and_are_quick(code: str) -> None:
    script = f"{code}\nimport sys, time\nassert 'torch' not in sys.modules\nprint(time.process_time(), file=sys.stderr)"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stderr.split()[-1]) for run in runs) < 0.5


def test_public_names() -> None:
    assert isoscale.__all__ == [
        "IsoscaleError", "Plan", "RunConfig", "RunResult", "Scale", "check", "config", "export", "formats", "infer_roles",
        "models", "nn", "numerics", "optim", "plan", "planning", "presets", "probe", "report", "rules", "scalify", "sweep",
        "train",
    ]  # fmt: skip
    for name in isoscale.__all__:
        assert getattr(isoscale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = isoscale.nope


def test_commands_and_their_flags() -> None:
    from typer.main import get_command

    from isoscale.cli import commands

    found = {name: sorted(flag for p in command.params for flag in p.opts if flag.startswith("--"))
             for name, command in get_command(commands.app).commands.items()}  # type: ignore[attr-defined]
    config = ["--config", "--preset", "--set"]
    assert found == {
        "quickstart": sorted(["--out", "--data", "--set", "--target-width", "--seed", "--resume", "--quiet", "--json"]),
        "init": sorted(["--preset", "--force", "--json"]),
        "plan": sorted([*config, "--explain", "--diff", "--vocab", "--model", "--width", "--depth", "--base-width",
                        "--base-depth", "--role", "--now", "--json"]),
        "sweep": sorted([*config, "--out", "--data", "--strategy", "--executor", "--workers", "--storage", "--runs",
                         "--budget-tokens", "--budget-flops", "--resume", "--quiet", "--json"]),
        "transfer": sorted(["--target", "--ladder", "--save", "--width", "--depth", "--recipe", "--set", "--train", "--out", "--resume", "--quiet", "--json"]),
        "train": sorted([*config, "--out", "--data", "--resume", "--quiet", "--json"]),
        "eval": sorted(["--data", "--batches", "--json"]),
        "generate": sorted(["--prompt", "--tokens", "--temperature", "--top-k", "--seed", "--json"]),
        "report": sorted(["--out", "--json"]),
        "check": sorted(["--width", "--depth", "--rule", "--base-width", "--base-depth", "--steps", "--seeds", "--transfer",
                         "--transfer-steps", "--lr", "--optimizer", "--data", "--out", "--quiet", "--json"]),
        "scalify": sorted([*config, "--recipe", "--width", "--depth", "--steps", "--lr", "--octaves", "--worst", "--out",
                           "--report", "--data", "--quiet", "--json"]),
        "formats": ["--json"],
        "doctor": sorted(["--model", "--width", "--depth", "--json"]),
    }  # fmt: skip
    under = get_command(commands.app).commands["formats"].commands  # type: ignore[attr-defined]
    assert {name: sorted(flag for p in command.params for flag in p.opts if flag.startswith("--"))
            for name, command in under.items()} == {
        "show": ["--json"], "error": sorted(["--format", "--axis", "--min-sqnr", "--out", "--json"]),
    }  # fmt: skip


def test_no_file_grows_too_long() -> None:
    lengths = {str(p.relative_to(SRC)): len(p.read_text().splitlines()) for p in SRC.rglob("*.py")}
    long = {name: n for name, n in lengths.items() if n > LONGEST}
    assert not long, long


def test_no_pickle_and_no_unsafe_load() -> None:
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert "pickle" not in names, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_nothing_hangs_on_parameters() -> None:
    """No attribute on a Parameter carries meaning: nothing in the package sets one."""
    for path in SRC.rglob("*.py"):
        assert "setattr(param" not in path.read_text(), path
