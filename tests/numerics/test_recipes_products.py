"""What a recipe does to operands, product by product: stochastic rounding, Hadamard transform, pre-scale, square tiles.

Each against a slow composition in float64, each claim with the control that must fail.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from isoscale.formats import Stochastic, by_name, cast_stats, encode, fake_cast
from isoscale.formats.recipes import BACKWARD, MATMULS, RECIPES, LayerFormats, everywhere, recipe_by_name
from isoscale.nn import hardware
from isoscale.nn.engine import Engine, cast_matmul, draw_seed
from isoscale.nn.hadamard import rotate, rotation
from isoscale.numerics import Linear

NVFP4, MXFP4 = (recipe_by_name(name).formats("blocks.0.attn.qkv") for name in ("nvfp4", "mxfp4"))
WHOLE = replace(MXFP4, hadamard=("forward", "grad_input", "grad_weight"))
TREATED = {"nvfp4": NVFP4, "mxfp4": MXFP4, "forward too": WHOLE,
           "fp8 stochastic": LayerFormats("e4m3", "e4m3", "e5m2", stochastic=("grad", "weight_grad"))}  # fmt: skip


def draws(tokens: int = 50, fan_in: int = 40, fan_out: int = 36, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [tokens, in], w [out, in], gradient [tokens, out], of uneven scale, sizes that no block divides."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((tokens, fan_in), (fan_out, fan_in), (tokens, fan_out))
    return [(torch.randn(s, generator=draw) * torch.randn(s, generator=draw).exp()).to(dtype) for s in shapes]


def products(formats: LayerFormats, x: Tensor, w: Tensor, g: Tensor, seed: int = 1) -> list[Tensor]:
    """y, dx and dw of one call."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    torch.manual_seed(seed)
    y = cast_matmul(x, w, Engine(formats))
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


def composed(formats: LayerFormats, x: Tensor, w: Tensor, g: Tensor, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The same in float64, operand by operand, each with the product of magnitudes that bounds its error."""
    torch.manual_seed(seed)
    bits = torch.randint(0, 2**62, (), dtype=torch.int64)
    tensors = {"input": (x, 1), "weight": (w, 1), "grad": (g, 1), "backward_weight": (w, 0), "weight_grad": (g, 0),
               "backward_input": (x, 0)}  # fmt: skip
    out = []
    for which, (matmul, operands) in enumerate(MATMULS.items()):
        pair = []
        for side, name in enumerate(operands):
            value, axis = tensors[name]
            value = value.float()
            if matmul in formats.hadamard:
                value = rotate(value, rotation(formats.hadamard_size), axis - 2)
            fmt = list(formats.passes.values())[which][side]
            if name in formats.stochastic:
                factor = formats.pre_scale
                rounding = Stochastic(int(bits) + 2 * which + side)
                value = fake_cast(value * factor, fmt, axis=axis, rounding=rounding).double() / factor
            else:
                value = fake_cast(value, fmt, axis=axis).double()
            pair.append(value if axis == 1 else value.t())
        out.append((pair[0] @ pair[1].t(), pair[0].abs() @ pair[1].t().abs()))
    return out


@pytest.mark.parametrize("name", sorted(TREATED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_product_is_the_composition_of_its_ingredients(name: str, dtype: torch.dtype) -> None:
    formats = TREATED[name]
    x, w, g = draws(dtype=dtype if dtype != torch.float64 else torch.float32)
    found = products(formats, *(t.to(dtype) for t in (x, w, g)))
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    for ours, (wanted, size) in zip(found, composed(formats, x, w, g)):
        assert ours.dtype == dtype
        error = (ours.double() - wanted).abs()
        if dtype == torch.float64 and formats.hadamard:  # rotated in float64: some values round the other way
            assert error.norm() < 0.02 * wanted.norm()
        else:
            assert (error <= 64 * 2.0**-24 * size + ulp * wanted.abs() + 1e-30).all()


@pytest.mark.parametrize("name", sorted(TREATED))
def test_leaving_an_ingredient_out_gives_other_products(name: str) -> None:
    """The control of the composition: it sees each ingredient, in the matmul where it belongs."""
    formats, args = TREATED[name], draws()
    full = products(formats, *args)
    for change in ({"stochastic": (), "pre_scale": 1.0}, {"hadamard": ()}, {"pre_scale": 1.0}):
        other = replace(formats, **change)  # type: ignore[arg-type]
        if other == formats:
            continue
        differ = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(full, products(other, *args))]
        touched = [any(n in formats.stochastic for n in ops) for ops in MATMULS.values()]
        if "hadamard" in change:
            touched = [matmul in formats.hadamard for matmul in MATMULS]
        assert differ == touched, change


@pytest.mark.parametrize("size", [2, 16, 32, 128])
def test_the_rotation_is_a_hadamard_matrix_with_random_signs(size: int) -> None:
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-15)
    plain = torch.from_numpy(hadamard(size)).double() / size**0.5
    signs = (matrix @ plain.t()).diagonal()
    torch.testing.assert_close(signs[:, None] * plain, matrix, rtol=0, atol=1e-15)
    assert torch.equal(matrix, rotation(size))  # one fixed draw
    assert signs.min() < 0 < signs.max() or size == 2


@pytest.mark.parametrize("k", [32, 40, 1])
def test_the_transform_leaves_products_as_they_are(k: int) -> None:
    """In float64, nothing cast: to 1e-12, also where blocks are filled up. Control: one operand alone changes them."""
    formats = LayerFormats(hadamard=tuple(MATMULS), hadamard_size=32)
    x, w, g = (t.double() for t in draws(50, k, 36))
    for ours, wanted in zip(products(formats, x, w, g), (x @ w.t(), g @ w, g.t() @ x)):
        assert (ours - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    turned = rotate(x, rotation(32), -1)
    assert not torch.allclose(turned @ torch.nn.functional.pad(w, (0, -k % 32)).t(), x @ w.t(), rtol=0.1)
    low = products(formats, x.bfloat16(), w.bfloat16(), g.bfloat16())  # not rounded between transform and product
    exact = x.bfloat16().double() @ w.bfloat16().double().t()
    torch.testing.assert_close(low[0].double(), exact, rtol=2.0**-8, atol=1e-5 * float(exact.abs().max()))


def test_the_transform_reduces_the_error_of_mxfp4_with_outliers() -> None:
    """One value of 16 sigma in each block of X: the others are no longer flushed. Control: without outliers nothing is
    won. Only X is cast, so that only its error is seen."""
    plain = LayerFormats(input="mxfp4/rceil")
    turned = replace(plain, hadamard=tuple(MATMULS), hadamard_size=32)
    ratios = []
    for outlier in (16.0, 0.0):
        for which in (0, 2):  # blocks along features in y, along tokens in dW
            draw = torch.Generator().manual_seed(3)
            x, w, g = (torch.randn(256, 256, generator=draw) for _ in range(3))
            if outlier:
                (x if which else x.t())[5::32] = outlier
            exact = g.t() @ x if which else x @ w.t()
            with_, without = (float((products(f, x, w, g)[which] - exact).norm()) for f in (turned, plain))
            ratios.append(with_ / without)
    assert max(ratios[:2]) < 0.7, ratios
    assert min(ratios[2:]) > 0.9, ratios


SEEDS = 300


def means(formats: LayerFormats, x: Tensor, w: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and its standard error, element by element, of dx and dw over seeds."""
    many = [products(formats, x, w, g, seed)[1:] for seed in range(SEEDS)]
    out = []
    for i in range(2):
        stack = torch.stack([both[i].double() for both in many])
        out.append((stack.mean(0), stack.std(0) / SEEDS**0.5))
    return out


def test_stochastic_rounding_is_unbiased_and_nearest_is_not() -> None:
    """mxfp4: the mean of both gradients over seeds is the exact product (z^2 averages 1).

    Control: to nearest, on values that lie below half a step, nearly everything vanishes.
    """
    draw = torch.Generator().manual_seed(2)
    x, w, g = (torch.randn(32, 32, generator=draw) for _ in range(3))
    g[:, 1:] = g[:, 1:].abs() * 0.2
    g[:, 0] = 6.0
    exact = (g.double() @ w.double(), g.double().t() @ x.double())
    for (mean, error), wanted in zip(means(MXFP4, x, w, g), exact):
        z = (mean - wanted) / error
        assert 0.8 < float((z**2).mean()) < 1.25
        assert float(z.abs().max()) < 5.5  # of 1024
    nearest = replace(MXFP4, stochastic=(), pre_scale=1.0, hadamard=())
    for found, (_, error), wanted in zip(products(nearest, x, w, g)[1:], means(MXFP4, x, w, g), exact):
        assert float((((found.double() - wanted) / error) ** 2).mean()) > 5


def test_the_mean_gradient_of_nvfp4_is_that_of_its_other_casts() -> None:
    """Only gradients are stochastic, so the mean is g times what W and X are cast to; but for the blocks that NVFP4
    clips where its E4M3 scale was rounded down: there stochastic rounding cannot help, and the mean is drawn inwards.
    """
    draw = torch.Generator().manual_seed(4)
    x, w, g = (torch.randn(32, 32, generator=draw) for _ in range(3))
    g = g.sign() * 2.0 ** torch.randint(-2, 2, g.shape, generator=draw)
    g[:, ::16], g[::16] = 6.0, 6.0  # every block's largest is 6 along both axes: its scale is exact, nothing clips
    formats = replace(NVFP4, hadamard=())
    wanted = (g.double() @ fake_cast(w, "nvfp4/16x16").double(), g.double().t() @ fake_cast(x, "nvfp4", axis=0).double())
    for (mean, error), value in zip(means(formats, x, w, g * 0.9), wanted):
        z = ((mean - 0.9 * value) / error)[error > 0]
        assert 0.75 < float((z**2).mean()) < 1.3
    x = torch.randn(64, 512, generator=draw)
    cast = torch.stack([fake_cast(x, "nvfp4", rounding="stochastic", seed=s) for s in range(200)]).mean(0)
    assert -0.01 < float(((cast - x) * x).sum() / x.square().sum()) < -0.001  # it is biased on normal data


def test_both_backward_matmuls_and_operands_have_bits_of_their_own() -> None:
    """The same tensor as operand everywhere: four casts, four roundings; and another call draws others."""
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    x = (x + x.t()) / 2  # rows are columns, so only the bits tell the casts apart
    formats = LayerFormats(*("mxfp4/rceil",) * 3, stochastic=BACKWARD)
    torch.manual_seed(0)
    engine, seen = Engine(formats), []
    seed = draw_seed(engine, True, x)
    for which in (1, 2):
        for side in (0, 1):
            seen.append(engine.cast(which, side, x, -1, None, seed))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert not torch.equal(seen[0], engine.cast(1, 0, x, -1, None, draw_seed(engine, True, x)))
    assert torch.equal(seen[0], engine.cast(1, 0, x, -1, None, seed))


def test_three_quarters_never_clip() -> None:
    """MXFP4 gradients: no operand of the backward pass is clipped. Controls: the floor rule clips, and it clips three
    quarters of the operand as well, since it looks at what it is given."""
    clipped: dict[str, list[float]] = {}

    def run(formats: LayerFormats, key: str) -> None:
        def note(operand: str, fmt: str, tensor: Tensor, axis: int) -> None:
            if operand in BACKWARD:
                clipped.setdefault(key, []).append(float(cast_stats(tensor, fmt, axis=axis)[0]))

        x, w, g = draws(64, 64, 64)
        cast_matmul(x.requires_grad_(), w.requires_grad_(), Engine(formats), note=note).backward(g)

    run(MXFP4, "3/4, rceil")
    run(replace(everywhere("mxfp4/floor"), stochastic=BACKWARD), "floor")
    assert max(clipped["3/4, rceil"]) == 0
    assert len(clipped["3/4, rceil"]) == 4
    assert min(clipped["floor"]) > 0.005
    assert float(cast_stats(draws()[0] * 0.75, "mxfp4/floor")[0]) > 0.005


def test_three_quarters_under_rceil_is_the_published_quantiser() -> None:
    """arXiv 2502.20586: the floor rule's scale of the whole operand, then 3/4, then stochastic rounding. The same bits,
    unless a block's largest magnitude is a power of two, where rceil has half the scale."""
    x = draws(64, 64)[0]
    blocks = x.view(64, 2, 32)
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True).double().log2().floor() - 2)
    scaled = (0.75 * blocks / scale.float()).view(64, 64)
    published = fake_cast(scaled, "e2m1", rounding="stochastic", seed=9).view(64, 2, 32) * scale.float()
    assert torch.equal(fake_cast(0.75 * x, "mxfp4/rceil", rounding="stochastic", seed=9), published.view(64, 64))
    assert scaled.abs().max() < 6


def test_a_weight_in_square_tiles_is_one_tensor_in_both_passes() -> None:
    """NVFP4 16 x 16: W and W^T are cast to the same values, once. Control: rows of 16 are not."""
    _, w, _ = draws(50, 40, 36)
    tiles, rows = by_name("nvfp4/16x16"), by_name("nvfp4")
    assert torch.equal(fake_cast(w, tiles, axis=1), fake_cast(w.t().contiguous(), tiles, axis=1).t())
    assert not torch.equal(fake_cast(w, rows, axis=1), fake_cast(w.t().contiguous(), rows, axis=1).t())
    layer = Linear(40, 36, formats=NVFP4)
    layer(torch.randn(8, 40, requires_grad=True)).sum().backward()
    assert layer.casts["weight"] == 1
    assert layer.casts["backward_weight"] == 0
    assert set(layer.casts) == {"input", "weight", "grad", "weight_grad", "backward_input"}


def state() -> Tensor:
    return torch.get_rng_state()


def test_bits_are_drawn_as_a_dropout_mask_is() -> None:
    """One draw a call, in the forward; none without stochastic operands, nor in eval mode where nobody differentiates."""
    x = torch.randn(8, 40)
    for formats, mode, enabled, moves in ((NVFP4, True, True, True), (NVFP4, False, False, False),
                                          (NVFP4, False, True, True), (NVFP4, True, False, True),
                                          (everywhere("nvfp4"), True, True, False)):  # fmt: skip
        layer = Linear(40, 36, formats=formats).train(mode)
        before = state()
        with torch.set_grad_enabled(enabled):
            y = layer(x)
        assert torch.equal(before, state()) != moves, (formats, mode, enabled)
        if enabled:
            after = state()
            y.sum().backward()
            assert torch.equal(after, state())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_bits(reentrant: bool) -> None:
    """With dropout behind it: the segment that runs again sees the same numbers in the same order."""
    model = torch.nn.Sequential(Linear(40, 40, formats=NVFP4), torch.nn.Dropout(0.5), Linear(40, 36, formats=MXFP4))
    x, _, g = draws()
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        left = x.clone().requires_grad_()
        y = checkpoint(model, left, use_reentrant=reentrant) if again else model(left)
        y.backward(g)
        found.append([left.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*found):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_compiles_whole(name: str) -> None:
    """fullgraph, forward and backward: the same output, gradients that repeat with the generator's seed, change with
    it, and have the mean of the eager ones. (Their bits are others: a compiler may draw in the backward pass.)"""
    torch._dynamo.reset()
    x, w, g = draws(32, 64, 48)
    x.requires_grad_()
    w.requires_grad_()
    engine = Engine(TREATED[name])

    def eager(a: Tensor, b: Tensor) -> Tensor:
        return cast_matmul(a, b, engine)

    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)

    def dx(call: Callable[[Tensor, Tensor], Tensor], seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.autograd.grad(call(x, w), x, g)[0]

    torch.testing.assert_close(compiled(x, w), eager(x, w), rtol=1e-5, atol=1e-4)
    assert torch.equal(dx(compiled, 1), dx(compiled, 1))
    assert not torch.equal(dx(compiled, 1), dx(compiled, 2))
    ours, theirs = (torch.stack([dx(call, seed) for seed in range(100)]) for call in (compiled, eager))
    spread = ((ours.var(0) + theirs.var(0)) / 100).sqrt()
    sure = spread > 0
    z = ((ours.mean(0) - theirs.mean(0)) / spread)[sure]
    assert float(z.square().mean()) < 1.4
    torch.testing.assert_close(ours.mean(0)[~sure], theirs.mean(0)[~sure], rtol=1e-4, atol=1e-4)


def test_transforms() -> None:
    """vmap of grad says whether examples share their bits, as for dropout; jvp passes the Hadamard transform."""
    a, w, _ = draws(24, 40, 36)
    many = a.view(3, 8, 40)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return cast_matmul(x, weight, Engine(NVFP4)).square().sum()

    with pytest.raises(RuntimeError, match="random"):
        vmap(grad(loss), in_dims=(0, None))(many, w)
    same = torch.stack([many[0]] * 2)
    for randomness, equal in (("same", True), ("different", False)):
        found = vmap(grad(loss), in_dims=(0, None), randomness=randomness)(same, w)
        assert found.shape == same.shape
        assert torch.equal(found[0], found[1]) == equal
        assert torch.allclose(found, grad(loss)(many[0], w).expand_as(found), rtol=0.5, atol=0.3 * float(found.abs().max()))
    step = torch.randn_like(a)
    engine = Engine(LayerFormats(hadamard=("forward",)))
    _, tangent = jvp(lambda x: cast_matmul(x, w, engine), (a,), (step,))
    torch.testing.assert_close(tangent, step @ w.t(), rtol=1e-4, atol=1e-4)
    _, tangent = jvp(lambda y: cast_matmul(a, y, engine), (w,), (w,))
    torch.testing.assert_close(tangent, a @ w.t(), rtol=1e-4, atol=1e-4)


def test_transposed_weights_and_batches() -> None:
    """[in, out] weights and batched operands, no row of which any block divides."""
    x, w, g = draws()
    for formats in (NVFP4, MXFP4):
        straight = products(formats, x, w, g)
        left, right = x.clone().requires_grad_(), w.t().contiguous().requires_grad_()
        torch.manual_seed(1)
        y = cast_matmul(left, right, Engine(formats), w_axis=-2)
        dx, dw = torch.autograd.grad(y, (left, right), g)
        torch.testing.assert_close(y, straight[0], rtol=1e-5, atol=1e-5)
        for ours, theirs in ((dx, straight[1]), (dw.t(), straight[2])):
            assert (ours - theirs).norm() < 0.4 * theirs.norm()  # W's bits lie elsewhere in a transposed tensor
        batched = cast_matmul(torch.stack([x, x]), torch.stack([w, w]), Engine(WHOLE))
        assert batched.shape == (2, 50, 36)


@pytest.mark.parametrize("formats", [NVFP4, MXFP4])
def test_no_rows_and_no_memory(formats: LayerFormats) -> None:
    """An empty batch has zero gradients; the meta device has shapes."""
    layer = Linear(40, 36, formats=formats)
    layer(torch.randn(0, 40, requires_grad=True)).sum().backward()
    assert layer.weight.grad.abs().sum() == 0
    there = Linear(40, 36, formats=formats, device="meta")
    there(torch.empty(8, 40, device="meta", requires_grad=True)).sum().backward()
    assert there.weight.grad.shape == (36, 40)


def test_copies() -> None:
    x, _, g = draws()
    layer = Linear(40, 36, formats=MXFP4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for made in (layer, twin):
            made.zero_grad()
            torch.manual_seed(0)
            made(x).backward(g)
        assert torch.equal(twin.weight.grad, layer.weight.grad)
    assert pickle.loads(pickle.dumps(MXFP4)) == MXFP4


def test_kernels_take_the_same_operands() -> None:
    """NVFP4 in tiles goes to the kernel of NVFP4 in rows: each of a tile's 16 rows gets its scale. Stochastic codes."""
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    tiles = by_name("nvfp4/16x16")
    assert hardware.kind_of(by_name("nvfp4"), tiles) == "nvfp4"
    found = hardware.encode_operand(x, tiles, -1).scales.view(torch.uint8)
    rows, blocks = torch.meshgrid(torch.arange(128), torch.arange(4), indexing="ij")
    wanted = encode(x, tiles).scales
    assert wanted.shape == (8, 4)
    assert torch.equal(found[(rows % 32) * 16 + (rows // 32) * 4 + blocks], wanted.repeat_interleave(16, 0))
    one, two = (hardware.encode_operand(x, by_name("nvfp4"), -1, Stochastic(seed)).codes for seed in (0, 1))
    assert not torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_every_recipe_has_a_composition_or_plain_casts() -> None:
    treated = {name for name, recipe in RECIPES.items() if recipe.formats("a").stochastic or recipe.formats("a").hadamard}
    assert treated == {"nvfp4", "mxfp4"}
