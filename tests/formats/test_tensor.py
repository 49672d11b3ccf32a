"""BlockTensor: bytes, round trips, what is exact on codes, what is refused, compilation."""

import copy

import pytest
import torch
from oracles import engine  # noqa: F401

from isoscale import formats as F
from isoscale._base.errors import ConfigError

NAMES = [fmt.name for fmt in F.BLOCKS] + ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8", "int4", "e4m3_fnuz", "e3m4", "e8m0"]


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp8_e4m3", 8.25), ("mxfp8_e5m2", 8.25), ("mxfp6_e3m2", 6.25), ("mxfp6_e2m3", 6.25), ("mxfp4", 4.25),
     ("mxint8", 8.25), ("nvfp4", 4.5), ("e3m2", 6.0), ("e2m1", 4.0)],
)  # fmt: skip
def test_packed_sizes_by_bytes(name, bits, engine):  # noqa: F811
    x = sample(128, 512)
    found = F.encode(x, name)
    tensor = 0 if found.tensor_scale is None else found.tensor_scale.nbytes
    assert found.nbytes_stored() - tensor == x.numel() * bits / 8
    assert found.codes.nbytes == x.numel() * found.element.bits / 8
    assert found.codes.dtype == torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_decode_gives_the_values_of_fake_cast(name, engine):  # noqa: F811
    x = sample(3, 40, 70).abs() if name == "e8m0" else sample(3, 40, 70)
    for axis in (0, 1, 2):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = x.to(dtype)
            found = F.encode(y, name, axis=axis)
            assert (found.shape, found.dtype, found.axis) == (y.shape, dtype, axis)
            want = F.fake_cast(y, name, axis=axis)
            assert torch.equal(found.decode(), want)
            if dtype != torch.float16:
                assert torch.equal(F.encode(y.float(), name, axis=axis).decode(dtype), want)


def test_codes_are_packed_as_documented(engine):  # noqa: F811
    x = torch.tensor([0.5, -6.0, 1.0, -0.0, 3.0])
    found = F.encode(x, "e2m1")
    assert found.codes.tolist() == [0x1 | 0xF << 4, 0x2 | 0x8 << 4, 0x5]
    assert found.unpacked().tolist() == [0x1, 0xF, 0x2, 0x8, 0x5]
    six = F.encode(torch.tensor([0.0625, 28.0, -28.0, 1.0, -0.25]), "e3m2")
    codes = [1, 0x1F, 0x3F, 3 << 2, 0x20 | 1 << 2]
    assert six.unpacked().tolist() == codes
    word = codes[0] | codes[1] << 6 | codes[2] << 12 | codes[3] << 18
    assert six.codes.tolist() == [*word.to_bytes(3, "little"), codes[4], 0, 0]
    assert F.encode(torch.tensor([-1.0, 127 / 64, -1 / 64]), "int8").codes.tolist() == [192, 127, 255]


@pytest.mark.parametrize("fmt", [f for f in F.ELEMENTS if f.bits in (4, 6, 8) and f.layout != "scale"], ids=str)
def test_all_codes_both_ways(fmt, engine):  # noqa: F811
    values = torch.tensor([fmt.value(code) for code in range(fmt.code_count)])
    finite = values.isfinite()
    if fmt.layout == "twos":
        finite[fmt.code_count // 2] = False  # the lowest code is never written
    codes = F.encode(values[finite], fmt).unpacked()
    assert codes.tolist() == torch.arange(fmt.code_count)[finite].tolist()
    from isoscale.formats.codes import pack

    whole = F.BlockTensor(pack(torch.arange(fmt.code_count), fmt.bits), None, None, fmt, 0, (fmt.code_count,), torch.float32)
    decoded = whole.decode()
    assert torch.equal(decoded.nan_to_num(nan=77.0), values.nan_to_num(nan=77.0))
    assert torch.equal(decoded.signbit()[finite], values.signbit()[finite])


def test_e8m0_both_ways():
    codes = torch.arange(256).to(torch.uint8)
    values = F.BlockTensor(codes, None, None, F.E8M0, 0, (256,), torch.float32).decode()
    assert torch.equal(values[:255], torch.exp2(torch.arange(-127.0, 128)))
    assert values[255].isnan()
    assert torch.equal(F.encode(values, "e8m0").codes, codes)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "nvfp4", "fp8_row_e4m3", "fp8_tensor_e4m3", "e4m3", "mxfp8_e4m3/16x16"])
def test_transposes_and_permutes_are_exact(name, engine):  # noqa: F811
    x = sample(64, 96)
    found = F.encode(x, name)
    values = found.decode()
    for turned, want in ((found.t(), values.t()), (found.T, values.T), (found.mT, values.mT), (found.transpose(0, 1), values.t())):
        assert turned.shape == want.shape
        assert torch.equal(turned.decode(), want)
        assert turned.axis == 0
    assert torch.equal(found.t().t().decode(), values)
    assert found.t().codes.data_ptr() == found.codes.data_ptr()  # nothing is copied
    if "/" not in name:
        y = F.encode(sample(5, 6, 64), name, axis=1)
        assert torch.equal(y.permute(2, 0, 1).decode(), y.decode().permute(2, 0, 1))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "nvfp4", "mxint8", "e4m3", "fp8_row_e4m3", "fp8_tensor_e5m2"])
def test_slices_are_exact(name, engine):  # noqa: F811
    found = F.encode(sample(6, 10, 96), name)
    values = found.decode()
    for index in ((slice(1, 4),), (slice(None), slice(2, 9, 3)), (2,), (slice(0, 0),)):
        if name == "fp8_tensor_e5m2" and index == (2,):
            continue
        assert torch.equal(found[index].decode(), values[index])
    for start, stop in ((0, 32), (32, 96), (64, 70), (0, 50)):
        assert torch.equal(found[..., start:stop].decode(), values[..., start:stop])
    turned = F.encode(sample(96, 10), name, axis=0)
    assert torch.equal(turned[32:].decode(), turned.decode()[32:])
    assert torch.equal(turned[:, 3:7].decode(), turned.decode()[:, 3:7])


def test_slices_of_tiles(engine):  # noqa: F811
    found = F.encode(sample(64, 96), "mxfp4/16x16")
    assert torch.equal(found[16:48, 32:].decode(), found.decode()[16:48, 32:])
    with pytest.raises(ConfigError, match="multiple of 16"):
        found[8:]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda t: t[:, 8:], "multiple of 32"), (lambda t: t[:, ::2], "starts where a block starts"),
        (lambda t: t[:, 3], "no block"), (lambda t: t + 1, "decode"), (lambda t: t.relu(), "decode"),
        (lambda t: t.view(-1), "tear blocks apart"), (lambda t: t.reshape(2, -1), "decode"), (lambda t: t.sum(), "decode"),
        (lambda t: t.copy_(torch.ones(64, 96)), "same format"), (lambda t: torch.cat([t, t]), "decode"),
        (lambda t: t.zero_(), "decode"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused(act, says):
    found = F.encode(sample(64, 96), "mxfp4")
    with pytest.raises(ConfigError, match=says):
        act(found)


def test_use_as_a_weight(engine):  # noqa: F811
    x, weight = sample(5, 96), F.encode(sample(64, 96, seed=1), "mxfp6_e3m2")
    plain = weight.decode()
    assert torch.equal(torch.nn.functional.linear(x, weight), x @ plain.t())
    assert torch.equal(x @ weight.t(), x @ plain.t())
    assert torch.equal(torch.addmm(torch.ones(64), x, weight.t()), torch.addmm(torch.ones(64), x, plain.t()))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "nvfp4", "e4m3", "fp8_tensor_e4m3", "mxfp8_e4m3/16x16"])
def test_both_ways(name, engine):  # noqa: F811
    x = sample(40, 70)
    rows, columns = F.encode_both(x, name)
    assert torch.equal(rows.decode(), F.fake_cast(x, name, axis=1))
    assert torch.equal(columns.decode(), F.fake_cast(x, name, axis=0))
    assert (rows.axis, columns.axis) == (1, 0)
    random = F.encode_both(x, name, rounding="stochastic", seed=3)
    assert torch.equal(random[1].decode(), F.fake_cast(x, name, axis=0, rounding="stochastic", seed=3))
    with pytest.raises(ConfigError, match="only a matrix"):
        F.encode_both(sample(2, 3, 4), name)


def test_copies_and_moves():
    found = F.encode(sample(4, 64), "nvfp4")
    for other in (found.clone(), found.detach(), copy.deepcopy(found), found.cpu(), found.to("cpu")):
        assert torch.equal(other.decode(), found.decode())
    assert found.clone().codes.data_ptr() != found.codes.data_ptr()
    half = found.to(torch.bfloat16)
    assert half.dtype == half.decode().dtype == torch.bfloat16
    into = F.encode(torch.zeros(4, 64), "nvfp4")
    into.copy_(found)
    assert torch.equal(into.decode(), found.decode())
    parameter = torch.nn.Parameter(found, requires_grad=False)
    assert torch.equal(parameter.decode(), found.decode())


def test_repr_says_what_it_is():
    assert repr(F.encode(sample(4, 64), "mxfp4/rceil")) == (
        "BlockTensor([4, 64], mxfp4/rceil, axis=1, 4.25 bits a value, float32, cpu)"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "nvfp4", "fp8_128x128_e4m3", "mxint8"])
def test_compiled(name):
    torch.compiler.reset()
    x = sample(40, 96)
    found = F.encode(x, name)
    assert torch.equal(torch.compile(lambda t: t.decode() * 2, fullgraph=True)(found), found.decode() * 2)
    made = torch.compile(lambda t: F.encode(t, name), fullgraph=True)(x)
    assert isinstance(made, F.BlockTensor)
    assert torch.equal(made.codes, found.codes)
    assert torch.equal(made.scales, found.scales)
    product = torch.compile(lambda t, w: t @ w.t(), fullgraph=True)
    torch.testing.assert_close(product(x, found), x @ found.decode().t())


def test_a_deferred_device():
    with torch.device("meta"):
        x = torch.empty(8, 64)
    found = F.encode(x, "mxfp6_e2m3")
    assert (found.device.type, found.codes.shape, found.scales.shape) == ("meta", (8, 48), (8, 2))
    assert F.fake_cast(x, "nvfp4").is_meta
