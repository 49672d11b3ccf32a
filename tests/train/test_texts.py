"""Texts are found, and what is no text is named."""

import hashlib
import sys
import types

import pytest

from isoscale._base.errors import DataError, MissingDependencyError
from isoscale.train.texts import BUILTIN, check_text, find_texts


def test_builtin_texts_are_those_shipped():
    texts = find_texts("builtin:austen+web")
    assert [text.name for text in texts] == ["builtin:austen", "builtin:web"]
    for text in texts:
        data = text.read()
        assert hashlib.sha256(data).hexdigest() == text.sha256
        assert check_text(data, text.name)
    assert len(find_texts("builtin:web")) == 1


def test_a_changed_builtin_is_refused(monkeypatch):
    monkeypatch.setitem(BUILTIN, "web", (BUILTIN["web"][0], "0" * 64))
    with pytest.raises(DataError, match="not the one shipped"):
        find_texts("builtin:web")[0].read()


def test_unknown_builtin():
    with pytest.raises(DataError) as caught:
        find_texts("builtin:austin")
    assert "austen" in caught.value.hint


def test_folders_in_sorted_order_without_hidden_and_empty_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.txt", ".git/config", "c/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text("")
    texts = find_texts([str(tmp_path), str(tmp_path / "b.txt")])
    assert [text.read().decode() for text in texts] == ["a/b.txt", "a/z.md", "b.txt", "b.txt"]


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        find_texts(str(tmp_path / "shakespear.txt"))
    assert str(tmp_path / "shakespeare.txt") in caught.value.hint
    with pytest.raises(DataError) as caught:
        find_texts(str(tmp_path / "zzzz"))
    assert "builtin:" in caught.value.hint
    with pytest.raises(DataError) as caught:
        find_texts(str(tmp_path / "no" / "file"))
    assert "does not exist" in caught.value.hint


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="no text"):
        find_texts(str(tmp_path))
    with pytest.raises(DataError, match="no text"):
        find_texts([])


@pytest.mark.parametrize(
    ("data", "message", "offset"),
    [
        (b"", "empty", ""),
        (b"abc\0d", "NUL", "byte 3"),
        ("é".encode("latin1"), "UTF-8", "byte 0"),
        (b"ab\xe2\x82", "UTF-8", "byte 2"),
    ],
)
def test_what_is_no_text_is_named_with_the_offset(tmp_path, data, message, offset):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    [text] = find_texts(str(path))
    with pytest.raises(DataError, match=message) as caught:
        text.read()
    assert str(path) in caught.value.place
    assert offset in caught.value.place


class Rows(dict):
    column_names = ("text",)


def test_a_hub_dataset_is_one_text(monkeypatch):
    fake = types.SimpleNamespace(load_dataset=lambda name, split: Rows(text=["a", "b"]))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    [text] = find_texts("hub:some/set")
    assert (text.name, text.read()) == ("hub:some/set", b"a\n\nb")


def test_a_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError):
        find_texts("hub:some/set")
