"""Text to token ids and back: raw bytes by default, byte-level BPE as an extra.

Why bytes first: no dependency, nothing to train, no unknown characters, and losses are in nats per byte, which compare
across texts. BPE is trained on the training part of the user's own text, so it needs no download.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isoscale._base.errors import ConfigError, DataError, did_you_mean
from isoscale._base.files import atomic_write
from isoscale._base.optional import need

PIECE = 1 << 20  # bytes of text encoded at a time, which bounds memory; pieces end at a line end


class Tokenizer(Protocol):
    """What the data layer needs of a tokenizer."""

    @property
    def name(self) -> str:
        """Short name, such as `bytes` or `bpe:4096`."""

    @property
    def vocab(self) -> int:
        """Number of ids; every id is below it."""

    def encode(self, text: bytes) -> NDArray[Any]:
        """Ids of a UTF-8 text, 1-d, in the smallest of uint8, uint16, uint32 that holds them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; what is no valid UTF-8 becomes the replacement character."""

    def to_json(self) -> str:
        """All that is needed to rebuild it, as JSON; `from_json` is the inverse."""


def token_dtype(vocab: int) -> type[np.unsignedinteger[Any]]:
    """The smallest unsigned type that holds the ids 0 to vocab - 1."""
    return np.uint8 if vocab <= 1 << 8 else np.uint16 if vocab <= 1 << 16 else np.uint32


class ByteTokenizer:
    """Each byte is a token; 256 ids."""

    name, vocab = "bytes", 256

    def encode(self, text: bytes) -> NDArray[np.uint8]:
        """The bytes themselves."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some bytes.

        Raises:
            DataError: an id outside 0 to 255.
        """
        try:
            return bytes(int(one) for one in ids).decode(errors="replace")
        except ValueError as error:
            raise DataError("a byte token is 0 to 255", key="ids") from error

    def to_json(self) -> str:
        """A constant."""
        return '{"isoscale": "bytes"}'


class BpeTokenizer:
    """Byte-level BPE (as GPT-2 splits and spells it), trained locally or loaded from a `tokenizer.json`.

    Args:
        text: the JSON of the `tokenizers` library.
        name: how to call it.

    Raises:
        MissingDependencyError: the extra `text` is not installed.
        DataError: not the JSON of a tokenizer.
    """

    def __init__(self, text: str, name: str) -> None:
        library = need("tokenizers", "text")
        try:
            self._inner = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"not a tokenizer: {error}", key="tokenizer", value=name) from error
        self.name = name
        ids = self._inner.get_vocab(with_added_tokens=True).values()
        self.vocab: int = max(ids, default=-1) + 1
        if self.vocab < 1:
            raise DataError("this tokenizer has no tokens", key="tokenizer", value=name)

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab: int) -> BpeTokenizer:
        """Trains on some texts: the same texts in the same order give the same tokenizer.

        Args:
            texts: UTF-8 texts, the training part only.
            vocab: ids wanted, at least 257 (all bytes and one merge). A short text may give fewer.
        """
        if vocab <= 256:
            hint = "bpe:4096, or `bytes` for no merges"
            raise ConfigError(
                "a byte-level BPE has more than 256 ids", key="tokenizer", value=f"bpe:{vocab}", hint=hint
            )
        library = need("tokenizers", "text")
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        trainer = library.trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
        inner.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        return cls(inner.to_str(), f"bpe:{vocab}")

    def encode(self, text: bytes) -> NDArray[Any]:
        """Ids of a UTF-8 text. Long texts are split at line ends about every 1 MiB, where no token spans the cut."""
        kind = token_dtype(self.vocab)
        parts = [np.array(self._inner.encode(one, add_special_tokens=False).ids, dtype=kind) for one in _pieces(text)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids.

        Raises:
            DataError: an id outside the vocabulary.
        """
        wrong = [int(one) for one in ids if not 0 <= int(one) < self.vocab]
        if wrong:
            raise DataError(f"a token of {self.name} is 0 to {self.vocab - 1}", key="ids", value=wrong[0])
        return str(self._inner.decode([int(one) for one in ids], skip_special_tokens=False))

    def to_json(self) -> str:
        """The `tokenizer.json` of the `tokenizers` library."""
        return str(self._inner.to_str())


def _pieces(text: bytes) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE
        cut = text.find(b"\n", end) + 1 if end < len(text) else 0
        piece = text[start : cut or len(text)]
        try:
            yield piece.decode()
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8", key="text", value=f"byte {start + error.start}") from error
        start += len(piece)


def from_json(text: str, name: str) -> Tokenizer:
    """Rebuilds a tokenizer from its `to_json`."""
    byte = ByteTokenizer()
    return byte if text == byte.to_json() else BpeTokenizer(text, name)


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> Path:
    """Writes `tokenizer.json` atomically."""
    return atomic_write(path, tokenizer.to_json())


def make_tokenizer(spec: str, train_texts: Iterable[bytes] = ()) -> Tokenizer:
    """The tokenizer that a setting names.

    Args:
        spec: `bytes`, `bpe:<ids>` (trained on `train_texts`), or the path of a `tokenizer.json`.
        train_texts: UTF-8 texts, the training part only.

    Raises:
        ConfigError: an unknown name; says the nearest.
        DataError: the file is missing or no tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if is_file_spec(spec):
        try:
            text = Path(spec).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("cannot read this tokenizer file", key="tokenizer", place=spec) from error
        return BpeTokenizer(text, f"{Path(spec).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size.isascii() and size.isdigit():
        return BpeTokenizer.train(train_texts, int(size))
    hint = did_you_mean(spec, ("bytes", "bpe:4096"))
    raise ConfigError(
        "unknown tokenizer", key="tokenizer", value=spec, hint=f"{hint.rstrip('?')}, or a path to a tokenizer.json"
    )


def is_file_spec(spec: str) -> bool:
    """Whether a tokenizer setting means a file."""
    return spec.endswith(".json") or Path(spec).is_file()
