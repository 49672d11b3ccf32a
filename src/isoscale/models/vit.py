"""A vision transformer made of the decoder's blocks: patches in, no causal mask, learned positions, mean pooling.

The block is that of Llama (SwiGLU, RMSNorm before each branch) and not that of arXiv 2010.11929 (GELU, LayerNorm), so
that the same norms, recipes and rules apply to both kinds of model. Rotary positions are switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.models.decoder import Block, DecoderConfig, Pass, make_norm
from isoscale.nn import functional as F
from isoscale.nn.linear import Embedding, Linear, LinearReadout, roles_of
from isoscale.nn.scale import times


@dataclass(frozen=True)
class ViTConfig(DecoderConfig):
    """As `DecoderConfig`; `vocab` is the number of classes.

    Args:
        image: side of the square images, pixels.
        patch: side of a patch; divides `image`.
        channels: of the images.
    """

    causal: ClassVar[bool] = False
    vocab: int = 10
    image: int = 8
    patch: int = 2
    channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("image", "patch", "channels"):
            size = getattr(self, key)
            if type(size) is not int or size < 1:
                raise ConfigError(f"{key} must be a whole number of at least 1", key=key, value=size)
        if self.image % self.patch:
            fits = [side for side in range(1, self.image + 1) if self.image % side == 0]
            raise ConfigError("patches must divide the image", key="patch", value=self.patch, hint=f"one of {fits}")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2


class PatchEmbedding(Linear):
    """Patches [batch, tokens, channels x patch x patch] to [batch, tokens, width]; its fan-in does not grow."""

    roles: ClassVar[Mapping[str, str]] = roles_of(weight="embedding", bias="bias")


class ViT(nn.Module):
    """Images `[batch, channels, image, image]` to class logits or loss. See `ViTConfig`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.channels * config.patch**2
        self.patch = PatchEmbedding(size, config.width, constraint=None, scaling=config.scaling)
        self.positions = Embedding(config.tokens, config.width, scaling=config.scaling)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = make_norm(config, config.width, "final_norm")
        self.head = LinearReadout(config.width, config.vocab, scaling=config.scaling)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            images: `[batch, channels, image, image]`, about unit variance.
            targets: `[batch]` class indices.

        Returns:
            Logits `[batch, classes]`, or with targets the loss in mean nats per image.
        """
        config = self.config
        side = config.image // config.patch
        patches = images.unflatten(2, (side, config.patch)).unflatten(4, (side, config.patch))  # type: ignore[no-untyped-call]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], config.tokens, -1)
        x = self.patch(patches)
        where = self.positions(torch.arange(config.tokens, device=x.device)).expand_as(x)
        x = F.add(x, where) if config.scaling == "unit" else x + where
        still = torch.ones(config.tokens, config.head_size, device=x.device)  # a rotation by nothing
        run = Pass((still, torch.zeros_like(still)), None, None)
        for index, block in enumerate(self.blocks):
            x = block(x, run, f"blocks.{index}")
        logits: Tensor = self.head(self.norm(x.mean(1)))
        if targets is None:
            return logits
        if config.scaling == "unit":
            return F.cross_entropy(logits, targets, mult=config.alpha_loss)
        return torch_f.cross_entropy(times(logits, config.alpha_loss), targets)
