"""Tokens on disk and the order in which training sees them.

A corpus is made once: each text is cut into a training part and a validation tail, both are tokenised, and the ids are
kept as NumPy files that are memory-mapped afterwards. The cache key covers content, tokenizer and split.

The order of batches is a pure function of (seed, step), so resuming needs the step number and nothing else, and
data-parallel ranks slice one global stream.

What is lost: texts pass through memory whole while the cache is made; a window may span the seam between two texts.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoscale._base.cache import cache_folder
from isoscale._base.errors import ConfigError, DataError
from isoscale._base.files import atomic_dir, read_json, sha256, write_synced
from isoscale._base.rng import permutation, words
from isoscale.train.texts import Text, find_texts
from isoscale.train.tokenizer import Tokenizer, from_json, is_file_spec, make_tokenizer, token_dtype

CACHE_FORMAT = 1
Batch = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Corpus:
    """Tokens ready to train on.

    Attributes:
        name: the source as given.
        train: token ids, 1-d, memory-mapped, uint8, uint16 or uint32.
        val: token ids of the tails of the texts; shares no byte of text with `train`.
        vocab: number of ids.
        tokenizer: turns ids into text.
        bytes_per_token: of the validation part; a loss in nats per token divided by it is in nats per byte.
        sha256: hash over the hashes of the texts, in order.
    """

    name: str
    train: NDArray[Any]
    val: NDArray[Any]
    vocab: int
    tokenizer: Tokenizer
    bytes_per_token: float
    sha256: str


def load_corpus(
    source: str | Sequence[str],
    tokenizer: str = "bytes",
    *,
    cache: Path | None = None,
    val_fraction: float = 0.1,
    seq_len: int,
) -> Corpus:
    """Finds, checks, splits and tokenises texts, or takes all that from the cache.

    Args:
        source: `builtin:austen+web`, `hub:<dataset>`, files or folders (see `texts.find_texts`).
        tokenizer: `bytes`, `bpe:<ids>` or the path of a `tokenizer.json`.
        cache: folder for token files; by default `cache_folder()`. Several processes may share it.
        val_fraction: share of the bytes at the end of each text kept for validation, in (0, 1).
        seq_len: tokens per sequence, at least 2; each part must hold one sequence and its targets.

    Raises:
        DataError: a missing, empty or binary text (names file and offset), or a part shorter than one sequence.
        ConfigError: a val_fraction or tokenizer out of range.
        StorageError: the cache folder is on a full or read-only disk.
    """
    _check_seq_len(seq_len)
    if not 0 < val_fraction < 1:
        raise ConfigError("a share between 0 and 1, both excluded", key="val_fraction", value=val_fraction, hint="0.1")
    texts = find_texts(source)
    content = hashlib.sha256("\n".join(text.sha256 for text in texts).encode()).hexdigest()
    identity = f"file:{sha256(tokenizer)}" if is_file_spec(tokenizer) and Path(tokenizer).is_file() else tokenizer
    key = json.dumps([CACHE_FORMAT, content, identity, val_fraction])
    folder = (cache or cache_folder()) / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:24]
    name = source if isinstance(source, str) else " ".join(map(str, source))
    corpus = _open(folder, name, content) or _build(folder, name, content, texts, tokenizer, val_fraction)
    for part, tokens in (("train", corpus.train), ("validation", corpus.val)):
        if len(tokens) < seq_len + 1:
            reason = f"the {part} part has {len(tokens)} tokens, one sequence with its targets takes {seq_len + 1}"
            raise DataError(
                reason, key="data", value=name, hint="more text, a shorter seq_len, or another val_fraction"
            )
    return corpus


def _check_seq_len(seq_len: int) -> None:
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 2:
        raise DataError("a sequence needs at least 2 tokens", key="seq_len", value=seq_len)


def split_text(data: bytes, val_fraction: float) -> tuple[bytes, bytes]:
    """The head for training and the tail for validation, cut between two characters."""
    cut = len(data) - int(len(data) * val_fraction)
    while cut < len(data) and data[cut] & 0xC0 == 0x80:  # a UTF-8 continuation byte
        cut += 1
    return data[:cut], data[cut:]


def _build(folder: Path, name: str, content: str, texts: Sequence[Text], spec: str, val_fraction: float) -> Corpus:
    parts = [split_text(text.read(), val_fraction) for text in texts]
    tokenizer = make_tokenizer(spec, [head for head, _ in parts])
    kind = token_dtype(tokenizer.vocab)
    split = {}
    for index, part in enumerate(("train", "val")):
        encoded = [tokenizer.encode(pair[index]).astype(kind, copy=False) for pair in parts]
        split[part] = np.concatenate(encoded) if encoded else np.zeros(0, kind)
    files = {part: _npy(tokens) for part, tokens in split.items()}
    val_bytes = sum(len(tail) for _, tail in parts)
    manifest = {
        "format": CACHE_FORMAT,
        "sha256": content,
        "tokenizer": tokenizer.name,
        "bytes_per_token": val_bytes / max(len(split["val"]), 1),
        "texts": [text.name for text in texts],
        "files": {part: [len(split[part]), split[part].dtype.name, len(data)] for part, data in files.items()},
    }
    try:
        with atomic_dir(folder, replace=_open(folder, name, content) is None and folder.exists()) as temp:
            for part, data in files.items():
                write_synced(temp / f"{part}.npy", data)
            write_synced(temp / "tokenizer.json", tokenizer.to_json())
            write_synced(temp / "manifest.json", json.dumps(manifest, indent=1))
    except (FileExistsError, FileNotFoundError):  # another process made, or is replacing, the same content
        pass
    corpus = _open(folder, name, content)
    if corpus is None:
        raise DataError(
            "the token cache cannot be read back", key="cache", place=str(folder), hint="remove that folder"
        )
    return corpus


def _npy(tokens: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tokens, allow_pickle=False)
    return buffer.getvalue()


def _open(folder: Path, name: str, content: str) -> Corpus | None:
    """The cached corpus, or None when it is missing or its sizes are not those of its manifest."""
    try:
        manifest: Any = read_json(folder / "manifest.json", DataError)
        if manifest["format"] != CACHE_FORMAT or manifest["sha256"] != content:
            return None
        parts = {}
        for part in ("train", "val"):
            count, dtype, size = manifest["files"][part]
            file = folder / f"{part}.npy"
            tokens = np.load(file, mmap_mode="r" if count else None, allow_pickle=False)
            if tokens.shape != (count,) or tokens.dtype.name != dtype or file.stat().st_size != size:
                return None
            parts[part] = tokens
        tokenizer = from_json((folder / "tokenizer.json").read_text(encoding="utf-8"), manifest["tokenizer"])
        ratio = float(manifest["bytes_per_token"])
    except (DataError, OSError, ValueError, KeyError, TypeError):
        return None
    return Corpus(name, parts["train"], parts["val"], tokenizer.vocab, tokenizer, ratio, content)


class TokenStream:
    """Batches of non-overlapping windows, in an order that depends on seed and step only.

    An epoch visits every window once, in a random order, and starts at a random phase, so that the seams between
    windows move from epoch to epoch. Batches run on across epochs without a gap.

    Args:
        tokens: 1-d token ids.
        seq_len: tokens per sequence, >= 2.
        batch: sequences per step, over all ranks, >= 1.
        seed: seed of the run.

    Raises:
        DataError: fewer tokens than one sequence and its targets.
        ConfigError: batch < 1.
    """

    def __init__(self, tokens: NDArray[Any], seq_len: int, batch: int, seed: int) -> None:
        _check_seq_len(seq_len)
        if batch < 1:
            raise ConfigError("at least one sequence per step", key="batch", value=batch)
        if len(tokens) < seq_len + 1:
            raise DataError(f"{len(tokens)} tokens, but one sequence with its targets takes {seq_len + 1}", key="data")
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch, seed
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)
        self._phases = min(seq_len, len(tokens) - self.windows * seq_len)
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def _starts(self, epoch: int) -> NDArray[np.int64]:
        """First token of each window of an epoch, in visiting order; the last two epochs are remembered."""
        if epoch not in self._epochs:
            phase = int(words(1, self.seed, "data", "phase", epoch)[0]) % self._phases
            order = permutation(self.windows, self.seed, "data", "order", epoch)
            self._epochs = {old: starts for old, starts in self._epochs.items() if old == epoch - 1}
            self._epochs[epoch] = order * self.seq_len + phase
        return self._epochs[epoch]

    def _rows(self, first: int, count: int) -> Batch:
        starts = [int(self._starts(row // self.windows)[row % self.windows]) for row in range(first, first + count)]
        return _windows(self.tokens, starts, self.seq_len)

    def span(self, first: int, count: int) -> Batch:
        """Sequences number `first` to `first + count` of the stream: [count, seq_len] each.

        Raises:
            ConfigError: a negative first sequence.
        """
        if first < 0:
            raise ConfigError("a sequence number cannot be negative", key="first", value=first)
        return self._rows(first, count)

    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, each int64 of shape [batch, seq_len]; targets are inputs one token later.

        Raises:
            ConfigError: a negative step.
        """
        return self.slice(step, 0, 1)

    def slice(self, step: int, rank: int, world: int) -> Batch:
        """The rows of `batch(step)` that belong to one of `world` ranks: [batch / world, seq_len] each.

        The ranks' slices, stacked in order, are the global batch.

        Raises:
            ConfigError: a negative step, a rank outside the world, or a batch that does not divide by it.
        """
        if step < 0:
            raise ConfigError("a step cannot be negative", key="step", value=step)
        if world < 1 or not 0 <= rank < world:
            raise ConfigError(f"a rank of a world of {world} is 0 to {world - 1}", key="rank", value=rank)
        if self.batch_size % world:
            hint = f"a multiple of {world}"
            raise ConfigError(f"does not divide among {world} ranks", key="batch", value=self.batch_size, hint=hint)
        local = self.batch_size // world
        return self._rows(step * self.batch_size + rank * local, local)


def _windows(tokens: NDArray[Any], starts: Sequence[int], seq_len: int) -> Batch:
    rows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def eval_batches(tokens: NDArray[Any], seq_len: int, batch: int, count: int) -> Iterator[Batch]:
    """`count` fixed batches of windows spread evenly from the first token to the last; the same at every call.

    Windows overlap only when `batch * count` of them do not fit side by side.

    Raises:
        DataError: fewer tokens than one sequence and its targets.
        ConfigError: batch or count below 1.
    """
    _check_seq_len(seq_len)
    for key, value in (("batch", batch), ("count", count)):
        if value < 1:
            raise ConfigError("at least 1", key=key, value=value)
    last = len(tokens) - seq_len - 1
    if last < 0:
        raise DataError(f"{len(tokens)} tokens, but one sequence with its targets takes {seq_len + 1}", key="data")
    total = batch * count
    starts = [index * last // max(total - 1, 1) for index in range(total)]
    return (_windows(tokens, starts[first : first + batch], seq_len) for first in range(0, total, batch))
