"""The static front end: a plain float32 model under scales fixed at compile time equals the plain one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

from isoscale._base.errors import ConfigError
from isoscale.models import Decoder, DecoderConfig
from isoscale.scalify import RuleError, registry, rule
from isoscale.scalify.static import StaticBackend, register, static_backend
from isoscale.scalify.static_fold import fold

aten = torch.ops.aten
Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Transformer(nn.Module):
    """Layer norms, biases, an additive -inf mask, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(31, 32), nn.Parameter(0.02 * torch.randn(12, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 31)
        self.register_buffer("mask", torch.full((12, 12), -torch.inf).triu(1))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embed(ids) + self.position, src_mask=self.mask))
        return logits


def mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
    return model, (torch.randn(48, 32), torch.randint(10, (48,)))


def decoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = DecoderConfig(vocab=61, width=32, depth=2, head_size=16, scaling="plain", norm="trainable")
    return Decoder(config), (torch.randint(61, (4, 16)), torch.randint(61, (4, 16)))


def conv() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, stride=2),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return model, (torch.randn(16, 3, 12, 12), torch.randint(10, (16,)))


def transformer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Transformer(), (torch.randint(31, (4, 12)), torch.randint(31, (4, 12)))


MODELS = [mlp, decoder, conv, transformer]


def loss_of(model: nn.Module) -> Loss:
    if isinstance(model, Decoder):
        return lambda ids, targets: model(ids, targets)
    return lambda x, y: F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def gradients(model: nn.Module, loss: Loss, *inputs: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    found = loss(*inputs)
    found.backward()
    return float(found.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def both(make: Callable[[], Any], **options: Any) -> tuple[StaticBackend, float, float]:
    """(backend, difference of losses, largest relative error of a gradient) between static and plain."""
    model, inputs = make()
    plain = copy.deepcopy(model)
    want, grads = gradients(plain, loss_of(plain), *inputs)
    backend = static_backend(**{"compiler": "eager", **options})
    loss, found = gradients(model, torch.compile(loss_of(model), backend=backend, fullgraph=True), *inputs)
    assert found.keys() == grads.keys()
    scale = max(float(g.norm()) for g in grads.values())
    worst = max(error(found[name], g) for name, g in grads.items() if float(g.norm()) > 1e-5 * scale)
    return backend, abs(loss - want), worst


@pytest.mark.parametrize("make", MODELS)
def test_float32_is_the_plain_model_to_round_off(make: Callable[[], Any]) -> None:
    _, loss, grad = both(make)
    assert loss < 1e-6
    assert grad < 3e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("make", [mlp, decoder, transformer])
def test_half_data_are_close(make: Callable[[], Any], dtype: torch.dtype, bound: float) -> None:
    _, loss, grad = both(make, dtype=dtype)
    assert loss < bound
    assert 1e-5 < grad < bound


def test_half_data_are_close_in_a_conv_net() -> None:
    _, loss, grad = both(conv, dtype=torch.float16)
    assert loss < 0.01
    assert 1e-5 < grad < 0.05  # its ReLU and pooling flip on rounding


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_inductor_gives_the_same(make: Callable[[], Any]) -> None:
    backend, loss, grad = both(make, compiler="inductor")
    assert loss < 1e-6
    assert grad < 3e-6
    assert len(backend.graphs) == 1


class Recorder(torch.fx.Interpreter):
    """Root mean square of every float tensor of a graph that is not 0-d, by node."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.rms: dict[torch.fx.Node, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function" and isinstance(out, Tensor) and out.is_floating_point() and out.dim():
            self.rms[n] = float(out.double().square().mean().sqrt())
        return out


def data_rms(make: Callable[[], Any], scaled: bool) -> dict[torch.fx.Node, float]:
    """RMS of every tensor in the joint graph of a model on real inputs, rewritten to fp16 data or as it was."""
    model, inputs = make()
    static, plain, real = static_backend(dtype=torch.float16, compiler="eager"), [], []

    def spy(module: torch.fx.GraphModule, found: Any) -> Any:
        real.extend(x.detach().clone() for x in found)
        return (static if scaled else recording(plain))(module, found)

    torch.compile(loss_of(model), backend=spy, fullgraph=True)(*inputs)
    (graph,) = static.graphs if scaled else plain
    places = [node.meta["desc"] for node in graph.graph.find_nodes(op="placeholder")]
    recorder = Recorder(graph)
    with torch.no_grad():
        recorder.run(*[real[at.idx] if hasattr(at, "idx") else torch.ones(()) for at in places], enable_io_processing=False)
    return {node: rms for node, rms in recorder.rms.items() if 0 < rms < math.inf}


@pytest.mark.parametrize("make", [mlp, decoder, transformer])
def test_data_stay_near_unit_where_plain_values_do_not(make: Callable[[], Any]) -> None:
    half = [rms for node, rms in data_rms(make, True).items() if node.meta["val"].dtype == torch.float16]
    assert len(half) > 20
    assert min(half) > 2.0**-10
    assert max(half) < 2.0**6
    near = [2.0**-4 < rms < 2.0**4 for rms in half]
    assert sum(near) > 0.95 * len(near)
    torch._dynamo.reset()
    plain = [2.0**-4 < rms < 2.0**4 for rms in data_rms(make, False).values()]
    assert sum(plain) < 0.7 * len(plain), "control: the plain values"


def test_gradients_below_fp16_survive_without_a_loss_scale() -> None:
    tiny, (x, y) = 1e-9, mlp()[1]
    model = mlp()[0]
    half = copy.deepcopy(model).half()
    half_loss = tiny * F.cross_entropy(half(x.half()), y)
    half_loss.backward()
    assert all((p.grad == 0).all() for p in half.parameters() if p.grad is not None), "control: plain fp16 loses them"
    _, want = gradients(model, lambda x, y: tiny * F.cross_entropy(model(x), y), x, y)
    backend = static_backend(dtype=torch.float16, compiler="eager")
    run = torch.compile(lambda x, y: tiny * F.cross_entropy(model(x), y), backend=backend)
    _, found = gradients(model, run, x, y)
    assert all(error(found[name], want[name]) < 0.01 for name in want)


def test_values_above_fp16_survive() -> None:
    model, (x, _) = mlp()
    backend = static_backend(dtype=torch.float16, scales={"x": 2.0**30}, compiler="eager")
    run = torch.compile(lambda x: model(x), backend=backend)
    found, want = run(x * 1e9), model(x * 1e9)
    assert torch.isfinite(found).all()
    assert error(found.detach(), want.detach()) < 2e-3
    assert not torch.isfinite((x * 1e9).half()).all(), "control: plain fp16 overflows"


@pytest.mark.parametrize("make", [mlp, decoder, transformer])
def test_nothing_computes_scales_in_the_graph(make: Callable[[], Any]) -> None:
    """No 0-d float tensor beyond those of the plain joint graph, and at most a few factors for each operator."""
    plain: list[torch.fx.GraphModule] = []
    model, inputs = make()
    static, loss, _ = both(lambda: (copy.deepcopy(model), inputs))
    run = torch.compile(loss_of(model), backend=recording(plain), fullgraph=True)
    run(*inputs)
    ((before,), (after,)) = plain, static.graphs
    sizes = [sum(node.op == "call_function" for node in graph.graph.nodes) for graph in (before, after)]
    assert sizes[1] < 2.5 * sizes[0]
    assert scalars(after) <= scalars(before) + 4  # the data of the loss and its count, under their scales
    assert loss < 1e-6


def scalars(graph: torch.fx.GraphModule) -> int:
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    return sum(isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 0 for x in values)


def recording(into: list[torch.fx.GraphModule]) -> Any:
    """A backend that keeps the joint graph and runs it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: Any, *args: Any, **more: Any) -> Any:
        into.append(copy.deepcopy(joint))
        return min_cut_rematerialization_partition(joint, *args, **more)

    return aot_autograd(
        fw_compiler=lambda g, _: make_boxed_func(g.forward), partition_fn=partition, decompositions={},
        keep_inference_input_mutations=True,
    )  # fmt: skip


def test_a_dynamic_scale_in_the_graph_would_be_seen() -> None:
    """Control of the count above: the same decoder with scales as 0-d tensors."""
    from isoscale.scalify.transform import scalify

    model, inputs = decoder()
    plain: list[torch.fx.GraphModule] = []
    torch.compile(loss_of(model), backend=recording(plain), fullgraph=True)(*inputs)
    scaled, _ = scalify(model, recipe="float32")
    dynamic: list[torch.fx.GraphModule] = []
    torch.compile(loss_of(scaled), backend=recording(dynamic))(*inputs)
    assert scalars(dynamic[0]) > scalars(plain[0]) + 50


def test_one_graph_for_all_batches_of_an_octave() -> None:
    model = mlp()[0]
    backend = static_backend(compiler="eager")
    run = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=backend, dynamic=True)
    counts = []
    for batch in (128, 96, 120, 65, 250):
        x, y = torch.randn(batch, 32), torch.randint(10, (batch,))
        want, grads = gradients(model, lambda x, y: F.cross_entropy(model(x), y), x, y)
        loss, found = gradients(model, run, x, y)
        assert abs(loss - want) < 1e-6
        assert all(error(found[name], grads[name]) < 1e-6 for name in grads)
        counts.append(len(backend.graphs))
    assert counts[:4] in ([1, 1, 1, 1], [1, 2, 2, 2]), "one graph from 65 to 128, whatever the order of the guards"
    assert counts[4] <= counts[3] + 1


def test_dropout_drops_as_often_and_scales_as_much() -> None:
    model = nn.Sequential(nn.Linear(16, 512), nn.Dropout(0.25))
    x = torch.randn(64, 16)
    run = torch.compile(model, backend=static_backend(dtype=torch.float16, compiler="eager"), fullgraph=True)
    out, full = run(x).detach(), model[0](x).detach()
    kept = out != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    assert error(out[kept], full[kept] / 0.75) < 2e-3


def test_masks_with_minus_infinity_and_the_largest_float() -> None:
    scores = torch.randn(4, 6, 6)
    open_ = torch.ones(6, 6, dtype=torch.bool).tril()
    for low in (-torch.inf, torch.finfo(torch.float32).min):
        for dtype in (torch.float32, torch.float16):

            def masked(x: Tensor) -> Tensor:
                added = torch.full((6, 6), low).triu(1)
                return F.softmax(x + added, -1) + F.softmax(x.masked_fill(~open_, low), -1)

            torch._dynamo.reset()
            run = torch.compile(masked, backend=static_backend(dtype=dtype, compiler="eager"), fullgraph=True)
            assert error(run(scores), masked(scores)) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_running_statistics_are_written_in_their_own_precision() -> None:
    model, (x, _) = conv()
    plain = copy.deepcopy(model)
    run = torch.compile(model, backend=static_backend(dtype=torch.float16, compiler="eager"), fullgraph=True)
    for _ in range(3):
        run(x), plain(x)
    norm, want = model[1], plain[1]
    assert int(norm.num_batches_tracked) == 3
    assert norm.running_mean.dtype == torch.float32
    assert error(norm.running_mean, want.running_mean) < 2e-3
    assert error(norm.running_var, want.running_var) < 2e-3
    model.eval(), plain.eval()
    with torch.no_grad():
        assert error(run(x), plain(x)) < 5e-3


def train(model: nn.Module, loss: Loss, inputs: tuple[Tensor, ...], steps: int = 30) -> list[float]:
    optimizer, out = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        found = loss(*inputs)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(found.detach()))
    return out


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 0.02)], ids=["fp32", "fp16"])
def test_training_with_a_plain_optimizer_tracks_plain_float32(dtype: torch.dtype, bound: float) -> None:
    model, inputs = mlp()
    plain = copy.deepcopy(model)
    backend = static_backend(dtype=dtype, compiler="eager")
    found = train(model, torch.compile(loss_of(model), backend=backend, fullgraph=True), inputs)
    want = train(plain, loss_of(plain), inputs)
    assert want[-1] < want[0] - 0.5, "control: it trains"
    assert max(abs(a - b) for a, b in zip(found, want)) < bound
    assert len(backend.graphs) == 1, "scales are those of compile time: no new graph as weights move"


def test_fp8_rounds_the_operands_of_linears_and_nothing_else() -> None:
    backend, loss, grad = both(decoder, dtype=torch.bfloat16, fp8=True)
    nodes = [node for node in backend.graphs[0].graph.nodes if node.op == "call_function"]
    kinds = [node.meta["val"].dtype for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    linears = 2 * 4 + 1
    assert kinds.count(torch.float8_e5m2) == 2 * linears  # the cotangent, in both products of the backward
    assert kinds.count(torch.float8_e4m3fn) == 4 * linears
    assert loss < 0.05
    assert 0.01 < grad < 0.5
    _, _, without = both(decoder, dtype=torch.bfloat16)
    assert without < 0.5 * grad


def test_factors_of_parameters_and_their_gradients_ride_in_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(graph: torch.fx.GraphModule) -> int:
        """Products with a number on tensors as large as a weight."""
        return sum(node.target is aten.mul.Tensor and node.meta["val"].numel() >= 320 and
                   node.meta["val"].shape[0] != 48 for node in graph.graph.nodes)  # fmt: skip

    backend, _, _ = both(mlp)
    assert large(backend.graphs[0]) == 0
    monkeypatch.setattr("isoscale.scalify.static.fold", lambda graph: 0)
    torch._dynamo.reset()
    control, loss, grad = both(mlp)
    assert large(control.graphs[0]) >= 4
    assert max(loss, grad) < 1e-6
    assert fold(control.graphs[0]) >= 4


def test_parameter_scales_are_the_powers_of_two_nearest_to_their_rms() -> None:
    model, (x, _) = mlp()
    with torch.no_grad():
        model[0].weight.mul_(3.0 / model[0].weight.square().mean().sqrt())
        model[2].bias.zero_()
    backend = static_backend(scales={"2.weight": 0.5}, compiler="eager")
    torch.compile(model, backend=backend)(x)
    assert backend.scales["0.weight"] == 4.0
    assert backend.scales["2.weight"] == 0.5
    assert backend.scales["2.bias"] == 2.0**-6
    assert backend.scales["args.0"] == 1.0


def test_a_scale_for_no_input_warns_with_the_nearest_name() -> None:
    model, (x, _) = mlp()
    with pytest.warns(UserWarning, match=r"'0\.wieght'.*0\.weight"):
        torch.compile(model, backend=static_backend(scales={"0.wieght": 0.5}, compiler="eager"))(x)


def test_a_missing_rule_names_the_operator_the_line_and_the_ways_out() -> None:
    def odd(x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x * 2)

    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(odd, backend=static_backend(compiler="eager"))(torch.randn(4))
    inner = caught.value.inner_exception
    assert isinstance(inner, RuleError)
    assert inner.key == "aten.special_bessel_j0.default"
    assert "test_static.py" in inner.place
    assert "bessel_j0(x * 2)" in inner.place
    assert "@iso.scalify.rule" in inner.hint
    assert 'fallback=("aten.special_bessel_j0.default",)' in inner.hint


def test_an_operator_without_a_rule_is_taken_to_pieces_that_have_one() -> None:
    op = aten.logit_backward.default
    assert registry.find(op) is None, "has a rule now: take another"
    x = torch.rand(50, requires_grad=True)
    run = torch.compile(lambda x: torch.logit(x, 1e-3).sum(), backend=static_backend(compiler="eager"))
    (found,), (want,) = (torch.autograd.grad(f(x), x) for f in (run, lambda x: torch.logit(x, 1e-3).sum()))
    assert error(found, want) < 1e-6


def test_a_fallback_is_counted_and_warned_of() -> None:
    backend = static_backend(dtype=torch.float16, fallback=("aten.special_bessel_j0.default",), compiler="eager")
    x = torch.randn(100)
    with pytest.warns(UserWarning, match=r"bessel_j0.*plain values.*test_static"):
        found = torch.compile(lambda x: torch.special.bessel_j0(x * 2) * 3, backend=backend)(x)
    assert backend.fallbacks == {"aten.special_bessel_j0.default": 1}
    assert error(found, torch.special.bessel_j0(x * 2) * 3) < 2e-3
    assert backend.key([1.0]) is None, "a cached graph would not be counted"


def test_a_rule_that_measures_data_is_refused() -> None:
    from isoscale.scalify.pair import Pair

    @torch.library.custom_op("isoscale_test::measured", mutates_args=())
    def measured(x: Tensor) -> Tensor:
        return x.clone()

    measured.register_fake(torch.empty_like)

    @rule(torch.ops.isoscale_test.measured.default)
    def by_data(x: Any) -> Pair:
        """s = max |x|"""
        return Pair(x.data, x.data.abs().max())

    with pytest.raises(BackendCompilerFailed, match="takes its scale from data"):
        torch.compile(lambda x: measured(x * 2), backend=static_backend(compiler="eager"))(torch.randn(4))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="dtype"):
        static_backend(dtype=torch.float64)
    with pytest.raises(ConfigError, match="power of two"):
        static_backend(scales={"x": 0.3})
    with pytest.raises(ConfigError, match="inductor or eager"):
        static_backend(compiler="aot")  # type: ignore[arg-type]


def test_a_cached_graph_is_not_served_for_other_scales_dtypes_or_rules() -> None:
    keys = {static_backend().key([1.0]), static_backend().key([2.0]), static_backend(torch.float16).key([1.0]),
            static_backend(fp8=True).key([1.0])}  # fmt: skip
    assert len(keys) == 4
    assert static_backend().key([1.0]) in keys

    op = torch.library.custom_op("isoscale_test::other", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
    del op
    rule(torch.ops.isoscale_test.other.default)(lambda x: x)
    assert static_backend().key([1.0]) not in keys


def test_the_backend_has_a_name_and_takes_options() -> None:
    from torch._dynamo import list_backends

    register()
    register()  # harmless

    assert "isoscale_scalify" in list_backends(exclude_tags=())
    model, (x, _) = mlp()
    run = torch.compile(model, backend="isoscale_scalify", options={"dtype": torch.bfloat16, "compiler": "eager"})
    with torch.no_grad():
        assert 1e-5 < error(run(x), model(x)) < 0.02


def test_graphs_without_gradients_are_rewritten_too() -> None:
    model, (x, _) = mlp()
    backend = static_backend(dtype=torch.bfloat16, compiler="eager")
    with torch.no_grad():
        found = torch.compile(model, backend=backend)(x)
        assert 1e-5 < error(found, model(x)) < 0.02
    assert len(backend.graphs) == 1


def test_tied_and_repeated_inputs() -> None:
    config = DecoderConfig(vocab=61, width=32, depth=1, head_size=16, scaling="plain", tied=True)
    ids = torch.randint(61, (2, 8))
    _, loss, grad = both(lambda: (Decoder(config), (ids, ids)))
    assert loss < 1e-6
    assert grad < 3e-6


def test_activation_checkpointing_still_recomputes() -> None:
    model, (x, y) = mlp()
    plain = copy.deepcopy(model)

    def loss(model: nn.Module) -> Loss:
        return lambda x, y: F.cross_entropy(checkpoint(model, x, use_reentrant=False), y)

    want, grads = gradients(plain, loss(plain), x, y)
    backend = static_backend(compiler="eager")
    found, mine = gradients(model, torch.compile(loss(model), backend=backend, fullgraph=True), x, y)
    assert abs(found - want) < 1e-6
    assert all(error(mine[name], grads[name]) < 1e-6 for name in grads)
    assert any("recompute" in node.meta for node in backend.graphs[0].graph.nodes)


def test_no_warning_is_given_where_nothing_is_odd(recwarn: pytest.WarningsRecorder) -> None:
    both(mlp)
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
