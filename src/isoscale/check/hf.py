"""Hugging Face models at any size, from their config: no weights are read and nothing is fetched.

Width is `hidden_size`: more heads of the same size, MLP and key-value heads in proportion. Depth is the number of
layers. For speed the vocabulary is cut to 512 (the text is bytes, so 256 ids occur), images to 4 x 4 patches, and heads
are made smaller where the smallest width would hold fewer than four of them; what was changed is said.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from isoscale._base.errors import ConfigError, MissingDependencyError, did_you_mean
from isoscale._base.optional import need
from isoscale.planning.hf import resized

VOCAB = 512
KINDS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForImageClassification")


def _read(path: Path) -> Any:
    transformers = need("transformers", "hf")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = [found.name for found in file.parent.glob("*.json")]
        hint = did_you_mean(file.name, near) if near and not path.is_dir() else "a folder that holds one"
        raise ConfigError(f"no {file.name} there", key="TARGET", value=str(path), hint=hint)
    try:
        return transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"not a Hugging Face config: {reason}", key="TARGET", value=str(file)) from error


def _class(config: Any, path: Path) -> Any:
    transformers = need("transformers", "hf")
    name = next(iter(config.architectures or ()), "")
    try:
        if not name:
            name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
        found = getattr(transformers, name, None) if name else None
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"transformers is installed but {name} does not import: {error.__cause__ or error}", key=name
        ) from error
    if found is None or not name.endswith(KINDS):
        hint = f"architectures ending in {', '.join(KINDS)}; or a function: module:function"
        message = f"no way to check the architecture {name or config.model_type!r}"
        raise ConfigError(message, key="architectures", value=config.architectures, place=str(path), hint=hint)
    return found


def _head_size(config: Any) -> int:
    told = getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)


def _smaller_heads(config: Any, size: int) -> None:
    """Cut, in place, every head into heads of `size`."""
    heads = config.hidden_size // size
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int):
        config.num_key_value_heads = heads * groups // config.num_attention_heads
    config.num_attention_heads = heads
    if getattr(config, "head_dim", None):
        config.head_dim = size


def _small(config: Any) -> list[str]:
    """Cut, in place, what costs time and is no width; says what."""
    notes = []
    vocab = getattr(config, "vocab_size", None)
    if isinstance(vocab, int) and vocab > VOCAB:
        config.vocab_size = VOCAB
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            if isinstance(token, int) and token >= VOCAB:
                setattr(config, name, None)
        notes.append(f"vocabulary {vocab} -> {VOCAB}")
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int) and size > 4 * patch:
        config.image_size = 4 * patch
        notes.append(f"images {size} -> {4 * patch} pixels")
    return notes


def hf_builder(path: Path, smallest: int) -> tuple[Callable[[int, int], nn.Module], tuple[str, ...]]:
    """(width, depth) -> model, and what is not as in the config, in words.

    Args:
        path: `config.json`, or the folder that holds it.
        smallest: the smallest width that will be built.

    Raises:
        ConfigError: no config, or one whose model cannot be scaled or trained here.
        MissingDependencyError: transformers is missing.
    """
    config = _read(path)
    kind = _class(config, path)
    missing = [name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
               if not isinstance(getattr(config, name, None), int)]  # fmt: skip
    if missing:
        raise ConfigError(f"the config has no {', '.join(missing)}", key="TARGET", value=str(path),
                          hint="write a function: module:function")  # fmt: skip
    notes = _small(config)
    head = _head_size(config)
    size = head
    while size > 8 and (smallest < 4 * size or smallest % size):
        size = max(8, 1 << (size - 1).bit_length() - 1)
    if size != head:
        _smaller_heads(config, size)
        notes.append(f"head size {head} -> {size}")

    def build(width: int, depth: int) -> nn.Module:
        model: nn.Module = kind(resized(config, width, depth)).float()
        return model

    return build, tuple(notes)


def from_config(path: Path, width: int | None, depth: int | None) -> nn.Module:
    """The model of a config at full size, or at another width or depth; on whatever device is current.

    Args:
        path: `config.json`, or the folder that holds it.
        width: None: as in the config.
        depth: likewise.

    Raises:
        ConfigError: no config, or no class for it.
        PlanError: a size that does not fit.
        MissingDependencyError: transformers is missing.
    """
    config = _read(path)
    kind = _class(config, path)
    model: nn.Module = kind(resized(config, width, depth))
    return model
