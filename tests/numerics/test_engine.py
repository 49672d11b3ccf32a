"""The three matmuls of every recipe, against casts along the right axes and a float64 product; the wrong axis differs."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isoscale.formats import by_name, fake_cast
from isoscale.formats.recipes import RECIPES, LayerFormats, everywhere
from isoscale.nn.engine import Engine, cast_matmul, holds, same_along_both_axes
from isoscale.numerics import Linear

TREATED = ("mxfp4", "nvfp4")  # more than casts to nearest: test_recipes_products.py
FORMATS = {name: recipe.formats("blocks.0.attn.qkv") for name, recipe in RECIPES.items() if name not in TREATED} | {
    "tiles": LayerFormats("mxfp4/rceil/16x16", "mxfp4/rceil", "mxfp6_e2m3/rceil"),
    "deepseek-like": LayerFormats("fp8_128x128_e4m3", "fp8_1x128_e4m3", "fp8_1x128_e4m3"),
    "rows": everywhere("fp8_row_e4m3"),
    "int8": everywhere("mxint8"),
    "overrides": LayerFormats("mxfp8_e4m3", "mxfp8_e4m3", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e5m2"),
    "nothing": LayerFormats(),
}
# mxfp8/rceil: power-of-two scales that clip nothing round an 8-bit float alike in any block, but for subnormals.
BLOCKED = sorted(name for name, f in FORMATS.items() if name not in ("mxfp8", "mxfp8-e5m2-grad")
                 and any("/" in n and "tensor" not in n for p in f.passes.values() for n in p))  # fmt: skip


def draws(tokens: int = 50, fan_in: int = 40, fan_out: int = 36, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [tokens, in], w [out, in] and a gradient [tokens, out], of uneven scale, sizes that no block divides."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((tokens, fan_in), (fan_out, fan_in), (tokens, fan_out))
    return [(torch.randn(s, generator=draw) * torch.randn(s, generator=draw).exp()).to(dtype) for s in shapes]


def cast(x: Tensor, name: str, axis: int) -> Tensor:
    return x.double() if name == "fp32" else fake_cast(x.float(), name, axis=axis).double()


def expected(formats: LayerFormats, x: Tensor, w: Tensor, g: Tensor, flip: bool = False) -> list[tuple[Tensor, Tensor]]:
    """(y, dx, dw) in float64, each with the product of magnitudes that bounds its error; `flip` casts the wrong axes."""
    (fx, fw), (gx, gw), (hg, hx) = formats.passes.values()
    last, first = (0, 1) if flip else (1, 0)
    pairs = [
        (cast(x, fx, last), cast(w, fw, last).t()),
        (cast(g, gx, last), cast(w, gw, first)),
        (cast(g, hg, first).t(), cast(x, hx, first)),
    ]
    return [(a @ b, a.abs() @ b.abs()) for a, b in pairs]


def products(formats: LayerFormats, x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = cast_matmul(x, w, Engine(formats))
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def excess(found: list[Tensor], wanted: list[tuple[Tensor, Tensor]], ulp: float) -> list[float]:
    """Largest error over its bound: k roundings of fp32 accumulation, and one to the output's dtype."""
    out = []
    for ours, (value, size) in zip(found, wanted):
        bound = 64 * 2.0**-24 * size + ulp * value.abs() + 1e-30
        out.append(float(((ours.double() - value).abs() / bound).max()))
    return out


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_product_is_that_of_its_casts(name: str, dtype: torch.dtype) -> None:
    x, w, g = draws(dtype=dtype)
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    assert max(excess(products(FORMATS[name], x, w, g), expected(FORMATS[name], x, w, g), ulp)) <= 1


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_along_the_wrong_axis_give_another_product(name: str) -> None:
    """The control. Where nothing below 16 bits is cast in a pass (mxfp6-forward), only the forward differs."""
    x, w, g = draws()
    wrong = excess(products(FORMATS[name], x, w, g), expected(FORMATS[name], x, w, g, flip=True), 2.0**-24)
    blocked = [any("/" in n for n in pair) for pair in FORMATS[name].passes.values()]
    assert all(factor > 100 for factor, block in zip(wrong, blocked) if block), wrong


def test_a_weight_in_higher_precision_is_cast_from_it() -> None:
    """bf16 activations beside an fp32 weight: the weight is rounded once, to the format."""
    x, w, g = draws()
    x, g = x.bfloat16(), g.bfloat16()
    formats = everywhere("mxfp8_e4m3/rceil")
    found = products(formats, x, w, g)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert max(excess(found, expected(formats, x, w, g), 2.0**-8)) <= 1
    twice = excess(found, expected(formats, x, w.bfloat16(), g), 2.0**-8)
    assert max(twice[:2]) > 1  # rounded to bf16 first: another weight


@pytest.mark.parametrize(("name", "dtype", "exact"), [
    ("mxfp8_e4m3", torch.bfloat16, True), ("mxint8", torch.bfloat16, True), ("mxfp4/16x16", torch.bfloat16, True),
    ("nvfp4", torch.bfloat16, False), ("fp8_row_e4m3", torch.bfloat16, False), ("mxfp4", torch.float16, False),
    ("e4m3", torch.float16, True), ("bf16", torch.float16, False), ("fp16", torch.bfloat16, False),
    ("nvfp4", torch.float32, True),
])  # fmt: skip
def test_which_dtype_holds_which_casts(name: str, dtype: torch.dtype, exact: bool) -> None:
    assert holds(by_name(name), dtype) == exact
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 0.3
    y = fake_cast(x, name)
    assert torch.equal(y.to(dtype).float(), y) or not exact
    if not exact and dtype == torch.bfloat16:
        assert not torch.equal(y.to(dtype).float(), y)


@pytest.mark.parametrize("name", ["e4m3", "fp8_tensor_e4m3", "mxfp4/16x16", "fp8_128x128_e5m2"])
def test_one_cast_serves_both_axes_only_where_the_values_are_the_same(name: str) -> None:
    x = draws()[0]
    assert same_along_both_axes(by_name(name))
    assert torch.equal(fake_cast(x, name, axis=0), fake_cast(x, name, axis=1))
    for other in ("mxfp4", "nvfp4", "fp8_row_e4m3", "fp8_1x128_e4m3"):
        assert not same_along_both_axes(by_name(other))
        assert not torch.equal(fake_cast(x, other, axis=0), fake_cast(x, other, axis=1))


def test_second_derivatives_pass_the_casts() -> None:
    """create_graph: the backward pass is differentiated, straight through its casts."""
    x, w, g = draws()
    x.requires_grad_()
    w.requires_grad_()
    for formats in (everywhere("mxfp8_e4m3/rceil"), LayerFormats()):
        (dx,) = torch.autograd.grad(cast_matmul(x, w, Engine(formats)), x, g, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), w)
        assert second.abs().max() > 0


SIX = {"input": 1, "weight": 1, "grad": 1, "backward_weight": 1, "weight_grad": 1, "backward_input": 1}
THREE = {"input": 1, "weight": 1, "grad": 1}


@pytest.mark.parametrize(("name", "wanted"), [
    ("mxfp8-bare", SIX), ("nvfp4-bare", SIX), ("fp8", THREE), ("fp8-dynamic", THREE), ("nothing", {}),
    ("mxfp6-forward", {**SIX, "weight_grad": 0}), ("tiles", {**SIX, "backward_weight": 0}), ("overrides", SIX),
])  # fmt: skip
def test_each_operand_is_cast_once_for_each_axis(name: str, wanted: dict[str, int]) -> None:
    """Six casts for three matmuls; three where the axis does not matter; never one of what is cast already."""
    seen: Counter[str] = Counter()
    given: list[Tensor] = []

    def note(operand: str, fmt: str, tensor: Tensor, axis: int) -> None:
        seen[operand] += 1
        given.append(tensor)

    x, w, g = draws()
    x.requires_grad_()
    w.requires_grad_()
    cast_matmul(x, w, Engine(FORMATS[name]), note=note).backward(g)
    assert seen == Counter({k: v for k, v in wanted.items() if v})
    assert all(any(torch.equal(t, high) for high in (x, w, g)) for t in given)  # each from high precision


def layer(formats: str = "mxfp8_e4m3") -> Linear:
    torch.manual_seed(0)
    return Linear(40, 36, formats=formats)


def test_gradients_accumulate_and_casts_count() -> None:
    made = layer()
    x, _, g = draws()
    made(x).backward(g)
    once = made.weight.grad.clone()
    made(x).backward(g)
    torch.testing.assert_close(made.weight.grad, 2 * once)
    assert made.casts == Counter({k: 2 for k in SIX if k not in ("grad", "backward_weight")})  # x wants no gradient


def test_checkpointing_gives_the_same_gradients() -> None:
    made, again = layer(), layer()
    x, _, g = draws()
    left, right = (x.clone().requires_grad_() for _ in range(2))
    made(left).backward(g)
    checkpoint(again, right, use_reentrant=False).backward(g)
    assert torch.equal(left.grad, right.grad)
    assert torch.equal(made.weight.grad, again.weight.grad)
    assert again.casts["input"] == 2  # forward ran twice


def test_deepcopy_and_state_dict() -> None:
    made = layer()
    twin = copy.deepcopy(made)
    x, _, _ = draws()
    assert torch.equal(made(x), twin(x))
    assert set(made.state_dict()) == {"weight", "bias"}
    plain = torch.nn.Linear(40, 36)
    plain.load_state_dict(made.state_dict())
    assert not torch.equal(plain(x), made(x))


def test_nothing_is_kept_for_the_backward_pass_beyond_what_lives_anyway() -> None:
    """Block formats save x and the weight themselves; a format without axes saves its cast, to use it again."""
    x, w, _ = draws()
    x.requires_grad_()
    w.requires_grad_()
    for name, own in (("mxfp8_e4m3", True), ("e4m3", False)):
        y = cast_matmul(x, w, Engine(everywhere(name)))
        saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert [t.data_ptr() in (x.data_ptr(), w.data_ptr()) for t in saved] == [own, own]
