"""Model families made of `isoscale.nn`."""

from isoscale.models.decoder import Decoder, DecoderConfig, Site

__all__ = ["Decoder", "DecoderConfig", "Site"]
