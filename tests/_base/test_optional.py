"""A missing package is asked for by name."""

import sys

import pytest

from isoscale._base.errors import MissingDependencyError
from isoscale._base.optional import need


def test_need_imports():
    assert need("json.decoder", "text").JSONDecoder


def test_a_missing_package_gets_an_install_hint():
    with pytest.raises(MissingDependencyError, match="is not installed") as caught:
        need("no_such_package_here.sub", "text")
    assert caught.value.hint == 'pip install "isoscale[text]"'


def test_a_broken_package_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package_x.py").write_text("import not_there_y")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"does not import.*not_there_y"):
        need("broken_package_x", "text")
    assert "broken_package_x" not in sys.modules
