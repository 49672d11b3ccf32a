"""An example input for a model that came without one.

The order of knowledge: what the user gave; what a Hugging Face or timm config says; isoscale's own models; the first
layer (an embedding wants integers, a convolution an image, a linear layer a vector).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from isoscale._base.errors import PlanError
from isoscale.models import Decoder, ViT
from isoscale.planning.names import normalise

_BATCH, _LENGTH, _IMAGE = 2, 8, 32


@dataclass(frozen=True)
class Example:
    """Arguments of one forward.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        signature: of the forward, for messages.
        said: where they come from, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: str
    said: str


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _ids(high: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if device.type == "meta":
        return torch.zeros(shape, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(3, high - 1), high, shape, generator=generator).to(device)


def _noise(shape: tuple[int, ...], model: nn.Module, device: torch.device) -> torch.Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def _bare(model: nn.Module) -> nn.Module:
    """The model inside compile and data-parallel wrappers."""
    while True:
        children = dict(model.named_children())
        wrapped = [c for n, c in children.items() if normalise(n) == "" or (n == "module" and len(children) == 1)]
        inner = next(iter(wrapped), None)
        if inner is None:
            return model
        model = inner


def _required(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds]


def _hugging_face(model: nn.Module, device: torch.device) -> dict[str, Any] | None:
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str) or not hasattr(config, "to_dict"):
        return None
    text = getattr(config, "text_config", None) or config
    takes = inspect.signature(model.forward).parameters
    vocab = getattr(text, "vocab_size", None)
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or _LENGTH
    out: dict[str, Any] = {}
    if isinstance(vocab, int):
        ids = _ids(vocab, (_BATCH, min(_LENGTH, int(longest))), device)
        if "input_ids" in takes:
            out["input_ids"] = ids
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            out["decoder_input_ids"] = ids.clone()
    vision = getattr(config, "vision_config", None) or config
    if "pixel_values" in takes and (main == "pixel_values" or hasattr(config, "vision_config")):
        size = _pair(getattr(vision, "image_size", None) or 4 * _IMAGE)
        out["pixel_values"] = _noise((_BATCH, getattr(vision, "num_channels", 3), *size), model, device)
    if main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        out[main] = _noise((_BATCH, config.num_mel_bins, 2 * config.max_source_positions), model, device)
    if main not in out:
        return None
    if "use_cache" in takes:
        out["use_cache"] = False
    return out


def _timm(model: nn.Module, device: torch.device) -> torch.Tensor | None:
    said = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(said, dict) or "input_size" not in said:
        return None
    channels, *size = said["input_size"]
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)  # what it was built for wins
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels)
    return _noise((_BATCH, channels, *(_pair(patches) if patches is not None else size)), model, device)


def _first_layer(model: nn.Module, device: torch.device) -> torch.Tensor | None:
    """By the first layer that has a say; tables of positions shorten the sequence."""
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return _ids(module.num_embeddings, (_BATCH, min(_LENGTH, *tables)), device)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            extents = (_IMAGE,) * (len(module.kernel_size))
            return _noise((_BATCH, module.in_channels, *extents), model, device)
        if isinstance(module, nn.Linear):
            return _noise((_BATCH, module.in_features), model, device)
        if isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            attend = module.self_attn if isinstance(module, nn.TransformerEncoderLayer) else module
            return _noise((_BATCH, _LENGTH, int(attend.embed_dim)), model, device)
    return None


def make_example(model: nn.Module, example: object = None) -> Example:
    """Arguments for one forward of `model`, on its device.

    Args:
        model: any module.
        example: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or None to guess.

    Raises:
        PlanError: `example` is of another type, or nothing could be guessed.
    """
    try:
        signature = str(inspect.signature(model.forward))
    except (TypeError, ValueError):
        signature = "(...)"
    device = _device(model)

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(place(item) for item in value)
        if isinstance(value, dict):
            return {key: place(item) for key, item in value.items()}
        return value

    if isinstance(example, torch.Tensor):
        return Example((place(example),), {}, signature, "the given example")
    if isinstance(example, (list, tuple)):
        return Example(tuple(place(item) for item in example), {}, signature, "the given example")
    if isinstance(example, dict):
        return Example((), place(example), signature, "the given example")
    if example is not None:
        raise PlanError(
            f"an example is a tensor, a tuple or a dict, not a {type(example).__name__}", key="example", value=example,
            hint=f"the arguments of forward{signature}",
        )  # fmt: skip
    return _guess(model, signature, device)


def _guess(model: nn.Module, signature: str, device: torch.device) -> Example:
    bare, said = _bare(model), "a guessed example"
    if isinstance(bare, Decoder):
        return Example((_ids(bare.config.vocab, (_BATCH, _LENGTH), device),), {}, signature, said)
    if isinstance(bare, ViT):
        shape = (_BATCH, bare.config.channels, bare.config.image, bare.config.image)
        return Example((_noise(shape, model, device),), {}, signature, said)
    if (named := _hugging_face(bare, device)) is not None:
        return Example((), named, signature, said)
    needs = _required(bare)
    if len(needs) <= 1:
        image = _timm(bare, device)
        guess = image if image is not None else _first_layer(bare, device)
        if guess is not None:
            return Example((guess,), {}, signature, said)
    raise PlanError(
        f"no example can be guessed for {type(bare).__name__}, whose forward needs {', '.join(needs) or 'nothing'}",
        key="example", hint=f"give example= (a tensor, a tuple or a dict) for forward{signature}",
    )  # fmt: skip
