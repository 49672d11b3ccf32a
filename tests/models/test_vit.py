"""The ViT: shapes, what attention may see, unit scale, and that it learns digits."""

from __future__ import annotations

import pytest
import torch

import isoscale as iso
from isoscale._base.errors import ConfigError
from isoscale.models import ViT, ViTConfig


def images(count: int = 4, config: ViTConfig | None = None) -> torch.Tensor:
    config = config or ViTConfig()
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, config.channels, config.image, config.image, generator=draw)


@pytest.mark.parametrize("scaling", ["plain", "unit"])
def test_shapes_and_loss(scaling: str) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image=12, patch=3, channels=3, width=32, depth=2, vocab=7, scaling=scaling)  # type: ignore[arg-type]
    model = ViT(config)
    x = images(5, config)
    assert config.tokens == 16
    assert model(x).shape == (5, 7)
    loss = model(x, torch.arange(5))
    loss.backward()
    assert 1 < loss.item() < 4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_patches_are_cut_where_they_lie() -> None:
    model = ViT(ViTConfig(width=16, depth=1))
    seen = []
    model.patch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = images(1)
    model(x)
    assert torch.equal(seen[0][0, 5], x[0, 0, 2:4, 2:4].flatten())  # second row, second column of 4 x 4


def test_attention_sees_all_patches_and_their_places() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(width=32, depth=1, norm="trainable", scaling="plain"))
    x = images(1).requires_grad_()
    block: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, args, out: block.append(out))
    model(x)
    (grad,) = torch.autograd.grad(block[0][0, 0].sum(), x)
    assert grad[0, 0, -2:, -2:].abs().sum() > 0, "the first token sees the last patch: no causal mask"
    with torch.no_grad():
        turned = x.flip(2)
        assert not torch.allclose(model(x), model(turned), atol=1e-4)
        model.positions.weight.zero_()
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        patches = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 1, 2, 2)
        mixed = patches[:, order].reshape(1, 4, 4, 1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 1, 8, 8)
        torch.testing.assert_close(model(x), model(mixed), rtol=1e-4, atol=1e-4)  # control: without positions no order


def test_unit_scale_at_the_output_of_the_blocks() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(width=128, depth=4, scaling="unit"))
    outs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: outs.append(out))
    model(images(32))
    # attention's factor takes tokens for independent; those of a deep ViT are not, so the scale creeps up
    assert all(0.8 < float(out.detach().std()) < 1.8 for out in outs)


def test_recipes_and_norms_apply() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(width=64, depth=4, norm="trainable"))
    want = model(images())
    iso.numerics.convert(model, "nvfp4", norm="mxnorm")
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    assert kinds["blocks.0.attn.qkv"] == "MXNormLinear"
    assert kinds["blocks.3.attn_norm"] == "RMSNorm", "the last block is kept in BF16"
    assert kinds["norm"] == "RMSNorm"
    got = model(images())
    assert 0 < float((got - want).detach().abs().max()) < 2


def test_a_plan_for_it() -> None:
    def make(width: int) -> ViT:
        torch.manual_seed(0)
        return ViT(ViTConfig(width=width, depth=2, norm="trainable", scaling="plain"))

    model = make(64)
    plan = iso.plan(model, "mup", base=make(32), example=images())
    assert plan.row("patch.weight").role == "embedding"
    assert plan.row("blocks.0.attn.qkv.weight").role == "hidden"
    assert plan.row("head.weight").role == "readout"


def test_it_learns_digits() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(data.target)
    torch.manual_seed(0)
    model = ViT(ViTConfig(width=32, depth=2, scaling="plain"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2**-7)
    for step in range(60):
        part = torch.arange(step * 24, step * 24 + 48) % 1400
        loss = model(x[part], y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(x[1400:]).argmax(-1) == y[1400:]).float().mean()
    assert right > 0.5  # chance is 0.1


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"patch": 3}, "must divide"), ({"image": 0}, "image"), ({"channels": 1.5}, "channels"), ({"width": 20}, "width")],
)
def test_nonsense_is_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ViTConfig(**settings)  # type: ignore[arg-type]
