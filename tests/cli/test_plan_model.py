"""isoscale plan --model: tables, diffs and refusals for models of other people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isoscale.cli import main

SETTINGS = ["--set", "hps.lr=0.004", "--set", "hps.weight_decay=0.1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face config and a module with a hand-written model, in the current folder."""
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=512,
                head_dim=64, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "big")  # fmt: skip
    (tmp_path / "mine_to_plan.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.inp, self.out = torch.nn.Linear(8, width), torch.nn.Linear(width, 4)\n"
        "    def forward(self, x):\n"
        "        return self.out(torch.relu(self.inp(x)))\n"
        "def build(width):\n"
        "    return Net(width)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_is_planned_on_the_meta_device_at_80_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "big", "--base-width", "64", "--base-depth", "2", *SETTINGS]) == 0
    text = capsys.readouterr().out
    assert "base: width 64, depth 2" in text
    assert all(len(line) <= 80 for line in text.splitlines()), text
    line = next(line for line in text.splitlines() if "up_proj" in line)
    assert line.split()[-3:] == ["0.01", "0.001", "0.4"]


def test_json_carries_plan_and_cost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "big/config.json", "--base-width", "64", "--json", *SETTINGS,
                 "--set", "base.batch=4", "--set", "base.steps=100", "--set", "train.batch=16", "--set", "train.steps=100"]) == 0  # fmt: skip
    data = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in data["plan"]["rows"]}
    assert rows["lm_head.weight"]["lr"] == pytest.approx(0.004 / 4)  # s = 1: batch and tokens grow alike
    assert data["cost"]["parameters"] == 2 * 512 * 256 + 4 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256


def test_the_diff_against_what_it_has_now(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "big", "--base-width", "64", "--now", *SETTINGS]) == 0
    text = capsys.readouterr().out
    assert "lm_head.weight  lr: 0.004 -> 0.001" in text
    assert "model.embed_tokens.weight  lr" not in text


def test_a_function_and_a_role(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "mine_to_plan:build", "--width", "128", "--base-width", "32", *SETTINGS]
    assert main([*words, "--explain", "out.weight"]) == 0
    assert "readout" in capsys.readouterr().out
    assert main([*words, "--role", "out.weight=hidden", "--explain", "out.weight"]) == 0
    assert "out.weight: hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", "128"], "--width goes with --model"),
        (["--model", "big"], "needs the size where"),
        (["--model", "big", "--base-width", "64"], "learning rate that was tuned"),
        (["--model", "bigg", "--base-width", "64", *SETTINGS], "this names no model"),
        (["--model", "mine_to_plan:buld", "--base-width", "64", *SETTINGS], "has no function"),
        (["--model", "mine_to_plan:build", "--base-width", "64", *SETTINGS], "needs to know the size"),
        (["--model", "big", "--base-width", "512", *SETTINGS], "the base is larger than the target"),
        (["--model", "big", "--base-width", "64", "--role", "lm_head", *SETTINGS], "PATTERN=ROLE"),
        (["--model", "big", "--base-width", "64", "--role", "*=readuot", *SETTINGS], "unknown role"),
        (["--model", "big", "--base-width", "64", "--diff", "proxy", *SETTINGS], "--diff compares configs"),
        (["--model", "big", "--base-width", "70", *SETTINGS], "no whole number of heads"),
    ],
)
def test_refusals(folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err
