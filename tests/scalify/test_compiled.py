"""Scaled tensors under torch.compile: the eager numbers, few graphs, and never an old rule out of the cache."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isoscale import scalify as sc

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))
    return model, torch.randn(48, 32), torch.randint(10, (48,))


def losses(model, optimizer, x, y, steps, compiled=False):
    def loss(x, y):
        return F.cross_entropy(model(x).float(), y)

    run, out = torch.compile(loss, fullgraph=True) if compiled else loss, []
    for _ in range(steps):
        value = run(x, y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(value.detach()))
    return out


def test_sixty_compiled_steps_follow_plain_float32():
    model, x, y = mlp()
    other, settings = copy.deepcopy(model), {"lr": 3e-3, "eps": 2.0**-24}
    plain = losses(model, torch.optim.AdamW(model.parameters(), **settings), x, y, 60)
    other, optimizer = sc.scalify(other, torch.optim.AdamW(other.parameters(), **settings), "float32", compile_step=True)
    scaled = losses(other, optimizer, x, y, 60, compiled=True)
    assert max(abs(a - b) for a, b in zip(plain, scaled)) <= 5e-5
    assert plain[-1] < 0.5 * plain[0]


@pytest.mark.parametrize(("recipe", "bound"), [("fp16-fp16", 0.01), ("fp8-fp16", 0.05)])
def test_few_bits_compiled_are_close_to_eager(recipe, bound):
    model, x, y = mlp()
    other = copy.deepcopy(model)
    eager, optimizer = sc.scalify(model, torch.optim.AdamW(model.parameters(), lr=3e-3), recipe)
    want = losses(eager, optimizer, x, y, 10)
    other, optimizer = sc.scalify(other, torch.optim.AdamW(other.parameters(), lr=3e-3), recipe, compile_step=True)
    got = losses(other, optimizer, x, y, 10, compiled=True)
    assert max(abs(a - b) for a, b in zip(want, got)) < bound
    assert want[-1] < want[0] - 0.05


def test_user_operators_and_rescales_compile_into_one_graph():
    def forward(x, y):
        """s = s_x s_y"""
        return sc.Pair(x.data * y.data, x.scale * y.scale)

    product = sc.custom_scale(lambda x, y: x * y, forward, name="test_compiled_product")

    def function(x, y):
        z = sc.rescale_l2_grad(sc.rescale_max(product(x, y)))
        return sc.stop_scaling(sc.cast_on_backward(z, "e5m2"))

    a = sc.as_scaled(torch.randn(8, 8) * 1e-6).requires_grad_()
    b = sc.as_scaled(torch.randn(8, 8))
    want = function(a, b)
    want.sum().backward()
    grad, a.grad = a.grad, None
    got = torch.compile(function, fullgraph=True)(a, b)
    got.sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(sc.as_plain(a.grad), sc.as_plain(grad))


def test_dynamic_sizes_take_one_graph_per_octave():
    model, _ = sc.scalify(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), None, "float32")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: model(x).sum(), backend=counter, dynamic=True)
    for rows in (80, 96, 100, 72, 120, 127):  # one range between powers of four of the sum's size
        run(torch.randn(rows, 16))
    assert counter.frame_count == 1
    run(torch.randn(20, 16))
    assert counter.frame_count <= 2


def test_control_flow_on_data_breaks_the_graph_and_gives_the_eager_answer():
    def function(x):
        return x * 2.0 if (x.sum() > 0) else x * 3.0

    compiled = torch.compile(function, backend="aot_eager")
    for sign in (1.0, -1.0):
        x = sc.as_scaled(torch.ones(4) * sign)
        assert torch.equal(sc.as_plain(compiled(x)), sc.as_plain(function(x)))


SCRIPT = textwrap.dedent("""
    import sys, torch
    from isoscale import scalify as sc
    FACTOR = {factor}
    @sc.rule(torch.ops.aten.special_bessel_j0.default)
    def made_up(x):
        "s = s_x"
        return sc.Pair(x.data * {factor}, x.scale)
    print(float(torch.compile(torch.special.bessel_j0, fullgraph=True)(sc.as_scaled(torch.ones(2)))[0]))
""")


def test_an_edited_rule_is_not_served_from_the_compile_cache(tmp_path):
    found = []
    for factor in (1.0, 5.0):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(factor=factor)], capture_output=True, text=True,
                              env=env, timeout=300, check=True)  # fmt: skip
        found.append(float(done.stdout.split()[-1]))
    assert found == [1.0, 5.0]
