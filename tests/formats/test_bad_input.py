"""Right, or a clear error; never wrong bits."""

import pytest
import torch
from oracles import INF, MX, NAN, engine  # noqa: F401

from isoscale import formats as F
from isoscale._base.errors import ConfigError

SOME = ["mxfp4", "mxfp6_e3m2", "nvfp4", "fp8_tensor_e4m3", "fp8_128x128_e4m3", "e4m3", "int8"]
ACTS = {
    "fake_cast": F.fake_cast, "encode": F.encode, "error": F.error, "cast_stats": F.cast_stats,
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_are_not_real_floats(act, dtype):
    with pytest.raises(ConfigError, match=r"x\.float"):
        ACTS[act](torch.zeros(32).to(dtype), "mxfp4")


@pytest.mark.parametrize("act", ACTS)
def test_what_is_no_tensor(act):
    with pytest.raises(ConfigError, match="only tensors"):
        ACTS[act]([1.0, 2.0], "mxfp4")


@pytest.mark.parametrize("act", ACTS)
def test_names_rules_and_axes(act):
    x = torch.ones(4, 32)
    for arguments, says in (
        (("mxfp5",), "mxfp4"), (("mxfp4", {"scale_rule": "flor"}), "floor"), (("nvfp4", {"scale_rule": "floor"}), "amax"),
        (("e4m3", {"scale_rule": "floor"}), "no scale"), (("mxfp4", {"axis": 2}), "-2 to 1"), (("mxfp4", {"axis": -3}), "-2 to 1"),
        (("mxfp4", {"axis": 0.5}), "axis"), (("fp8_tensor_e4m3", {"axis": 7}), "axis"),
    ):  # fmt: skip
        named = arguments[1] if len(arguments) > 1 else {}
        with pytest.raises(ConfigError) as caught:
            ACTS[act](x, arguments[0], **named)
        assert says in str(caught.value)


@pytest.mark.parametrize("name", SOME)
def test_empty_tensors(name, engine):  # noqa: F811
    for shape, axis in (((0,), -1), ((0, 32), -1), ((32, 0), -1), ((3, 0, 5), 1)):
        x = torch.empty(shape)
        assert F.fake_cast(x, name, axis=axis).shape == shape
        found = F.encode(x, name, axis=axis)
        assert found.decode().shape == shape
        assert found.nbytes_stored() <= 4
        assert [float(share) for share in F.cast_stats(x, name, axis=axis)] == [0, 0]


@pytest.mark.parametrize("name", SOME)
def test_a_0_d_tensor_is_a_block_of_one(name, engine):  # noqa: F811
    x = torch.tensor(1.3)
    want = F.fake_cast(x.view(1), name)[0]
    found = F.fake_cast(x, name)
    assert found.shape == ()
    assert found == want
    assert F.encode(x, name).decode() == want
    assert F.encode(x, name).decode().shape == ()


@pytest.mark.parametrize("name", SOME)
def test_views_that_are_not_contiguous(name, engine):  # noqa: F811
    x = torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(0))
    for view in (x.transpose(0, 1), x[::2, 1:], x[..., 1], x.new_ones(1, 32).expand(64, 32), x.permute(2, 0, 1)):
        want = F.fake_cast(view.contiguous(), name)
        before = view.clone()
        assert torch.equal(F.fake_cast(view, name), want)
        assert torch.equal(F.encode(view, name).decode(), want)
        assert torch.equal(view, before)
        first = F.fake_cast(view.contiguous(), name, axis=0)
        assert torch.equal(F.fake_cast(view, name, axis=0), first)


@pytest.mark.parametrize("name", [*MX, "nvfp4"])
def test_blocks_of_zeros_of_nan_and_with_minus_zero(name, engine):  # noqa: F811
    x = torch.zeros(3, 32)
    x[1] = NAN
    x[2, ::2] = -0.0
    y = F.fake_cast(x, name)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
    keeps = F.by_name(name).element.has_negative_zero
    assert y[2].signbit().tolist() == ([True, False] * 16 if keeps else [False] * 32)
    assert torch.equal(F.encode(x, name).decode()[2].signbit(), y[2].signbit())


def test_nan_in_a_format_that_has_none(engine):  # noqa: F811
    x = torch.tensor([1.0, NAN])
    assert F.fake_cast(x, "e2m1").isnan().tolist() == [False, True]  # values can say it, codes cannot
    for name in ("e2m1", "e3m2", "int8"):
        with pytest.raises(ConfigError, match="has no code"):
            F.encode(x, name)
    assert F.encode(x, "e4m3").codes.tolist()[1] == 0x7F
    assert F.encode(torch.tensor([INF, -INF]), "e2m1").decode().tolist() == [6, -6]


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_wide_formats_are_not_stored_as_codes(name):
    with pytest.raises(ConfigError, match="torch"):
        F.encode(torch.ones(4), name)


def test_gradients_stay_with_fake_cast():
    x = torch.ones(32, requires_grad=True)
    assert not F.encode(x, "mxfp4").requires_grad
    assert F.fake_cast(x, "mxfp4").requires_grad


@pytest.mark.parametrize("name", ["nvfp4", "fp8_row_e4m3", "fp8_tensor_e5m2", "fp8_128x128_e4m3", "mxfp4", "mxfp8_e4m3"])
def test_float64_decodes_to_what_fake_cast_gives_and_saturates(name):
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(F.encode(x, name).decode(), F.fake_cast(x, name))
    huge = F.fake_cast(torch.full((32,), 1e300, dtype=torch.float64), name)
    assert huge.isfinite().all() or name.startswith("fp8_")  # the largest float32 may round to inf there
    assert not huge.isnan().any()


def test_encoded_and_meta_tensors_are_named():
    found = F.encode(torch.ones(4, 32), "mxfp4")
    for act in (F.fake_cast, F.encode, F.error):
        with pytest.raises(ConfigError, match="encoded already"):
            act(found, "mxfp4")
    with pytest.raises(ConfigError, match="no values"):
        F.error(torch.ones(4, 32, device="meta"), "mxfp4")
    with pytest.raises(ConfigError, match="no such format"):
        F.fake_cast(torch.ones(4), 42)
    with pytest.raises(ConfigError, match="no such block"):
        F.BlockFormat("mine", F.E2M1, 32)
