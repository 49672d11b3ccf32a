"""Text goes to ids and comes back."""

import numpy as np
import pytest

from isoscale._base.errors import ConfigError, DataError, MissingDependencyError
from isoscale.train import tokenizer as tok

TEXT = ("It is a truth universally acknowledged, that “quotes” survive — naïve façade 日本 🙂.\n" * 40).encode()


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return tok.make_tokenizer("bpe:300", [TEXT])


def test_bytes_round_trip():
    byte = tok.make_tokenizer("bytes")
    ids = byte.encode(TEXT)
    assert (byte.name, byte.vocab, ids.dtype) == ("bytes", 256, np.uint8)
    assert byte.decode(ids.tolist()) == TEXT.decode()
    assert byte.decode([0xFF]) == "\ufffd"
    assert tok.from_json(byte.to_json(), "bytes").name == "bytes"
    with pytest.raises(DataError):
        byte.decode([256])


def test_bpe_round_trip_and_saves_tokens(bpe):
    ids = bpe.encode(TEXT)
    assert bpe.decode(ids.tolist()) == TEXT.decode()
    assert ids.dtype == np.uint16
    assert len(ids) < len(TEXT)
    assert ids.max() < bpe.vocab == 300


def test_bpe_training_is_deterministic_and_survives_a_file(bpe, tmp_path):
    assert tok.make_tokenizer("bpe:300", [TEXT]).to_json() == bpe.to_json()
    path = tok.save_tokenizer(bpe, tmp_path / "tokenizer.json")
    loaded = tok.make_tokenizer(str(path))
    assert (loaded.encode(TEXT) == bpe.encode(TEXT)).all()
    assert loaded.name.startswith("tokenizer-")


def test_bpe_encodes_any_bytes_it_has_not_seen(bpe):
    text = "Ωmega \x01 ζ 中文\n"
    assert bpe.decode(bpe.encode(text.encode()).tolist()) == text


def test_long_texts_are_encoded_in_pieces(bpe, monkeypatch):
    monkeypatch.setattr(tok, "PIECE", 100)
    assert bpe.decode(bpe.encode(TEXT).tolist()) == TEXT.decode()
    assert len(bpe.encode(b"")) == 0


def test_bpe_names_the_offset_of_bad_utf8(bpe, monkeypatch):
    monkeypatch.setattr(tok, "PIECE", 10)
    with pytest.raises(DataError) as caught:
        bpe.encode(b"0123456789abc\n012\xff")
    assert caught.value.value == "byte 17"


def test_bpe_refuses_ids_it_does_not_have(bpe):
    with pytest.raises(DataError):
        bpe.decode([300])


@pytest.mark.parametrize(
    ("spec", "hint"), [("byte", "bytes"), ("bpe4096", "bpe:4096"), ("bpe:x", "bpe:4096"), ("", "bytes")]
)
def test_unknown_names_get_the_nearest(spec, hint):
    with pytest.raises(ConfigError, match="unknown tokenizer") as caught:
        tok.make_tokenizer(spec)
    assert hint in caught.value.hint
    assert "tokenizer.json" in caught.value.hint


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="256"):
        tok.make_tokenizer("bpe:256", [TEXT])


def test_a_missing_or_wrong_file_is_named(tmp_path):
    with pytest.raises(DataError):
        tok.make_tokenizer(str(tmp_path / "none.json"))
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        tok.make_tokenizer(str(tmp_path / "bad.json"))


def test_without_the_extra_bpe_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError) as caught:
        tok.make_tokenizer("bpe:300", [TEXT])
    assert "isoscale[text]" in caught.value.hint


@pytest.mark.parametrize(("vocab", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_token_dtype(vocab, kind):
    assert tok.token_dtype(vocab) is kind
