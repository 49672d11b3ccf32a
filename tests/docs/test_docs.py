"""Every Python block of the docs runs; every link to a file points at one; every command shown exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {"__name__": "docs"})
    assert "import" in block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_at_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_exist(page: Path) -> None:
    from typer.main import get_command

    from isoscale.cli import commands

    known = get_command(commands.app).commands  # type: ignore[attr-defined]
    fenced = "\n".join(re.findall(r"```\n(.*?)```", page.read_text(), re.S))
    for line in re.findall(r"^isoscale (\w+)(.*)$", fenced, re.M):
        assert line[0] in known, line
        command = known[line[0]]
        word = line[1].split()[0] if line[1].split() else ""
        if word in getattr(command, "commands", {}):  # isoscale formats show
            command = command.commands[word]
        flags = {flag for p in command.params for flag in p.opts}
        for flag in re.findall(r"(--[\w-]+)", line[1].split(";")[0]):
            assert flag in flags, line


def test_the_tutorial_shows_the_recorded_result() -> None:
    """The screen in the tutorial is made from the recorded numbers by the code that prints it."""
    import json

    from isoscale.cli.quickstart import closing

    result = json.loads((ROOT / "docs" / "results" / "data" / "quickstart.json").read_text())
    shown = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
    assert shown is not None
    assert shown.group(1).strip() == closing(result).strip()
