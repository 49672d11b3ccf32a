"""What the trace claims holds in numbers: the named parameters do to the output what the trace says they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign_models import BUILDERS, Experts, llama, nanogpt, qwen3
from torch import nn

from isoscale.planning.trace import trace

IDS = torch.randint(3, 256, (2, 8), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return out.logits if hasattr(out, "logits") else out


@torch.no_grad()
def scale(model: nn.Module, names: frozenset[str], by: float) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].mul_(by)


def shaken(name: str) -> nn.Module:
    """A model none of whose parameters is 0 or 1 as initialised, so that nothing holds by accident."""
    torch.manual_seed(0)
    model = BUILDERS[name](64, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "blocks"), [("nanogpt", "h"), ("llama", "model.layers"), ("mixtral", "model.layers"),
                                              ("gpt2", "transformer.h"), ("gptj", "transformer.h"),
                                              ("qwen3", "model.layers"), ("mamba", "backbone.layers")])  # fmt: skip
def test_without_the_ends_the_blocks_are_gone(name: str, blocks: str) -> None:
    model = shaken(name)
    before = logits(model)
    for branch in trace(model).branches:
        assert branch.ends
        scale(model, branch.ends, 0.0)
    silent = logits(model)
    parent, _, local = blocks.rpartition(".")
    setattr(model.get_submodule(parent), local, nn.ModuleList())
    torch.testing.assert_close(silent, logits(model))
    assert (before - silent).abs().max() > 0.1  # the blocks did something


class Scaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(width, width), nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * F.gelu(self.linear(x))


class Slots(nn.Module):
    """Writes its result into slices of a fresh tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:, : x.shape[1] // 2] = self.left(x)
        out[:, x.shape[1] // 2 :] = self.right(x)
        return out


BRANCHES = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Dropout()), "2.weight 2.bias"),
    "post-norm": (lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), "1.weight 1.bias"),
    "rms": (lambda: nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16)), "1.weight"),
    "layer scale": (lambda: Scaled(16), "gamma"),
    "slots": (lambda: Slots(16), "left.weight left.bias right.weight right.bias"),
    "experts": (lambda: Experts(16, 4), " ".join(f"{e}.2.{p}" for e in ("experts.0", "experts.1", "experts.2", "experts.3",
                                                                       "shared") for p in ("weight", "bias"))),
}  # fmt: skip


class Stream(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.branch = nn.Linear(16, 16), nn.LayerNorm(16), branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return x + 0.5 * self.branch(self.norm(x))


@pytest.mark.parametrize("kind", BRANCHES)
def test_scaling_the_ends_scales_the_branch(kind: str) -> None:
    torch.manual_seed(0)
    make, names = BRANCHES[kind]
    model = Stream(make()).eval()
    x = torch.randn(64, 16)
    (branch,) = trace(model, x).branches
    assert branch.ends == {f"branch.{name}" for name in names.split()}
    with torch.no_grad():
        stream, before = model.stem(x), model(x)
        scale(model, branch.ends, 3.0)
        torch.testing.assert_close(model(x) - stream, 3 * (before - stream), rtol=1e-4, atol=1e-5)
        assert (before - stream).abs().max() > 0.01


@pytest.mark.parametrize("make", [llama, qwen3])
def test_queries_carry_the_attention_scale(make: object) -> None:
    model = make()  # type: ignore[operator]
    before = logits(model)
    for attention in trace(model).attention:
        scale(model, attention.queries, 2.0)
        model.get_submodule(attention.path).scaling = attention.scale / 2
    torch.testing.assert_close(logits(model), before)
    scale(model, trace(model).attention[0].queries, 50.0)  # control: it matters
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "nanogpt", "mamba"])
def test_readouts_are_linear_in_what_feeds_them(name: str) -> None:
    model = shaken(name)
    before = logits(model)
    ((_, feeds),) = trace(model).feeds.items()
    scale(model, feeds, 2.0)
    torch.testing.assert_close(logits(model), 2 * before)


def test_tied_and_untied_readouts() -> None:
    assert "lm_head.weight" not in trace(nanogpt(tied=True)).uses
    untied = trace(nanogpt(tied=False))
    assert untied.uses["wte.weight"].kinds == {"lookup"}
    assert untied.uses["lm_head.weight"].after
