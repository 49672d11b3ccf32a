"""The compiled kernels against the definition of a cast, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cast_oracle import Answer, draw, edges, same, spec_of, unpacked

from isoscale._base.errors import ConfigError
from isoscale.formats.block import BLOCKS, SCALE_RULES, BlockFormat, by_name
from isoscale.formats.element import ELEMENTS, ElementFormat
from isoscale.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
BARE = tuple(e for e in ELEMENTS if e.bits <= 8 and e.layout != "scale")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = (0x12345678, 0x9ABCDEF0)
ALL = [pytest.param(f, id=f.name) for f in (*BLOCKS, *BARE)]


def nan_code(fmt: ElementFormat | BlockFormat) -> int:
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    return next((codes[0] for codes in element.nan_codes if codes), -1)


def check(x: torch.Tensor, fmt: ElementFormat | BlockFormat, shape: tuple[int, int, int], strided: bool = False, *,
          block: tuple[int, int] | None = None, fake: bool = True, **how: object) -> None:  # fmt: skip
    """fake_cast, encode and decode against the oracle."""
    spec = spec_of(fmt, *(block or (None, None)))
    if how.get("rounding") == "stochastic":
        how = {"keys": KEYS, "random_bits": 23, **how}
    want = Answer(x, fmt, spec, shape, strided, **{("random_bits_" if k == "random_bits" else k): v for k, v in how.items()})  # type: ignore[arg-type]
    L, R, n = want.values.shape
    if fake and not (fmt in BARE and not spec.twos and not fmt.has_negative_zero):  # type: ignore[union-attr]
        got = cpu.fake_cast(x, spec, shape, strided, **how)  # type: ignore[arg-type]
        assert same(got.reshape(shape), want.in_shape(x.dtype, strided))
    codes, scales, tensor = cpu.encode(x, spec, shape, strided, nan_code=nan_code(fmt), **how)  # type: ignore[arg-type]
    assert codes.shape == want.codes.shape
    width = want.loose.shape[-1]
    loose = unpacked(codes.numpy(), spec.bits)
    assert (loose[..., width:] == 0).all()
    special = np.broadcast_to(want.special, want.loose.shape)
    assert ((loose[..., :width] == want.loose) | special).all()
    if scales is None:
        assert want.scales is None
        assert (loose[..., :width][special] == max(nan_code(fmt), 0)).all()
    else:
        assert same(scales, torch.from_numpy(want.scales))
    if tensor is not None:
        assert tensor.dtype == torch.float32
        assert float(tensor) == float(want.tensor_scale)
    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
    back = cpu.decode(codes, scales, tensor, spec, (L, R, n), x.dtype, element.specials)
    values = want.values
    if not element.has_negative_zero:
        values = torch.where(values == 0, 0.0, values)
    if element.has_nan or spec.scale != "none":
        assert same(back, values.to(x.dtype))


@pytest.mark.parametrize("fmt", ALL)
def test_every_format_dtype_and_layout(fmt: ElementFormat | BlockFormat) -> None:
    for seed, dtype in enumerate(DTYPES):
        for special in (False, True):
            x = draw((2, 37, 70), seed, dtype, special=special, wide=True)
            check(x, fmt, (2, 37, 70))
            check(x[0].contiguous(), fmt, (1, 37, 70))
            if isinstance(fmt, ElementFormat) or fmt.block[0] == 1:
                check(x, fmt, (2, 37, 70), True)


@pytest.mark.parametrize("rounding", cpu.ROUNDINGS)
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "fp8_row_e5m2", "fp8_tensor_e4m3", "e3m4", "int4"])
def test_every_rounding(name: str, rounding: str) -> None:
    fmt = by_name(name)
    for dtype in (torch.float32, torch.bfloat16):
        x = draw((3, 20, 65), 5, dtype, special=dtype == torch.bfloat16)
        check(x, fmt, (3, 20, 65), rounding=rounding)
        if isinstance(fmt, ElementFormat) or fmt.block[0] == 1:
            check(x, fmt, (3, 20, 65), True, rounding=rounding)


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("fmt", [pytest.param(f, id=f.name) for f in BLOCKS if f.block in ((1, 32), (1, 128))])
def test_every_rule_where_it_turns(fmt: BlockFormat, rule: str) -> None:
    if fmt.scale == "e8m0" and rule == "amax":
        pytest.skip("e8m0 holds powers of two")
    fmt = fmt.with_(scale_rule=rule, block=(1, 32))
    x = edges(spec_of(fmt))
    check(x, fmt, (1, *x.shape))
    check(x.t().contiguous(), fmt, (1, *x.t().shape), True)
    check(x.bfloat16(), fmt, (1, *x.shape))


@pytest.mark.parametrize("block", [(1, 5), (1, 16), (1, 7), (4, 8), (16, 16), (3, 700), (0, 32), (1, 0), (0, 0), (64, 1)])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "mxfp8_e5m2", "nvfp4", "fp8_1x128_e4m3"])
def test_any_block(name: str, block: tuple[int, int]) -> None:
    fmt = by_name(name)
    for dtype in (torch.float32, torch.bfloat16):
        x = draw((2, 41, 1501), 3, dtype, special=True, wide=True)
        check(x, fmt, (2, 41, 1501), block=block)
        if block[0] == 1:
            check(x, fmt, (2, 1501, 41), True, block=block)
            check(x, fmt, (2, 1501, 41), True, block=block, rounding="stochastic", random_bits=7)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 32, 33, 4097, 70001])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2", "fp8_tensor_e4m3", "fp8_row_e4m3", "nvfp4", "e3m2", "int8"])
def test_odd_tails(name: str, n: int) -> None:
    x = draw((n,), n)
    check(x, by_name(name), (1, 1, n))
    check(x, by_name(name), (1, 1, n), rounding="stochastic")
    if not name.startswith("fp8_tensor"):
        check(x, by_name(name), (1, n, 1), True)
        check(x, by_name(name), (n, 1, 1), True)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 32), (2, 3, 0)])
def test_nothing_to_cast(shape: tuple[int, int, int]) -> None:
    spec = spec_of(by_name("mxfp4"))
    x = torch.empty(shape)
    assert cpu.fake_cast(x, spec, shape).shape == shape
    assert cpu.encode(x, spec, shape)[0].numel() == 0


@pytest.mark.parametrize("offset", [0, 2**32 - 100, 2**40 + 17])
@pytest.mark.parametrize("bits", [1, 8, 23])
def test_random_bits_follow_the_index(bits: int, offset: int) -> None:
    how = {"rounding": "stochastic", "random_bits": bits, "offset": offset}
    x = draw((2, 30, 64), 1)
    for name in ("mxfp4", "e4m3"):
        check(x, by_name(name), (2, 30, 64), **how)
        check(x, by_name(name), (2, 30, 64), True, **how)


def test_a_piece_gets_the_bits_of_the_whole() -> None:
    x, spec = draw((64, 128), 1), spec_of(by_name("mxfp4"))
    how = {"rounding": "stochastic", "keys": KEYS, "random_bits": 23}
    whole = cpu.fake_cast(x, spec, (1, 64, 128), **how)  # type: ignore[arg-type]
    piece = cpu.fake_cast(x[10:20].contiguous(), spec, (1, 10, 128), offset=10 * 128, **how)  # type: ignore[arg-type]
    assert same(piece, whole[10:20])
    other = cpu.fake_cast(x[10:20].contiguous(), spec, (1, 10, 128), **how)  # type: ignore[arg-type]
    assert not same(other, whole[10:20])


def test_a_known_tensor_amax() -> None:
    x = draw((1, 8, 64), 2)
    for amax in (0.0, 1e-30, 3.0, 1e5, 3.4e38):
        check(x, by_name("nvfp4"), (1, 8, 64), tensor_amax=amax)
        check(x, by_name("nvfp4"), (1, 8, 64), True, tensor_amax=amax)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e3m2", "nvfp4", "fp8_tensor_e4m3", "fp8_128x128_e4m3", "e4m3"])
def test_threads_do_not_change_a_bit(name: str) -> None:
    fmt = by_name(name)
    spec, x, before = spec_of(fmt), draw((1, 700, 768), 4, special=True), torch.get_num_threads()
    layouts = [False, True] if spec.rows == 1 else [False]
    try:
        for strided in layouts:
            for how in ({}, {"rounding": "stochastic", "keys": KEYS, "random_bits": 9}):
                got = []
                for threads in (1, 2, 7):
                    torch.set_num_threads(threads)
                    parts = cpu.encode(x, spec, x.shape, strided, **how)  # type: ignore[arg-type]
                    rows = (1, 768, 700) if strided else (1, 700, 768)
                    element = fmt if isinstance(fmt, ElementFormat) else fmt.element
                    back = cpu.decode(*parts, spec, rows, torch.float32, element.specials)
                    got.append([cpu.fake_cast(x, spec, x.shape, strided, **how), back, *(p for p in parts if p is not None)])  # type: ignore[arg-type]
                for other in got[1:]:
                    assert all(same(a, b) for a, b in zip(got[0], other))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fmt", [pytest.param(f, id=f.name) for f in BARE])
def test_every_code_decodes_to_its_value(fmt: ElementFormat) -> None:
    spec = spec_of(fmt)
    codes = torch.arange(256, dtype=torch.uint8)
    loose = unpacked(codes.numpy()[None, None, :252], spec.bits)[0, 0]
    n = len(loose)
    packed = codes[:252].view(1, 1, -1)
    want = torch.tensor([fmt.value(int(code)) for code in loose])
    assert same(cpu.decode(packed, None, None, spec, (1, 1, n), torch.float32, fmt.specials)[0, 0], want)
    if spec.bits == 8:
        want = torch.tensor([fmt.value(code) for code in range(256)])
        for dtype in DTYPES:
            got = cpu.decode(codes.view(1, 1, -1), None, None, spec, (1, 1, 256), dtype, fmt.specials)
            assert same(got[0, 0], want.to(dtype))


def test_refusals() -> None:
    spec, x = spec_of(by_name("mxfp4")), torch.ones(4, 32)
    with pytest.raises(ConfigError, match="contiguous"):
        cpu.fake_cast(x, spec, (1, 4, 33))
    with pytest.raises(ConfigError, match="contiguous"):
        cpu.fake_cast(x.t(), spec, (1, 32, 4))
    with pytest.raises(ConfigError, match="not known"):
        cpu.fake_cast(x, spec, (1, 4, 32), rounding="nearest")
    with pytest.raises(ConfigError, match="keys"):
        cpu.fake_cast(x, spec, (1, 4, 32), rounding="stochastic")
    codes, scales, _ = cpu.encode(x, spec, (1, 4, 32))
    with pytest.raises(ConfigError, match="size"):
        cpu.decode(codes, scales, None, spec, (1, 5, 32), torch.float32)
    with pytest.raises(ConfigError, match="missing"):
        cpu.decode(codes, None, None, spec, (1, 4, 32), torch.float32)


def test_the_oracle_can_disagree() -> None:
    """A control: another rule gives other bits, so equal bits mean something."""
    x = draw((1, 8, 64), 2)
    want = Answer(x, by_name("mxfp4"), spec_of(by_name("mxfp4")), (1, 8, 64))
    got = cpu.fake_cast(x, spec_of(by_name("mxfp4/rceil")), (1, 8, 64))
    assert not same(got, want.values)
