"""MXNorm and MXNormLinear: encodings, the straight-through gradients, and everything a module has to put up with."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import isoscale as iso
from isoscale._base.errors import ConfigError
from isoscale.formats import by_name, encode, fake_cast
from isoscale.formats.recipes import LayerFormats, everywhere, recipe_by_name
from isoscale.nn import MXNorm, MXNormLinear
from isoscale.nn.engine import Engine
from isoscale.nn.mxnorm import cast_normed, estimator_for, norm_format
from isoscale.nn.mxnorm_linear import normed_matmul

FORMATS = ("mxfp8_e4m3", "mxfp8_e4m3/rceil", "mxfp8_e5m2/ceil", "mxfp6_e3m2/even", "mxfp6_e2m3", "mxfp4", "mxfp4/even",
           "nvfp4", "mxint8")  # fmt: skip


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * torch.randn(*shape[:-1], 1, generator=draw).exp()).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dim", [256, 100, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_divided_row(name: str, dim: int, dtype: torch.dtype) -> None:
    norm = MXNorm(dim, format=name)
    x = rows(9, dim, dtype=dtype)
    out = norm.encode(x)
    normed = x.float() * (1 / out.rms)
    known = norm.estimator.bound if name == "nvfp4" else None
    want = encode(normed, name, tensor_amax=known)
    assert torch.equal(out.encoded.codes, want.codes)
    assert want.scales is not None
    assert torch.equal(out.encoded.scales, want.scales)  # type: ignore[arg-type]
    assert out.normed is not None
    assert torch.equal(out.normed, normed.to(dtype))
    assert same(norm(x), out.encoded.decode(torch.float32).to(dtype))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e2m3", "mxfp4"])
def test_x_over_r_is_rounded_once(name: str) -> None:
    """Control of the above: an output in bf16 before the cast, as a norm apart would give, makes other codes."""
    x = rows(2000, 256, dtype=torch.bfloat16)
    out = MXNorm(256, format=name).encode(x)
    twice = encode((x.float() * (1 / out.rms)).bfloat16().float(), name)
    assert not torch.equal(twice.codes, out.encoded.codes)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4", "mxfp6_e2m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added_in_the_same_pass(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = MXNorm(100, format=name)
    x, residual = rows(2, 3, 100, dtype=dtype), rows(2, 3, 100, seed=1, dtype=dtype)
    fast = norm.encode(x, residual)
    assert torch.equal(fast.summed, x + residual)  # type: ignore[arg-type]
    monkeypatch.setattr("isoscale.nn.mxnorm.kernel_for", lambda device: "torch")
    for slow in (norm.encode(x, residual), norm.encode(x + residual)):
        assert torch.equal(fast.encoded.codes, slow.encoded.codes)
        assert torch.equal(fast.encoded.scales, slow.encoded.scales)  # type: ignore[arg-type]
        assert torch.equal(fast.rms, slow.rms)
        assert torch.equal(fast.normed, slow.normed)  # type: ignore[arg-type]
        assert fast.encoded.shape == slow.encoded.shape == x.shape
    assert slow.summed is None


def test_inference_keeps_no_high_precision_copy() -> None:
    assert MXNorm(64).eval().encode(rows(2, 64)).normed is None


@pytest.mark.parametrize("name", ["mxfp8_e4m3/rceil", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("special", ["inf", "nan", "zero", "tiny", "subnormal", "huge"])
@pytest.mark.parametrize("kernels", ["", "off"])
def test_odd_rows(name: str, special: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels:
        monkeypatch.setattr("isoscale.nn.mxnorm.kernel_for", lambda device: "torch")
    norm = MXNorm(96, format=name, eps=0.0)
    x = rows(3, 96)
    x[1] = {"inf": math.inf, "nan": math.nan, "zero": 0.0}.get(special, 1.0)
    if special in ("inf", "nan"):
        x[1, 1:] = 1.0  # one bad element
    elif special != "zero":
        x[1] = x[0] * {"tiny": 2.0**-110, "subnormal": 2.0**-140, "huge": 2.0**100}[special]
    out = norm(x)
    assert out[[0, 2]].isfinite().all()
    if special in ("inf", "nan"):
        assert out[1].isnan().all(), "nothing is hidden: the whole row says so"
    elif special == "zero":
        assert out[1].eq(0).all()
    elif special == "subnormal":
        assert float(out[1].abs().max()) < 2, "1 / r is no float32; what comes out is small, not wrong"
    else:
        assert 0.5 < float(out[1].square().mean().sqrt()) < 2


@pytest.mark.parametrize("name", ["mxfp8_e4m3/rceil", "nvfp4", "mxfp6_e3m2"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 500])
def test_kernel_and_composition_have_the_same_bits(name: str, p: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = norm_format(name)
    estimator = estimator_for(dim, fmt, p)
    for dtype in (torch.float32, torch.bfloat16):
        x = rows(40, dim, dtype=dtype)
        fast = cast_normed(x, fmt, estimator, dtype)
        with monkeypatch.context() as patch:
            patch.setattr("isoscale.nn.mxnorm.kernel_for", lambda device: "torch")
            slow = cast_normed(x, fmt, estimator, dtype)
        assert torch.equal(fast[0], slow[0])
        assert torch.equal(fast[1], slow[1])


def test_clamp() -> None:
    x = torch.zeros(1, 1024)
    x[0, 3] = 8.0
    free, bound = MXNorm(1024, p=1), MXNorm(1024, p=1, clamp=32.0)
    assert float(free(x).max()) > 60
    assert float(bound(x).max()) == 32.0
    assert bound.estimator.bound == 32.0


def surrogate(x: Tensor, rms: Tensor) -> Tensor:
    """x / r whose derivative is RMSNorm's with r in the place of the RMS: dr = x dx / (D r)."""
    square = x.square().sum(-1, keepdim=True)
    r = rms.detach() + (square - square.detach()) / (2 * x.shape[-1] * rms.detach())
    return x / r


def test_norm_gradient_is_the_straight_through_definition() -> None:
    x = rows(5, 80).double().requires_grad_()
    norm = MXNorm(80, format="mxfp4")
    g = rows(5, 80, seed=1).double()
    norm(x).backward(g)
    assert x.grad is not None
    found = x.grad.clone()
    x.grad = None
    surrogate(x, norm.estimator.rms(x)).backward(g)
    torch.testing.assert_close(found, x.grad, rtol=1e-12, atol=1e-12)
    x.grad = None
    torch.nn.functional.rms_norm(x, [80]).backward(g)  # control: with the true RMS it is another gradient
    assert float((x.grad - found).norm() / found.norm()) > 1e-2


FORWARD_ONLY = LayerFormats("mxfp8_e4m3/rceil", "mxfp8_e4m3/rceil", "fp32", backward_weight="fp32", backward_input="fp32")


@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("ride", [True, False])
def test_linear_gradients_are_those_of_the_definition(gain: bool, ride: bool) -> None:
    """Backward in full precision: input, gain and weight against autograd of x / r (W gamma)^T in float64."""
    torch.manual_seed(0)
    layer = MXNormLinear(96, 40, bias=True, formats=FORWARD_ONLY, gain=gain, ride=ride).double()
    if layer.gain is not None:
        layer.gain.data.uniform_(0.5, 1.5)
    x = rows(7, 96).double().requires_grad_()
    g = rows(7, 40, seed=1).double()
    layer(x).backward(g)
    leaves = [x, layer.weight, layer.bias, *([layer.gain] if gain else [])]
    found = [leaf.grad.clone() for leaf in leaves]  # type: ignore[union-attr]
    for leaf in leaves:
        leaf.grad = None  # type: ignore[union-attr]
    normed = surrogate(x, layer.estimator.rms(x))
    weight = layer.weight if layer.gain is None else layer.weight * layer.gain
    (torch.nn.functional.linear(normed, weight, layer.bias)).backward(g)  # type: ignore[arg-type]
    for got, leaf in zip(found, leaves):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-12)  # type: ignore[union-attr]


def test_the_definition_has_rmsnorm_s_numerical_gradient_where_the_estimate_is_exact() -> None:
    """Finite differences of RMSNorm, at a row whose estimate equals its RMS."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(1, 64, generator=draw, dtype=torch.float64)
    norm = MXNorm(64, format="mxfp8_e4m3", eps=0.0)
    low, high = 0.1, 10.0
    for _ in range(200):  # scale one block until both agree
        middle = (low + high) / 2
        y = torch.cat([x[:, :32], x[:, 32:].sign() * middle * 0.5 + x[:, 32:] * 0.1], -1)
        ratio = float(norm.estimator.rms(y) / y.square().mean().sqrt())
        low, high = (middle, high) if ratio > 1 else (low, middle)
    y.requires_grad_()
    g = torch.randn(1, 64, generator=draw, dtype=torch.float64)
    norm(y).backward(g)
    assert y.grad is not None
    assert abs(ratio - 1) < 1e-9

    def loss(v: Tensor) -> Tensor:
        return (g * v * torch.rsqrt(v.square().mean(-1, keepdim=True))).sum()

    eye = torch.eye(64, dtype=torch.float64) * 1e-6
    numeric = torch.stack([(loss(y.detach() + e) - loss(y.detach() - e)) / 2e-6 for e in eye])
    torch.testing.assert_close(y.grad[0], numeric, rtol=1e-6, atol=1e-8)


def test_all_casts_by_hand() -> None:
    """Every operand of the three matmuls, written out with `fake_cast`, in float64."""
    name = "mxfp8_e4m3/rceil"
    torch.manual_seed(1)
    layer = MXNormLinear(96, 64, formats=name).double()
    assert layer.gain is not None
    assert layer.weight is not None
    layer.gain.data.uniform_(0.5, 1.5)
    x, g = rows(33, 96).double().requires_grad_(), rows(33, 64, seed=2).double()
    y = layer(x)
    y.backward(g)
    w, gain, rms = layer.weight.detach(), layer.gain.detach(), layer.estimator.rms(x.detach())
    normed = x.detach() / rms
    q = lambda t, axis=-1: fake_cast(t, name, axis=axis)  # noqa: E731
    torch.testing.assert_close(y, q(normed) @ q(w * gain).T, rtol=1e-12, atol=1e-12)
    t = q(g) @ q(w, 0)
    torch.testing.assert_close(layer.gain.grad, (normed * t).sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, (q(g, 0).T @ q(normed, 0)) * gain, rtol=1e-12, atol=1e-12)
    dn = t * gain
    want = dn / rms - x.detach() * (dn * x.detach()).sum(-1, keepdim=True) / (96 * rms**3)
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-12)
    folded = (q(g) @ q(w * gain, 0)) / rms  # control: the gain inside the backward's cast is another gradient
    assert float((folded - dn / rms).norm() / dn.norm()) > 1e-3


def test_unit_scaling_rides_along() -> None:
    """As a unit-scaled RMSNorm and linear one after the other, up to casts and estimate."""
    torch.manual_seed(0)
    fine = "mxint8"
    layer = MXNormLinear(512, 512, formats=fine, scaling="unit")
    norm = iso.nn.RMSNorm(512, elementwise_affine=True)
    linear = iso.nn.Linear(512, 512)
    linear.load_state_dict({"weight": layer.state_dict()["weight"]})
    x, g = rows(256, 512, seed=7), rows(256, 512, seed=4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a, tokens=1024).backward(g)
    linear(norm(b, tokens=1024), tokens=1024).backward(g)
    pairs = [(a.grad, b.grad), (layer.weight.grad, linear.weight.grad), (layer.gain.grad, norm.weight.grad)]  # type: ignore[union-attr]
    for got, want in pairs:
        assert got is not None
        assert want is not None
        error = float((got - want).norm() / want.norm())
        assert error < 0.08, error
    assert abs(float(layer(x).detach().std()) - 1) < 0.05


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp6", "mxfp4", "nvfp4"])
def test_recipes_of_the_backward_pass_work(recipe: str) -> None:
    formats = recipe_by_name(recipe).formats("blocks.0.attn.qkv")
    torch.manual_seed(0)
    layer = MXNormLinear(128, 64, formats=formats)
    x = rows(64, 128).requires_grad_()
    layer(x).square().mean().backward()
    exact = MXNormLinear(128, 64, formats=FORWARD_ONLY)
    exact.load_state_dict(layer.state_dict())
    z = x.detach().clone().requires_grad_()
    exact(z).square().mean().backward()
    assert x.grad is not None
    assert z.grad is not None
    error = float((x.grad - z.grad).norm() / z.grad.norm())
    assert 0 < error < (0.1 if recipe == "mxfp8" else 1.0)


def test_a_switch_to_bf16_keeps_the_statistic() -> None:
    torch.manual_seed(0)
    layer = MXNormLinear(256, 64)
    x = rows(16, 256)
    before = layer(x)
    layer.recast(everywhere("bf16"), "emulated")
    after = layer(x)
    want = (x / layer.estimator.rms(x)) @ layer.weight.T  # type: ignore[union-attr]
    assert float((after - want).norm() / want.norm()) < 5e-3
    assert 5e-3 < float((before - want).norm() / want.norm()) < 0.1


@pytest.mark.slow
def test_compile_gives_the_same() -> None:
    torch.manual_seed(0)
    layer = MXNormLinear(96, 64, formats="mxfp8_e4m3/rceil")
    x = rows(8, 96).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.weight is not None
    assert layer.weight.grad is not None
    want, dw = x.grad.clone(), layer.weight.grad.clone()
    x.grad = None
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True)
    out = compiled(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, dw, rtol=1e-5, atol=1e-4)


def test_transforms() -> None:
    engine, fmt = Engine(everywhere("mxfp8_e4m3/rceil")), norm_format("mxfp8_e4m3/rceil")
    estimator = estimator_for(64, fmt)
    x, w, gain = rows(3, 4, 64), rows(16, 64, seed=1), rows(1, 64, seed=2)[0]
    together = torch.vmap(lambda a: normed_matmul(a, w, gain, engine, estimator))(x)
    torch.testing.assert_close(together[1], normed_matmul(x[1], w, gain, engine, estimator))
    values = torch.vmap(MXNorm(64))(x)
    assert torch.equal(values[2], MXNorm(64)(x[2]))
    _, moved = torch.func.jvp(MXNorm(64), (x[0],), (torch.ones_like(x[0]),))
    back = torch.func.vjp(MXNorm(64), x[0])[1](torch.ones_like(x[0]))[0]
    torch.testing.assert_close(moved, back)  # the Jacobian is symmetric


def test_forward_mode_of_the_linear() -> None:
    layer = MXNormLinear(64, 16, formats=FORWARD_ONLY).double()
    x, w, gain = rows(4, 64).double(), rows(16, 64, seed=1).double(), rows(1, 64, seed=2)[0].double()
    ways = [torch.randn_like(t) for t in (x, w, gain)]

    def call(*args: Tensor) -> Tensor:
        return normed_matmul(*args, layer.engine, layer.estimator)

    _, moved = torch.func.jvp(call, (x, w, gain), tuple(ways))
    rms = layer.estimator.rms(x)
    step = ways[0] / rms - x * (ways[0] * x).sum(-1, keepdim=True) / (64 * rms**3)
    q = lambda t: fake_cast(t, "mxfp8_e4m3/rceil")  # noqa: E731
    want = step @ q(w * gain).T + q(x / rms) @ (ways[1] * gain + w * ways[2]).T
    torch.testing.assert_close(moved, want, rtol=1e-9, atol=1e-9)


def test_copies_and_files() -> None:
    torch.manual_seed(0)
    layer = MXNormLinear(64, 32, bias=True)
    x = rows(3, 64)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = MXNormLinear(64, 32, bias=True)
    assert not torch.equal(other(x), want)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), want)
    assert set(layer.state_dict()) == {"weight", "bias", "gain"}
    assert layer.roles == {"weight": "hidden", "bias": "bias", "gain": "gain"}


def test_autocast_and_low_precision_inputs() -> None:
    layer = MXNormLinear(64, 32)
    x = rows(5, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.weight is not None
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_an_empty_batch() -> None:
    assert MXNorm(64)(torch.zeros(0, 64)).shape == (0, 64)
    assert MXNormLinear(64, 8)(torch.zeros(0, 64)).shape == (0, 8)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MXNorm(64, p=3), "p = 1"),
        (lambda: MXNorm(0), "feature"),
        (lambda: MXNorm(64, format="e4m3"), "blocks of the row"),
        (lambda: MXNorm(64, format="fp8_tensor_e4m3"), "blocks of the row"),
        (lambda: MXNorm(64, format="nvfp4/16x16"), "blocks of the row"),
        (lambda: MXNorm(64, format="mxfp9"), "no such format"),
        (lambda: MXNorm(64, format="nvfp4", estimate="rounded"), "power-of-two"),
        (lambda: MXNorm(65, estimate="rounded"), "whole blocks"),
        (lambda: MXNorm(64, statistic_block=12), "must divide"),
        (lambda: MXNorm(64, estimate="rounded", statistic_block=8), "one number for each scale"),
        (lambda: MXNorm(64)(torch.zeros(2, 64, dtype=torch.long)), "floating-point"),
        (lambda: MXNorm(64)(torch.zeros(2, 32)), "another size"),
        (lambda: MXNorm(64)([1.0]), "floating-point"),
        (lambda: MXNormLinear(64, 8, ride=True, clamp=3.0), "never makes"),
        (lambda: MXNormLinear(64, 8, formats="bf16"), "blocks of the row"),
        (lambda: MXNormLinear(64, 8, formats=LayerFormats("mxfp4", "mxfp4", "mxfp4", hadamard=("forward",))), "Hadamard"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_reason(make: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()


def test_the_static_scale_of_nvfp4_is_the_bound_of_the_output() -> None:
    norm = MXNorm(4096, format="nvfp4")
    encoded = norm.encode(rows(4, 4096)).encoded
    assert encoded.tensor_scale is not None
    assert norm.estimator.bound == pytest.approx(34.13, abs=0.01)
    assert float(encoded.tensor_scale) == pytest.approx(norm.estimator.bound / (6 * 448), rel=1e-6)
    other = norm.encode(rows(4, 4096, seed=8)).encoded
    assert torch.equal(other.tensor_scale, encoded.tensor_scale)  # type: ignore[arg-type]  # no matter what the rows hold


def test_the_output_is_near_that_of_rmsnorm_and_a_cast() -> None:
    x = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    plain = fake_cast(torch.nn.functional.rms_norm(x, [4096]), by_name("mxfp8_e4m3"))
    got = MXNorm(4096)(x)
    assert 0.02 < float((got - plain).norm() / plain.norm()) < 0.04  # 3.1 % is the size of the cast's own error


@pytest.mark.parametrize(("name", "block"), [("mxfp8_e4m3/rceil", 8), ("mxfp8_e4m3", 1), ("nvfp4", 8), ("mxfp4", 4)])
@pytest.mark.parametrize("dim", [1, 7, 9, 31, 33, 100, 2000])
def test_finer_blocks_by_kernel_and_composition(name: str, block: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = norm_format(name)
    for p in (1, 2):
        estimator = estimator_for(dim, fmt, p, statistic_block=block)
        for dtype in (torch.float32, torch.bfloat16):
            x = rows(20, dim, dtype=dtype)
            x[3], x[4, 0] = 0, math.nan
            fast = cast_normed(x, fmt, estimator, dtype)
            with monkeypatch.context() as patch:
                patch.setattr("isoscale.nn.mxnorm.kernel_for", lambda device: "torch")
                slow = cast_normed(x, fmt, estimator, dtype)
            assert same(fast[0], slow[0])
            assert same(fast[1], slow[1])
            coarse = cast_normed(x, fmt, estimator_for(dim, fmt, p), dtype)  # control
            assert dim <= block or not same(coarse[1], fast[1])


def test_finer_statistic_blocks_scatter_less() -> None:
    x = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0))
    true = x.square().mean(-1, keepdim=True).sqrt()
    spread = {}
    for block in (32, 16, 8, 4, 1):
        norm = MXNorm(256, eps=0.0, statistic_block=block)
        ratio = norm.estimator.rms(x) / true
        assert abs(float(ratio.mean()) - 1) < 3e-3
        spread[block] = float(ratio.std())
        assert torch.equal(norm(x), fake_cast(x * (1 / norm.estimator.rms(x)), "mxfp8_e4m3"))
    assert list(spread.values()) == sorted(spread.values(), reverse=True)
    assert spread[8] < 0.56 * spread[32]
    assert spread[1] < 1e-6, "blocks of one element are RMSNorm"
    assert MXNorm(4096, statistic_block=8).estimator.bound < 64, "still below RMSNorm's bound, sqrt(D)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["mxfp8_e4m3/rceil", "mxfp4", "nvfp4"])
def test_a_gpu_gives_the_bits_of_the_cpu(name: str) -> None:
    norm, x = MXNorm(1000, format=name), rows(64, 1000, dtype=torch.bfloat16)
    assert torch.equal(norm(x.cuda()).cpu(), norm(x))
    here, there = norm.encode(x), norm.encode(x.cuda())
    assert torch.equal(there.encoded.codes.cpu(), here.encoded.codes)
    assert torch.equal(there.rms.cpu(), here.rms)
    layer = MXNormLinear(1000, 64, formats=name)
    want = layer(x.float())
    got = copy.deepcopy(layer).cuda()(x.float().cuda()).cpu()
    assert float((got - want).detach().norm() / want.detach().norm()) < 1e-2
