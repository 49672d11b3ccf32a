"""Model families made of `isoscale.nn`."""

from isoscale.models.decoder import Decoder, DecoderConfig, Site
from isoscale.models.vit import PatchEmbedding, ViT, ViTConfig

__all__ = ["Decoder", "DecoderConfig", "PatchEmbedding", "Site", "ViT", "ViTConfig"]
