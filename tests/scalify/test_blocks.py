"""Block scales: what moves with them, what folds them, and that nothing is wrong where they cannot be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_f
from torch import Tensor, nn

from isoscale import IsoscaleError
from isoscale.formats import fake_cast
from isoscale.scalify import RuleError, ScaledAdamW, ScaledTensor, as_block_scaled, as_plain, as_scaled
from isoscale.scalify.blocks import block_scale

BLOCKS = ((1, 32), (1, -1), (-1, 1), (4, 32), (1, 1), (-1, -1))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different size from block to block."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    spread = torch.randint(-20, 20, (*shape[:-1], -(-shape[-1] // 32)), generator=draw)
    return (x * 2.0 ** spread.repeat_interleave(32, -1)[..., : shape[-1]]).to(dtype)


def blocked(*shape: int, block: tuple[int, ...] = (1, 32), seed: int = 0, dtype: torch.dtype = torch.float32) -> ScaledTensor:
    x = as_block_scaled(drawn(*shape, seed=seed, dtype=dtype), block)
    assert isinstance(x, ScaledTensor)
    return x


def values(x: Any) -> Tensor:
    return as_plain(x, torch.float64)


def is_blocked(x: Any) -> bool:
    return isinstance(x, ScaledTensor) and x.scale.dim() > 0


@pytest.mark.parametrize("block", BLOCKS)
def test_a_power_of_two_per_block_not_above_its_largest_element(block: tuple[int, int]) -> None:
    plain = drawn(8, 64)
    x = as_block_scaled(plain, block)
    rows, cols = (n if size == -1 else size for n, size in zip((8, 64), block))
    assert x.scale.shape == (8 // rows, 64 // cols)
    assert torch.equal(values(x), plain.double())
    top = x.data_part.view(8 // rows, rows, 64 // cols, cols).abs().amax((1, 3))
    assert ((top >= 1) & (top < 2)).all()
    assert (torch.frexp(x.scale)[0] == 0.5).all()


def test_leading_dimensions_have_blocks_of_one() -> None:
    x = as_block_scaled(drawn(3, 4, 64), (2, 32))
    assert x.scale.shape == (3, 2, 2)
    assert torch.equal(values(x), drawn(3, 4, 64).double())


def test_zeros_infinities_and_nan() -> None:
    plain = torch.zeros(4, 32)
    plain[1], plain[2, 0], plain[3, 0] = 1e-20, float("inf"), float("nan")
    x = as_block_scaled(plain, (1, 32))
    assert torch.equal(x.scale[:, 0] == 0, torch.tensor([True, False, True, True]))
    torch.testing.assert_close(values(x), plain.double(), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(values(x + 0), plain.double(), equal_nan=True, rtol=0, atol=0)
    nothing = as_block_scaled(torch.zeros(2, 32))
    assert float((nothing * 3).scale) == 0  # still under any scale
    assert as_block_scaled(torch.zeros(0, 32)).scale.shape == (0, 1)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {  # what is done to [8, 64], whether blocks of 1x32 survive
    "t": (lambda x: x.t(), True),
    "transpose": (lambda x: x.transpose(0, 1), True),
    "permute": (lambda x: x.permute(1, 0), True),
    "unsqueeze": (lambda x: x.unsqueeze(1), True),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(1).squeeze(1), True),
    "squeeze all": (lambda x: x[2:3].squeeze(), True),
    "squeeze a whole block": (lambda x: x[:, :32].t().unsqueeze(0).squeeze(), True),
    "clone": (lambda x: x.clone(), True),
    "clone dense": (lambda x: x.t().contiguous(), True),
    "detach": (lambda x: x.detach(), True),
    "neg": (lambda x: -x, True),
    "abs": (lambda x: x.abs(), True),
    "rows": (lambda x: x[2:5], True),
    "every other row": (lambda x: x[1::2], True),
    "a row": (lambda x: x[-3], True),
    "a column": (lambda x: x[:, 40], True),
    "a block": (lambda x: x[:, 32:], True),
    "cut": (lambda x: x[:, 16:48], False),
    "steps": (lambda x: x[:, ::2], False),
    "no rows": (lambda x: x[3:3], False),
    "split": (lambda x: x.split(32, 1), True),
    "split cut": (lambda x: x.split(20, 1), False),
    "split sizes": (lambda x: x.split([5, 3]), True),
    "chunk": (lambda x: x.chunk(4), True),
    "unbind": (lambda x: x.unbind(0), True),
    "unbind across": (lambda x: x.unbind(1), True),
    "heads": (lambda x: x.view(8, 2, 32), True),
    "half heads": (lambda x: x.view(8, 4, 16), True),
    "odd heads": (lambda x: x.view(2, 4, 64), True),
    "flat": (lambda x: x.view(-1), True),
    "folded": (lambda x: x.view(4, 128), True),
    "across": (lambda x: x.reshape(16, 32), True),
    "blocks in two dimensions": (lambda x: x.view(8, 8, 8), True),
    "view cut": (lambda x: x[:, :48].contiguous().view(16, 24), False),
    "reshape of a transpose": (lambda x: x.t().reshape(-1), False),
    "expand": (lambda x: x.unsqueeze(0).expand(3, 8, 64), True),
    "expand new": (lambda x: x.expand(3, 8, 64), True),
    "cat rows": (lambda x: torch.cat([x, x * 0 if not is_blocked(x) else x], 0)[:8], True),
    "cat": (lambda x: torch.cat([x, -x], 1), True),
    "stack": (lambda x: torch.stack([x, -x], 1), True),
    "wider": (lambda x: x.double(), True),
    "diagonal": (lambda x: x[:, :8].diagonal(), False),
    "unfold": (lambda x: x.unfold(1, 8, 4), False),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    function, survive = LAYOUTS[name]
    x = blocked(8, 64)
    found, right = function(x), function(values(x))
    found, right = (found, right) if isinstance(found, (tuple, list)) else ((found,), (right,))
    for part, exact in zip(found, right):
        assert torch.equal(values(part), exact)
        assert part.stride() == exact.stride()
        assert torch.equal(values(part * 4), exact * 4)  # and goes on as it should
        if survive:
            assert part.data_part.dtype == part.dtype
            count = part.scale.numel()
            assert count <= max(1, part.numel()) // 16 or part.dim() < 2, (part.shape, part.scale.shape)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_blocks(name: str, block: tuple[int, int]) -> None:
    function, _ = LAYOUTS[name]
    x = blocked(8, 64, block=block)
    found, right = function(x), function(values(x))
    pairs = zip(found, right) if isinstance(found, (tuple, list)) else ((found, right),)
    for part, exact in pairs:
        assert torch.equal(values(part), exact)


@pytest.mark.parametrize("seed", range(40))
def test_random_views(seed: int) -> None:
    """Any view of any shape under any blocks: the right values, whether blocks survive or not."""
    import random

    rng = random.Random(seed)
    sizes = [2, 2, 2, 3, 4, 1]

    def shape() -> list[int]:
        factors, out = sizes[:], []
        rng.shuffle(factors)
        while factors:
            take = rng.randint(1, len(factors))
            out.append(int(torch.tensor(factors[:take]).prod()))
            factors = factors[take:]
        return out

    old = shape()
    block = tuple(rng.choice([d for d in range(1, n + 1) if n % d == 0]) for n in old)
    plain = torch.randn(old, generator=torch.Generator().manual_seed(seed)) * 2.0 ** torch.arange(96).view(old)
    x = as_block_scaled(plain, block)
    for _ in range(10):
        new = shape()
        assert torch.equal(values(x.view(new)), plain.double().view(new)), (old, block, new)


def test_products_fold_the_scales() -> None:
    """float64 data: equal to round-off to the plain product, under one scale."""
    for dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        a, b = blocked(8, 64, dtype=torch.float32), blocked(16, 64, seed=1)
        a, b = (as_block_scaled(as_plain(p).to(torch.float64), (1, 32), dtype) for p in (a, b))
        bias = as_scaled(torch.randn(16).to(dtype))
        stack = torch.stack([a, -a])
        cases = {
            "mm": (lambda p, q, c, s: p @ q.t()),
            "one is plain": (lambda p, q, c, s: p @ torch.ones(64, 4, dtype=p.dtype)),
            "addmm": (lambda p, q, c, s: torch.addmm(c, p, q.t())),
            "bmm": (lambda p, q, c, s: torch.bmm(s, s.transpose(1, 2))),
            "linear": (lambda p, q, c, s: torch_f.linear(p, q, c)),
            "linear of a stack": (lambda p, q, c, s: torch_f.linear(s, q)),
            "matmul": (lambda p, q, c, s: torch.matmul(s, q.t())),
        }  # fmt: skip
        for name, function in cases.items():
            out = function(a, b, bias, stack)
            right = function(*(values(part) for part in (a, b, bias, stack)))
            assert out.scale.dim() == 0, name
            assert out.dtype == dtype
            error = float((values(out) - right).norm() / right.norm())
            assert error <= allowed, (name, dtype, error)


def test_control_half_data_under_one_scale_lose_what_the_product_keeps() -> None:
    """Blocks 2^40 apart in fp16, met by weights that are as far apart the other way."""
    x = as_block_scaled(torch.cat([torch.ones(1, 32), torch.full((1, 32), 2.0**-40)], 1), (1, 32), torch.float16)
    w = as_scaled(torch.cat([torch.full((32, 1), 2.0**-40), torch.ones(32, 1)], 0))
    right = values(x) @ values(w)
    assert torch.equal(values(x @ w), right)
    together = (x + 0).float() @ w
    assert torch.equal(values(together), right / 2)


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, y: x * y,
    "add": lambda x, y: x + y,
    "add a row": lambda x, y: x + y[0],
    "softmax": lambda x, y: (x * 1e-5).softmax(-1),
    "sum": lambda x, y: x.sum(0),
    "relu": lambda x, y: x.relu(),
    "where": lambda x, y: torch.where(x > y, x, y),
    "layer_norm": lambda x, y: torch_f.layer_norm(x, (64,)),
    "flip": lambda x, y: x.flip(1),
    "index": lambda x, y: x[torch.tensor([3, 1])],
    "gather": lambda x, y: x.gather(1, torch.arange(8).view(8, 1)),
    "tril": lambda x, y: x.tril(),
    "cat of others": lambda x, y: torch.cat([x, y[:, :16]], 1),
    "cat of rows and columns": lambda x, y: torch.cat([x, (y.t().contiguous()).t()], 0),
    "norm": lambda x, y: torch.linalg.vector_norm(x),
    "compare": lambda x, y: (x > y).to(x.dtype),
    "to int": lambda x, y: x.to(torch.int64).to(x.dtype),
    "numel": lambda x, y: x.amax(1),
    "repeat": lambda x, y: x.repeat(2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_operator_first_brings_the_data_under_one_scale(name: str) -> None:
    function = OTHERS[name]
    x, y = blocked(8, 64, dtype=torch.float64), blocked(8, 64, block=(8, 1), seed=1, dtype=torch.float64)
    out, right = function(x, y), function(values(x), values(y))
    torch.testing.assert_close(values(out), right, rtol=1e-12, atol=0)
    mixed = function(x, as_scaled(values(y)))
    torch.testing.assert_close(values(mixed), right, rtol=1e-12, atol=0)
    assert not is_blocked(out) or name in ("cat of others",)


def test_writes_keep_the_scales_and_reach_every_view() -> None:
    for part in (slice(None), (slice(2, 4), slice(32, 64)), (slice(None), slice(3, 50)), (1, 5), (slice(1, 8, 3), slice(0, 64, 7))):
        x = blocked(8, 64)
        turned, flat, cut, plain = x.t(), x.view(-1), x[:, 3:50], as_plain(x)
        scale = x.scale.clone()
        for write in (lambda p: p.mul_(3), lambda p: p.add_(p * 0 + 1), lambda p: p.neg_(), lambda p: p.copy_(p * 2), lambda p: p.zero_(),
                      lambda p: p.fill_(0.5)):  # fmt: skip
            write(x[part])
            write(plain[part])
            exact = plain.double()
            torch.testing.assert_close(values(x), exact, rtol=1e-6, atol=1e-6)
            assert torch.equal(values(turned), values(x).t())
            assert torch.equal(values(flat), values(x).view(-1))
            assert torch.equal(values(cut), values(x)[:, 3:50])
            assert torch.equal(x.scale, scale)


def test_a_zero_block_that_is_written_through_a_view_counts() -> None:
    x = as_block_scaled(torch.zeros(2, 64))
    x[0, 3:5] = as_scaled(torch.tensor([3.0, 5.0]))
    x[1, 40].fill_(7.0)
    right = torch.zeros(2, 64)
    right[0, 3:5], right[1, 40] = torch.tensor([3.0, 5.0]), 7.0
    assert torch.equal(values(x), right.double())
    assert torch.equal(values(x * 4), right.double() * 4)
    assert torch.equal(values(x[1, 40] * as_scaled(torch.tensor(4.0))), torch.tensor(28.0).double())
    assert torch.equal(values(x @ x.t()), (right @ right.t()).double())


def test_in_place_layouts_are_refused_and_strides_too() -> None:
    x = blocked(8, 64)
    with pytest.raises(RuleError, match="out of place"):
        x.t_()
    with pytest.raises(IsoscaleError, match="cannot follow block scales"):
        x.as_strided((2, 2), (1, 3))
    assert torch.equal(values(x), drawn(8, 64).double())


def test_gradients_are_those_of_the_plain_model() -> None:
    torch.manual_seed(0)
    plain_x, plain_w = drawn(16, 64).double() * 1e-3, torch.randn(8, 64).double()
    w = plain_w.clone().requires_grad_()
    x = plain_x.clone().requires_grad_()
    sw, sx = as_block_scaled(w, (1, 32)), as_block_scaled(x, (1, 32))
    loss = torch_f.linear(sx, sw).tanh().square().sum() + sw[:, 16:48].reshape(-1).square().sum()
    as_plain(loss).backward()
    w2, x2 = (p.double().requires_grad_() for p in (plain_w, plain_x))
    (torch_f.linear(x2, w2).tanh().square().sum() + w2[:, 16:48].reshape(-1).square().sum()).backward()
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-9, atol=1e-12)


def test_a_layer_with_block_scaled_weights_trains() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(as_block_scaled(layer.weight.detach(), (1, 32)))
    layer.bias = nn.Parameter(as_scaled(layer.bias.detach()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    x, y = torch.randn(32, 64), torch.randn(32, 8)
    losses = []
    for _ in range(20):
        loss = torch_f.mse_loss(layer(as_scaled(x)), as_scaled(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(values(loss.detach())))
    assert losses[-1] < 0.5 * losses[0]
    assert layer.weight.scale.shape == (8, 2)


def test_a_scaled_optimiser_refuses_blocks() -> None:
    with pytest.raises(IsoscaleError, match="one scale each"):
        ScaledAdamW([nn.Parameter(blocked(8, 64))])


@pytest.mark.parametrize(("name", "dtype"), [("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)])
def test_mx_fp8_data_are_held_exactly(name: str, dtype: torch.dtype) -> None:
    plain = drawn(16, 96)
    mx = fake_cast(plain, f"{name}/floor")
    x = as_block_scaled(mx, (1, 32), dtype)
    assert x.dtype == dtype
    assert torch.equal(values(x), mx.double())
    straight = as_block_scaled(plain, (1, 32), dtype)  # the same cast, by this package
    assert torch.equal(values(straight), mx.double())
    weights = torch.randn(8, 96, dtype=torch.bfloat16)
    out = x @ as_scaled(weights).t()
    assert out.dtype == torch.bfloat16
    right = mx.double() @ weights.double().t()
    assert float((values(out) - right).norm() / right.norm()) < 3e-3
    assert (x @ x.t()).dtype == torch.bfloat16
    assert torch.equal(values(x + 0), mx.double())  # bf16 under one scale holds fp8 blocks
    assert x.t().dtype == dtype
    with pytest.raises(AssertionError):
        assert torch.equal(values(as_scaled(mx, dtype=dtype)), mx.double())  # one scale does not


def test_saturation_of_fp8_is_that_of_mx_and_not_of_infinities() -> None:
    plain = torch.full((2, 32), 500.0)
    plain[1, 0] = float("inf")
    x = as_block_scaled(plain, (1, 32), torch.float8_e5m2)
    assert float(values(x)[0, 0]) == 448  # 1.953 2^8, held to 1.75 2^8
    assert float(values(x)[1, 0]) == float("inf")


@pytest.mark.parametrize(("shape", "block", "match"), [
    ((8, 60), (1, 32), "pad it with zeros"), ((8, 64), (1, 1, 32), "the last dimensions"), ((8, 64), (0, 32), "the last dimensions"),
    ((8, 64), (), "the last dimensions"), ((), (1,), "the last dimensions"),
])  # fmt: skip
def test_blocks_that_do_not_fit_are_refused(shape: tuple[int, ...], block: tuple[int, ...], match: str) -> None:
    with pytest.raises(IsoscaleError, match=match):
        as_block_scaled(torch.ones(shape), block)


def test_other_wrong_arguments() -> None:
    with pytest.raises(IsoscaleError, match="sizes that divide theirs"):
        ScaledTensor(torch.ones(4, 8), torch.ones(4, 3))
    with pytest.raises(IsoscaleError, match="rank of the data"):
        ScaledTensor(torch.ones(4, 8), torch.ones(8))
    with pytest.raises(IsoscaleError, match="as_plain"):
        as_block_scaled(as_scaled(torch.ones(4, 32)))
    with pytest.raises(IsoscaleError, match="floating-point"):
        as_block_scaled(torch.ones(4, 32, dtype=torch.int32))


def test_scales_of_ones_own_and_how_it_is_shown() -> None:
    plain = drawn(4, 64)
    x = as_scaled(plain, scale=block_scale(plain, (1, 32), torch.float32))
    assert torch.equal(values(x), plain.double())
    assert "blocks" in repr(x)
    assert "(4, 2)" in repr(x)
    assert "scale=2^0" in repr(as_scaled(torch.ones(3)))


def test_it_survives_copies_files_and_pickles(tmp_path: Any) -> None:
    import copy

    x = blocked(8, 64)
    torch.save(x, tmp_path / "x.pt")
    for other in (copy.deepcopy(x), torch.load(tmp_path / "x.pt", weights_only=True)):
        assert torch.equal(values(other), values(x))
        assert other.scale.shape == (8, 2)


@pytest.mark.slow
def test_compiled() -> None:
    def step(x: Tensor, w: Tensor) -> Tensor:
        return torch_f.linear(x, w[:, 32:]).relu() + w[:, :8].t().sum()

    x, w = as_scaled(torch.randn(4, 64)), blocked(8, 96)
    eager = step(x, w)
    compiled = torch.compile(step, fullgraph=True)(x, w)
    torch.testing.assert_close(values(compiled), values(eager), rtol=1e-5, atol=1e-5)
