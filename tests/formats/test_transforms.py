"""Under torch.compile, vmap, grad, jvp, checkpointing and fake tensors a cast gives the bits of eager mode."""

import pytest
import torch
from oracles import engine  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

from isoscale import formats as F
from isoscale.formats import cast, dispatch, ops

NAMES = ["mxfp8_e4m3", "mxfp6_e3m2/rceil", "mxfp4/even", "mxint8", "nvfp4", "fp8_tensor_e4m3", "fp8_128x128_e5m2", "e2m3"]


def sample(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.exp2(torch.randint(-6, 6, (*shape[:-1], 1), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name, engine):  # noqa: F811
    """One graph holds both axes, both dtypes and the gradient."""
    if engine == "reference" and name not in ("mxfp4/even", "nvfp4"):
        pytest.skip("a compilation of the reference takes 10 s; two cover its branches")

    def both(t, half):  # a cast to bfloat16 in here would be dropped by Inductor
        return F.fake_cast(t * 1.0, name), F.fake_cast(t, name, axis=0), F.fake_cast(half, name)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    x = sample(40, 100)
    for rows in (40, 33):
        leaf = x[:rows].clone().requires_grad_()
        half = x[:rows].bfloat16()
        found = compiled(leaf, half)
        for one, want in zip(found, both(x[:rows], half), strict=True):
            assert torch.equal(one, want)
        (found[0] * 3).sum().backward()
        assert torch.equal(leaf.grad, torch.full_like(x[:rows], 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "e3m2"])
def test_compiled_stochastic_rounding_takes_its_seed_at_run_time(name, engine):  # noqa: F811
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    x = sample(40, 64)
    compiled = torch.compile(lambda t, s: F.fake_cast(t, name, rounding="stochastic", seed=s), fullgraph=True)
    for seed in (1, 2, 3):
        assert torch.equal(compiled(x, torch.tensor(seed)), F.fake_cast(x, name, rounding="stochastic", seed=seed))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    x = sample(5, 7, 64)
    for at in (0, 1):
        found = torch.func.vmap(lambda t: F.fake_cast(t, name), in_dims=at, out_dims=at)(x)
        want = torch.stack([F.fake_cast(t, name) for t in x.unbind(at)], at)
        assert torch.equal(found, want)


def test_grad_jvp_and_checkpoint():
    x = sample(4, 64)
    y = F.fake_cast(x, "mxfp4")
    assert torch.equal(torch.func.grad(lambda t: (F.fake_cast(t, "mxfp4") ** 2).sum())(x), 2 * y)
    values, tangent = torch.func.jvp(lambda t: F.fake_cast(t, "mxfp4"), (x,), (torch.ones_like(x),))
    assert torch.equal(values, y)
    assert torch.equal(tangent, torch.ones_like(x))
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda t: F.fake_cast(t, "mxfp4"), leaf, use_reentrant=False).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_fake_tensors_and_traces():
    with FakeTensorMode() as mode:
        y = F.fake_cast(mode.from_tensor(torch.ones(3, 32)), "mxfp4")
    assert y.shape == (3, 32)
    from torch.fx.experimental.proxy_tensor import make_fx

    x = sample(4, 64)
    graph = make_fx(lambda t: F.fake_cast(t, "mxfp6_e3m2"))(x)
    other = sample(4, 64, seed=5)
    assert torch.equal(graph(other), F.fake_cast(other, "mxfp6_e3m2"))


def test_who_computes():
    x = torch.ones(4, 32)

    def chosen(tensor, name, **named):
        facts = cast.facts_of(tensor, name, None)
        rounding, noise = cast.resolve(named.get("rounding", "nearest-even"), named.get("seed"), tuple(tensor.shape))
        return dispatch.engine(tensor, cast.cast_of(tensor, facts, -1, rounding, noise))

    fast = dispatch.kernel_for("cpu")
    assert chosen(x, "mxfp4") == fast
    assert chosen(x.bfloat16(), "nvfp4") == fast
    assert chosen(x, "int8") == fast
    assert chosen(x, "mxfp4", rounding="stochastic", seed=1) == fast
    for tensor, name in ((x.double(), "mxfp4"), (x, "bf16"), (x, "e4m3_fnuz"), (x, "e8m0")):
        assert chosen(tensor, name) == "torch"
    assert chosen(torch.empty(4, 32, device="meta"), "mxfp4") == "torch"


def test_the_operators_are_well_formed():
    if dispatch.kernel_for("cpu") == "torch":
        pytest.skip("no compiler here")
    x = sample(4, 70)
    for name in ("mxfp6_e3m2", "nvfp4", "e2m1"):
        for axis in (0, 1):
            given = cast.cast_of(x, cast.facts_of(x, name, None), axis, "nearest-even", None, values=False)
            arguments = dispatch.operands(x, given, None, "cpp")
            torch.library.opcheck(ops.cast_values, arguments)
            torch.library.opcheck(ops.encode, (*arguments, -1))
