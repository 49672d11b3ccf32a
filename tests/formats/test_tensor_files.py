"""Encoded tensors in safetensors files."""

import json

import pytest
import torch
from safetensors import safe_open

from isoscale import formats as F
from isoscale._base.errors import ConfigError


@pytest.mark.parametrize("name", ["mxfp4/rceil", "mxfp6_e3m2", "nvfp4", "mxfp8_e4m3/16x16", "fp8_row_e4m3", "e2m1"])
def test_round_trip(tmp_path, name):
    x = torch.randn(48, 64).bfloat16()
    path = tmp_path / "w.safetensors"
    F.save_tensors(path, {"w": F.encode(x, name, axis=0), "bias": x[0]})
    back = F.load_tensors(path)
    want = F.encode(x, name, axis=0)
    assert set(back) == {"w", "bias"}
    found = back["w"]
    assert isinstance(found, F.BlockTensor)
    assert (found.format, found.axis, found.shape, found.dtype) == (want.format, 0, want.shape, torch.bfloat16)
    assert torch.equal(found.codes, want.codes)
    assert torch.equal(found.decode(), want.decode())
    assert torch.equal(back["bias"], x[0])


def test_any_reader_can_open_it(tmp_path):
    path = tmp_path / "w.safetensors"
    F.save_tensors(path, {"w": F.encode(torch.ones(4, 32), "mxfp4")})
    with safe_open(str(path), framework="np") as file:
        assert sorted(file.keys()) == ["w.codes", "w.scales"]
        assert json.loads(file.metadata()["isoscale.formats"])["w"]["format"] == "mxfp4/floor"
        assert file.get_tensor("w.codes").shape == (4, 16)


def test_what_cannot_be_saved_or_read(tmp_path):
    mine = F.BlockFormat("mine", F.E2M1, (1, 8))
    with pytest.raises(ConfigError, match="own formats are saved"):
        F.save_tensors(tmp_path / "a", {"w": F.encode(torch.ones(8), mine)})
    with pytest.raises(ConfigError, match="two tensors of one name"):
        F.save_tensors(tmp_path / "a", {"w.codes": torch.ones(1), "w": F.encode(torch.ones(8), "mxfp4")})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot read"):
        F.load_tensors(tmp_path / "none.safetensors")
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ConfigError, match="cannot read"):
        F.load_tensors(tmp_path / "torn")


def test_views_of_one_tensor_are_saved_apart(tmp_path):
    w = F.encode(torch.randn(64, 64), "mxfp4")
    F.save_tensors(tmp_path / "w", {"a": w, "b": w.t()})
    back = F.load_tensors(tmp_path / "w")
    assert torch.equal(back["b"].decode(), back["a"].decode().t())
    with pytest.raises(ConfigError, match="only tensors"):
        F.save_tensors(tmp_path / "w", {"a": 3})
