"""What one does with a trained run folder: evaluate it, sample from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from isoscale import numerics
from isoscale._base.errors import CheckpointError, DataError
from isoscale._base.rng import stream
from isoscale.config import RunConfig
from isoscale.formats.recipes import BF16
from isoscale.models import Decoder
from isoscale.planning import Plan
from isoscale.train import checkpoint
from isoscale.train.data import eval_batches, load_corpus
from isoscale.train.folder import read_config
from isoscale.train.loop import autocast, evaluate, pick_device
from isoscale.train.setup import convert, decoder_config
from isoscale.train.tokenizer import Tokenizer, make_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's loss.

    Args:
        step: of the checkpoint.
        loss: nats per token.
        nats_per_byte: loss / bytes per token of this text.
        perplexity: exp(loss).
        tokens: evaluated.
    """

    step: int
    loss: float
    nats_per_byte: float
    perplexity: float
    tokens: int


def _tokenizer_spec(run: Path, config: RunConfig) -> str:
    """The run's own tokenizer: another text must not train another one."""
    return "bytes" if config.data.tokenizer == "bytes" else str(run / "tokenizer.json")


def load_model(run: Path, vocab: int) -> tuple[Decoder, int]:
    """The model of the newest good checkpoint, on its device and in its recipe, in eval mode; and the step.

    Raises:
        CheckpointError: no run or no checkpoint there, or all of them damaged.
    """
    config = read_config(run)
    saved = checkpoint.load_latest(run)
    if saved is None:
        raise CheckpointError("the run has no checkpoint yet", place=str(run), hint="isoscale train --resume")
    plan = Plan.from_json(saved.plan)
    with torch.device("meta"):
        model = Decoder(decoder_config(config, vocab))
    model.to_empty(device=pick_device(config.train.device))
    plan.apply(model, init=False)
    model.load_state_dict(saved.model)
    recipe = convert(config, model, plan)
    if numerics.summary(model).layers and saved.step > recipe.finish_step(config.train.steps):  # as last trained
        numerics.switch(model, BF16)
    return model.eval(), saved.step


def evaluate_run(run: Path, source: tuple[str, ...] | None = None, batches: int = 64) -> Evaluation:
    """Loss of a run's newest checkpoint on its own validation split, or on that of another text.

    Raises:
        CheckpointError, DataError: nothing to evaluate, or a text that does not fit.
    """
    config = read_config(run)
    torch.set_num_threads(config.train.threads)
    data, accumulate = config.data, config.train.accumulate
    spec = data.tokenizer if source is None else _tokenizer_spec(run, config)
    corpus = load_corpus(source or data.source, spec, val_fraction=data.val_fraction,
                         cache=Path(data.cache) if data.cache else None, seq_len=data.seq_len)  # fmt: skip
    model, step = load_model(run, corpus.vocab)
    device = next(model.parameters()).device
    parts = [
        pair
        for batch in eval_batches(corpus.val, data.seq_len, config.train.batch, batches)
        for pair in zip(*(torch.from_numpy(side).to(device).chunk(accumulate) for side in batch))
    ]
    mean = evaluate(model, model, parts, autocast(config, device))
    count = sum(targets.numel() for _, targets in parts)
    return Evaluation(step, mean, mean / corpus.bytes_per_token, math.exp(min(mean, 700.0)), count)


def generate_text(
    run: Path, prompt: str, tokens: int, *, temperature: float = 0.8, top_k: int | None = None, seed: int = 0
) -> str:
    """Sample `tokens` tokens after a prompt.

    Args:
        run: run folder.
        prompt: text to continue; at least one token.
        tokens: how many to add.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: sample among the k likeliest only.
        seed: the same seed gives the same text.

    Raises:
        CheckpointError: no checkpoint.
        DataError: an empty prompt.
    """
    config = read_config(run)
    torch.set_num_threads(config.train.threads)
    tokenizer: Tokenizer = make_tokenizer(_tokenizer_spec(run, config))
    ids = [int(i) for i in tokenizer.encode(prompt.encode())]
    if not ids:
        raise DataError("the prompt is empty", key="--prompt", hint="at least one character")
    model, _ = load_model(run, tokenizer.vocab)
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(stream(seed, "generate"))
    with torch.no_grad(), autocast(config, device):
        for _ in range(tokens):
            window = torch.tensor([ids[-config.data.seq_len :]], device=device)
            logits = model(window)[0, -1].float().cpu() * model.loss_mult
            if temperature == 0:
                ids.append(int(logits.argmax()))
                continue
            logits = logits / temperature
            if top_k is not None and top_k < logits.numel():
                logits[logits < logits.topk(top_k).values[-1]] = -math.inf
            ids.append(int(torch.multinomial(torch.softmax(logits, -1), 1, generator=draw)))
    return tokenizer.decode(ids)
