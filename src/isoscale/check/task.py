"""What a model is trained on during a check: real text as bytes, or one fixed batch.

A model of token ids gets text, new sequences at every step; any other gets one fixed batch: its own example, or random
images. Labels are drawn once. Dropout is off throughout, since the check compares two passes over one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale._base.rng import stream
from isoscale.check.subject import Built
from isoscale.models import Decoder
from isoscale.train.data import TokenStream, load_corpus

TEXT = "builtin:austen+web"
BATCH, SEQ_LEN, IMAGES = 8, 64, 16
_HINT = "return (model, example), or (model, batch, loss) with loss(model, batch) -> scalar"


@dataclass(frozen=True)
class Task:
    """Batches and a loss.

    Args:
        batch: step -> batch.
        loss: (model, batch) -> scalar.
        say: what it is, in words.
        baseline: loss in nats of predicting the next id from the one before; a run above it has hardly learned. None
            where there is no such number.
    """

    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    say: str
    baseline: float | None = None


def logits_of(output: Any) -> Tensor | None:
    """The tensor to take a loss of, in what a model returned; None if there is none."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else None


def call(model: nn.Module, example: Any) -> Any:
    """The model on an example: a mapping as keywords, a tuple as arguments, anything else as the one argument."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@cache
def bigram(vocab: int, data: str | None) -> float:
    """Entropy of a byte of the text given the one before, modulo the vocabulary, in nats."""
    ids = torch.from_numpy(load_corpus(data or TEXT, seq_len=SEQ_LEN).train[:1_000_000].astype("int64")) % vocab
    top = int(ids.max()) + 1
    counts = torch.bincount(ids[:-1] * top + ids[1:], minlength=top * top).view(top, top).double()
    likely = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float(-torch.special.xlogy(counts, likely).sum() / counts.sum())


def text_stream(vocab: int, batch: int, seq_len: int, seed: int, data: str | None) -> Callable[[int], Any]:
    """step -> (ids, targets), each `[batch, seq_len]`: bytes of real text, modulo the vocabulary."""
    corpus = load_corpus(data or TEXT, seq_len=seq_len)
    tokens = TokenStream(corpus.train, seq_len, batch, stream(seed, "check", "data"))

    def draw(step: int) -> tuple[Tensor, Tensor]:
        ids, targets = tokens.batch(step)
        return torch.from_numpy(ids) % vocab, torch.from_numpy(targets) % vocab

    return draw


def _next_token(output: Any, targets: Tensor) -> Tensor:
    logits = logits_of(output)
    if logits is None or logits.dim() != 3:
        shape = None if logits is None else tuple(logits.shape)
        raise ConfigError("token ids went in, but no logits [batch, length, vocab] came out", key="TARGET",
                          value=shape, hint=_HINT)  # fmt: skip
    return torch_f.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _text(vocab: int, shape: tuple[int, int], seed: int, data: str | None, run: Callable[..., Any]) -> Task:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return _next_token(run(model, batch[0]), batch[1])

    return Task(text_stream(vocab, *shape, seed, data), loss, "next byte of text", bigram(vocab, data))


def _labelled(model: nn.Module, example: Any, seed: int) -> Task:
    """Cross-entropy of `[batch, classes]` outputs with labels drawn once."""
    with torch.no_grad():
        logits = logits_of(call(model, example))
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
        shape = None if logits is None else tuple(logits.shape)
        raise ConfigError("no loss is known for this output", key="TARGET", value=shape, hint=_HINT)
    generator = torch.Generator().manual_seed(stream(seed, "check", "labels"))
    draws = torch.rand(logits.shape[0], generator=generator)
    labels = (draws.square() * logits.shape[1]).long()  # uneven: real labels, too, have a part that samples share

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = logits_of(call(model, batch))
        assert found is not None
        return torch_f.cross_entropy(found.float(), labels)

    return Task(lambda step: example, loss, "a fixed batch with random labels")


def _images(channels: int, height: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream(seed, "check", "images"))
    return torch.randn(IMAGES, channels, height, width, generator=generator)


def _hugging_face(model: nn.Module, config: Any, seed: int, data: str | None) -> Task | None:
    """For models of transformers: by their config."""
    if isinstance(size := getattr(config, "image_size", None), int):
        pixels = _images(getattr(config, "num_channels", 3), size, size, seed)
        return _labelled(model, {"pixel_values": pixels}, seed)
    if not isinstance(vocab := getattr(config, "vocab_size", None), int):
        return None
    length = min(SEQ_LEN, getattr(config, "max_position_embeddings", None) or SEQ_LEN)
    if not type(model).__name__.endswith("ForMaskedLM"):
        return _text(vocab, (BATCH, length), seed, data, lambda m, ids: m(input_ids=ids, use_cache=False))
    draw = text_stream(vocab, BATCH, length, seed, data)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        ids = batch[0].clone()
        ids[:, ::6] = vocab - 1  # the mask; bytes below 256 leave the last id free in any real vocabulary
        labels = torch.full_like(ids, -100)
        labels[:, ::6] = batch[0][:, ::6]
        return _next_token(model(input_ids=ids), labels)

    return Task(draw, loss, "masked bytes of text")


def _unsaid(model: nn.Module, seed: int, data: str | None) -> Task:
    """For a model that came without an example."""
    told = getattr(model, "pretrained_cfg", None) or {}  # timm's
    if isinstance(size := told.get("input_size"), tuple):
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:]
        return _labelled(model, _images(size[0], height, width, seed), seed)
    table = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if table is None:
        raise ConfigError("what goes into this model is not known", key="TARGET", hint=_HINT)
    try:
        with torch.no_grad():
            model(torch.zeros(1, SEQ_LEN, dtype=torch.long))
    except Exception as error:  # a user's model may raise anything
        message = f"token ids of shape [1, {SEQ_LEN}] do not fit: {type(error).__name__}: {error}"
        raise ConfigError(message, key="TARGET", hint=_HINT) from error
    return _text(table.num_embeddings, (BATCH, SEQ_LEN), seed, data, call)


def make_task(built: Built, seed: int, data: str | None) -> Task:
    """Batches and the loss for a model.

    Args:
        built: the model, and what its builder said.
        seed: of the data order, images and labels.
        data: text file or folder; None: the text that comes with isoscale.

    Raises:
        ConfigError: it cannot be told what goes in, or what the loss is; says what to return.
        DataError: no such text.
    """
    model, example = built.model, built.example
    if built.loss is not None:
        return Task(lambda step: example, built.loss, "its own batch and loss")
    if isinstance(model, Decoder):
        draw = text_stream(model.config.vocab, BATCH, SEQ_LEN, seed, data)
        return Task(draw, lambda m, batch: m(*batch), "next byte of text", bigram(model.config.vocab, data))
    if example is None:
        task = _hugging_face(model, getattr(model, "config", None), seed, data)
        return task or _unsaid(model, seed, data)
    if isinstance(example, Tensor) and not example.is_floating_point() and example.dim() == 2:
        with torch.no_grad():
            logits = logits_of(call(model, example))
        if logits is not None and logits.dim() == 3:
            return _text(logits.shape[-1], (example.shape[0], example.shape[1]), seed, data, call)
    return _labelled(model, example, seed)
