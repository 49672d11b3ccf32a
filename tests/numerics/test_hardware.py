"""Scale layouts against torchao, kinds, refusals by name; products against torch's own FP8 loop. `gpu`: real kernels."""

from __future__ import annotations

import pytest
import torch

from isoscale._base.errors import ConfigError
from isoscale.formats import by_name, encode, fake_cast
from isoscale.formats.recipes import FP8, LayerFormats, everywhere
from isoscale.nn.engine import Engine, cast_matmul
from isoscale.nn.hardware import KINDS, encode_operand, family, kind_of, multiply
from isoscale.numerics import capabilities, pick_backend, swizzle
from isoscale.numerics.backend import why_emulated

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(128, 4), (256, 8), (1, 1), (130, 5), (384, 12), (32, 3)])
def test_swizzle_is_torchaos(shape: tuple[int, int]) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.randint(1, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = swizzle(scales)
    assert torch.equal(ours, utils.to_blocked(scales).flatten())
    assert ours.numel() == (-(-shape[0] // 128) * 128) * (-(-shape[1] // 4) * 4)
    if shape[0] > 32:
        assert not torch.equal(ours[: scales.numel()], scales.flatten())  # the order did change


def test_swizzle_puts_row_r_and_block_c_where_cublas_reads_them() -> None:
    scales = torch.arange(256 * 8).view(256, 8)
    ours = swizzle(scales)
    for r, c in ((0, 0), (31, 3), (32, 0), (127, 3), (128, 0), (200, 7)):
        tile = (r // 128) * 2 + c // 4
        assert ours[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] == scales[r, c]


@pytest.mark.parametrize(("left", "right", "kind"), [
    ("e4m3", "e5m2", "fp8"), ("e5m2", "e5m2", None), ("e4m3", "bf16", None), ("fp8_tensor_e4m3", "fp8_tensor_e5m2", "fp8"),
    ("fp8_row_e4m3", "fp8_row_e4m3", "fp8_row"), ("fp8_1x128_e4m3", "fp8_128x128_e4m3", "fp8_block"),
    ("fp8_128x128_e4m3", "fp8_128x128_e4m3", None), ("mxfp8_e4m3/rceil", "mxfp8_e5m2", "mxfp8"), ("mxfp4", "mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4", "nvfp4"), ("mxfp4", "nvfp4", None), ("mxfp6_e3m2", "mxfp6_e3m2", None),
    ("mxfp4/16x16", "mxfp4", None), ("mxint8", "mxint8", None), ("e4m3", "fp8_tensor_e4m3", None), ("e2m1", "e2m1", None),
])  # fmt: skip
def test_which_pairs_a_kernel_multiplies(left: str, right: str, kind: str | None) -> None:
    assert kind_of(by_name(left), by_name(right)) == kind
    assert kind_of(by_name(left), None) is None


def test_a_cpu_has_none_and_says_so_by_name() -> None:
    found = capabilities(CPU)
    assert set(found) == set(KINDS)
    assert all(f"{kind} runs on CUDA devices, this is cpu" == reason for kind, reason in found.items())


class FakeCuda:
    """A stand-in for a device with a compute capability and a CUDA version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        self.device = torch.device("cuda")


@pytest.mark.parametrize(("capability", "cuda", "has"), [
    ((8, 0), "12.9", set()), ((8, 9), "12.9", {"fp8"}), ((9, 0), "12.8", {"fp8", "fp8_row"}),
    ((9, 0), "12.9", {"fp8", "fp8_row", "fp8_block"}), ((10, 0), "12.9", {"fp8", "fp8_row", "mxfp8", "mxfp4", "nvfp4"}),
    ((12, 0), "13.0", {"fp8", "fp8_row", "mxfp8", "mxfp4", "nvfp4"}),
])  # fmt: skip
def test_the_capability_table(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, has: set[str]) -> None:
    found = capabilities(FakeCuda(monkeypatch, capability, cuda).device)
    assert {kind for kind, reason in found.items() if not reason} == has


def test_backends_are_picked_by_formats_sizes_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCuda(monkeypatch, (9, 0), "12.9").device
    blocks = LayerFormats("fp8_128x128_e4m3", "fp8_1x128_e4m3", "fp8_1x128_e4m3")
    assert pick_backend("auto", device, FP8, (64, 128)) == "scaled_mm"
    assert pick_backend("auto", device, blocks, (256, 128)) == "scaled_mm"
    assert pick_backend("auto", device, everywhere("mxfp8_e4m3"), (256, 128)) == "emulated"
    assert pick_backend("emulated", device, FP8, (64, 128)) == "emulated"
    assert pick_backend("scaled_mm", device, everywhere("bf16"), (64, 3)) == "emulated"  # plain matmuls: nothing to refuse
    for formats, features, reason in (
        (FP8, (64, 100), "fp8 needs features that are multiples of 16, not 100"),
        (blocks, (64, 128), "multiples of 128, not 64"),
        (everywhere("mxfp8_e4m3"), (64, 128), "mxfp8 needs compute capability 10.0, this device has 9.0"),
        (everywhere("mxfp6_e3m2"), (64, 128), "no kernel multiplies mxfp6_e3m2/floor by mxfp6_e3m2/floor"),
    ):
        assert reason in why_emulated(formats, device, features)
        with pytest.raises(ConfigError) as caught:
            pick_backend("scaled_mm", device, formats, features, "blocks.0.mlp.down")
        assert reason in caught.value.place
        assert caught.value.place.startswith("blocks.0.mlp.down: ")
    later = FakeCuda(monkeypatch, (10, 0), "12.9").device
    assert "exactly 9.0" in why_emulated(blocks, later, (128, 128))


@pytest.mark.parametrize(("left", "right"), [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("fp8_tensor_e4m3", "fp8_tensor_e5m2"),
                                             ("fp8_row_e4m3", "fp8_row_e4m3")])  # fmt: skip
def test_torchs_reference_loop_agrees_with_the_emulation(left: str, right: str) -> None:
    """The same codes through `_scaled_mm`'s loop on a CPU: equal up to the order of fp32 sums. 50 is padded to 64."""
    formats = LayerFormats(right, left, right)
    x, w = torch.randn(33, 50), torch.randn(48, 50)
    pair = formats.pairs[0]
    if "_" in left:
        ours = multiply(encode_operand(x, pair[0], -1), encode_operand(w, pair[1], -1), pair, 0.125)  # type: ignore[arg-type]
    else:
        ours = multiply(fake_cast(x, left), fake_cast(w, right), pair, 0.125)
    theirs = cast_matmul(x, w, Engine(formats), (0.125, 1.0, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    other = cast_matmul(x, w, Engine(everywhere("bf16")), (0.125, 1.0, 1.0))
    assert not torch.allclose(ours, other, rtol=1e-3, atol=1e-3)  # the control: other operands


def test_a_whole_layer_through_the_reference_loop() -> None:
    """All three matmuls, codes along their own contraction, odd tokens padded."""
    formats = LayerFormats("fp8_row_e4m3", "fp8_row_e4m3", "fp8_row_e4m3")
    x, w, g = torch.randn(21, 32), torch.randn(48, 32), torch.randn(21, 48)
    found = []
    for backend in ("emulated", "scaled_mm"):
        left, right = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = cast_matmul(left, right, Engine(formats, backend), (0.5, 0.25, 2.0))
        found.append([y, *torch.autograd.grad(y, (left, right), g)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("mxfp8_e4m3", torch.float8_e8m0fnu), ("mxfp4", torch.float8_e8m0fnu),
                                             ("nvfp4", torch.float8_e4m3fn), ("fp8_1x128_e4m3", torch.float32),
                                             ("fp8_128x128_e4m3", torch.float32)])  # fmt: skip
def test_what_a_kernel_is_given(name: str, dtype: torch.dtype) -> None:
    fmt = by_name(name)
    x = torch.randn(160, 320)
    codes = encode_operand(x, fmt, -1)  # type: ignore[arg-type]
    plain = encode(x, fmt)
    assert codes.scales.dtype == dtype
    width = 384 if family(fmt) == "fp8_block" else 320  # padded to whole blocks
    assert codes.codes.shape == (160, width * fmt.element.bits // 8)  # type: ignore[union-attr]
    assert torch.equal(codes.codes.view(torch.uint8), plain.codes)
    if family(fmt) == "fp8_block":
        tiled = fmt.block[0] == 128  # type: ignore[union-attr]
        assert codes.scales.shape == ((4, 2) if tiled else (160, 3))
        assert codes.scales.stride() == ((1, 4) if tiled else (1, 160))
    flipped = encode_operand(x.t().contiguous(), fmt, -2)  # type: ignore[arg-type]
    assert torch.equal(flipped.codes.view(torch.uint8), codes.codes.view(torch.uint8))


GPU = ["e4m3", "fp8_tensor_e4m3", "fp8_row_e4m3", "fp8_1x128_e4m3", "fp8_128x128_e4m3", "mxfp8_e4m3", "mxfp4", "nvfp4"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU)
def test_tensor_cores_and_emulation_agree(name: str) -> None:
    """Same operands, other order and width of sums: within a bf16 ulp of the largest product."""
    right = "fp8_1x128_e4m3" if name == "fp8_128x128_e4m3" else name
    formats = LayerFormats(weight=name, input=right, grad=right)
    device = torch.device("cuda")
    if reason := why_emulated(LayerFormats(name, right), device, (256, 384)):
        pytest.skip(reason)
    x, w = torch.randn(200, 256, device=device), torch.randn(384, 256, device=device)
    real = cast_matmul(x, w, Engine(formats, "scaled_mm"))
    emulated = cast_matmul(x, w, Engine(formats))
    assert (real - emulated).abs().max() <= 2**-7 * emulated.abs().max()
