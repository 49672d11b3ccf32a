"""A bench shares models between runs; a run on one is the run without it, to the bit."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from isoscale._base.errors import ConfigError
from isoscale._base.log import read
from isoscale.kernels import build
from isoscale.nn import gemm
from isoscale.train import Bench, loop, train
from isoscale.train import bench as module
from isoscale.train.bench import _kinds

CPU = torch.device("cpu")
FIRST = {"hps.lr": 4.0, "hps.init_std": 2.0, "hps.alpha_res": 3.0, "hps.alpha_attn": 2.0, "hps.alpha_ffn_act": 0.5,
         "hps.alpha_out": 2.0, "hps.alpha_loss": 0.5, "hps.beta1": 0.8, "hps.weight_decay": 0.1, "seed": 7}  # fmt: skip
FUSED = {"train.fused": True, "model.head_size": 16}


def rows(out):
    return list(read(out / "metrics.jsonl"))


def weights(out):
    return loop.checkpoint.load_latest(out).model


@pytest.mark.parametrize(
    "values",
    [{}, {"model.dropout": 0.2}, {"model.tied": True, "model.norm": "trainable", "model.qk_norm": True},
     {"rules.parametrisation": "sp"}, {"rules.parametrisation": "mup", "base.width": 8}, FUSED,
     pytest.param({"optim.name": "lmd"}, marks=pytest.mark.slow)],
    ids=["plain", "dropout", "tied", "sp", "mup", "fused", "lmd"],
)  # fmt: skip
def test_a_run_on_a_used_bench_is_a_fresh_run_to_the_bit(tiny, tmp_path, values):
    bench = Bench()
    first = {**values, **(FIRST if not values.keys() & {"rules.parametrisation", "optim.name"} else {"seed": 7})}
    train(tiny(**first), tmp_path / "before", bench=bench)
    train(tiny(**values), tmp_path / "shared", bench=bench)
    train(tiny(**values), tmp_path / "fresh")
    assert len(bench._held) == 1
    assert rows(tmp_path / "shared") == rows(tmp_path / "fresh") != rows(tmp_path / "before")
    shared, fresh = weights(tmp_path / "shared"), weights(tmp_path / "fresh")
    assert shared.keys() == fresh.keys()
    assert all(torch.equal(shared[k], fresh[k]) for k in fresh)


def test_the_model_is_shared_and_every_multiplier_is_the_plans_own(tiny):
    bench = Bench()
    first = bench.ready(tiny(**FIRST), 256, CPU)
    before = {site: getattr(first.model.get_submodule(site.path), site.attr)
              for site in first.model.sites() if site.attr}  # fmt: skip
    again, fresh = bench.ready(tiny(), 256, CPU), Bench().ready(tiny(), 256, CPU)
    assert again.model is first.model
    assert again.model is not fresh.model
    for site in (s for s in fresh.model.sites() if s.attr):
        path, attr = site.path, site.attr
        assert getattr(again.model.get_submodule(path), attr) == getattr(fresh.model.get_submodule(path), attr)
    moved = [s for s in before if before[s] != getattr(fresh.model.get_submodule(s.path), s.attr)]
    assert len(moved) >= 5  # the control: the first run's were others


def test_control_a_model_with_a_multiplier_that_nobody_plans_is_not_held(tiny, monkeypatch):
    real = module.make_plan

    def partial(config, model):
        plan = real(config, model)
        sites = [replace(site, multiplier=None) if site.attr == "loss_mult" else site for site in plan.sites]
        return replace(plan, sites=tuple(sites))

    monkeypatch.setattr(module, "make_plan", partial)
    bench = Bench()
    first = bench.ready(tiny(), 256, CPU).model
    first.loss_mult = 3.0
    again = bench.ready(tiny(), 256, CPU).model
    assert again is not first
    assert again.loss_mult == 1.0


def test_another_shape_is_another_model_and_the_oldest_leaves(tiny):
    bench = Bench(shapes=2)
    one, two = (bench.ready(tiny(**{"model.width": width}), 256, CPU).model for width in (16, 32))
    assert one is not two
    assert bench.ready(tiny(**{"model.width": 16}), 256, CPU).model is one
    bench.ready(tiny(**{"model.width": 24}), 256, CPU)
    assert bench.ready(tiny(**{"model.width": 32}), 256, CPU).model is not two
    assert len(bench._held) == 2


def test_fused_is_the_runs_own_setting_and_moves_losses_by_rounding_only(tiny, tmp_path):
    bench = Bench()
    for name, values in (("fused", FUSED), ("plain", {"model.head_size": 16})):
        train(tiny(**values), tmp_path / name, bench=bench)
    assert len(bench._held) == 1
    fused, plain = ([row.get("loss", 0) for row in rows(tmp_path / name)] for name in ("fused", "plain"))
    assert fused != plain
    assert fused == pytest.approx(plain, abs=1e-4)


def test_fused_is_refused_without_a_compiler(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ISOSCALE_KERNELS", "off")
    with pytest.raises(ConfigError, match="no fused kernels"):
        train(tiny(**FUSED), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_cast_models_are_not_shared(tiny, tmp_path):
    cast = {"numerics.recipe": "mxfp8", "numerics.norm": "mxnorm", "model.width": 32, "model.depth": 3}
    bench = Bench()
    ready = bench.ready(tiny(**cast), 256, CPU)
    assert not bench._held
    assert bench.ready(tiny(**cast), 256, CPU).model is not ready.model
    assert _kinds(ready.model) != _kinds(Bench().ready(tiny(), 256, CPU).model)
    train(tiny(**cast, **{"hps.lr": 4.0}), tmp_path / "before", bench=bench)
    train(tiny(**cast), tmp_path / "shared", bench=bench)
    train(tiny(**cast), tmp_path / "fresh")
    assert rows(tmp_path / "shared") == rows(tmp_path / "fresh")


def test_a_cut_run_resumes_on_another_bench_to_the_bit(tiny, tmp_path):
    bench = Bench()

    def stop(tick):
        if tick.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "cut", on_step=stop, bench=bench)
    train(tiny(**FIRST), tmp_path / "other", bench=bench)
    train(tiny(), tmp_path / "cut", resume=True, bench=bench)
    train(tiny(), tmp_path / "whole")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_text_is_read_once(tiny, monkeypatch):
    calls, real = [], module.load_corpus
    monkeypatch.setattr(module, "load_corpus", lambda *args, **kw: calls.append(args) or real(*args, **kw))
    bench = Bench()
    one, two = bench.corpus(tiny()), bench.corpus(tiny(**{"hps.lr": 2.0}))
    assert one is two
    assert len(calls) == 1
    assert bench.corpus(tiny(**{"data.seq_len": 16})) is not one


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs torch has compiled so far; without code generation, which says nothing about recompilation."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


TRIALS = [{"hps.lr": 2.0}, {"hps.beta1": 0.8}, {"hps.beta2": 0.9}, {"hps.eps": 1e-6}, {"hps.weight_decay": 0.1},
          {"hps.init_std": 1.5}, {"seed": 5}]  # fmt: skip
SHORT = {"train.steps": 3, "train.eval_every": 3, "train.checkpoint_every": 3}
ALPHAS = ("alpha_res", "alpha_attn", "alpha_ffn_act", "alpha_out", "alpha_loss", "alpha_res_attn_ratio")


@pytest.mark.slow
def test_no_trial_recompiles_a_compiled_step(tiny, tmp_path, graphs):
    bench = Bench()
    train(tiny(**SHORT, **{"train.compile": True}), tmp_path / "warm-up", bench=bench)
    before = graphs()
    assert before >= 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, values in enumerate(TRIALS):
            train(tiny(**SHORT, **{"train.compile": True}, **values), tmp_path / str(number), bench=bench)
    assert graphs() == before
    train(tiny(**SHORT, **{"train.compile": True, "model.width": 32}), tmp_path / "control", bench=bench)
    assert graphs() > before


ALPHAS_OF_TRIALS = [{}, {"alpha_res": 1.3, "alpha_attn": 0.6, "alpha_ffn_act": 1.7, "alpha_loss": 0.8, "alpha_out": 1.4,
                         "alpha_res_attn_ratio": 0.7}]  # fmt: skip
ALPHAS_OF_TRIALS += [{name: value * (1 + k / 7) for name, value in ALPHAS_OF_TRIALS[1].items()} for k in range(1, 8)]
ALPHAS_OF_TRIALS += [dict.fromkeys(ALPHAS_OF_TRIALS[1], 1.0), {"alpha_res": 0.5}]


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, {"model.qk_norm": True, "model.norm": "trainable", "train.batch": 2}])
def test_however_many_multipliers_two_forms_are_compiled_and_both_are_right(tiny, graphs, values):
    bench, seen = Bench(), []
    ids = torch.arange(4 * 32).reshape(4, 32) % 97
    for alphas in ALPHAS_OF_TRIALS:
        config = tiny(**{"train.compile": True, **values, **{f"hps.{name}": value for name, value in alphas.items()}})
        ready = bench.ready(config, 256, CPU)
        loss = ready.step(ids, ids, tokens=128)
        loss.backward()
        seen.append(graphs())
        found = {name: p.grad.clone() for name, p in ready.model.named_parameters()}
        fresh = Bench().ready(config, 256, CPU).model
        want = fresh(ids, ids, tokens=128)
        want.backward()
        assert abs(float(loss.detach() - want.detach())) < 1e-5
        for name, p in fresh.named_parameters():
            assert float((found[name] - p.grad).norm() / p.grad.norm()) < 1e-4, (alphas, name)
    assert seen == [1] + [2] * (len(seen) - 1)


@pytest.mark.slow
def test_control_a_kernel_that_takes_a_multiplier_for_a_constant_is_compiled_for_each(tiny, graphs, monkeypatch):
    monkeypatch.setattr(gemm, "is_known", lambda factor: True)
    bench, ids = Bench(), torch.zeros(4, 32, dtype=torch.long)
    for alphas in ALPHAS_OF_TRIALS[:5]:
        config = tiny(**{"train.compile": True, **{f"hps.{name}": value for name, value in alphas.items()}})
        bench.ready(config, 256, CPU).step(ids, ids).backward()
    assert graphs() == 5


def test_the_fused_step_compiles_nothing_whatever_changes(tiny, tmp_path, graphs, monkeypatch):
    bench = Bench()
    train(tiny(**SHORT, **FUSED), tmp_path / "first", bench=bench)
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("a kernel is built again"))
    for number, values in enumerate([*TRIALS, *({f"hps.{name}": 0.7} for name in ALPHAS)]):
        train(tiny(**SHORT, **FUSED, **values), tmp_path / str(number), bench=bench)
    assert graphs() == 0
    assert len(bench._held) == 1


def test_a_plan_on_the_meta_device_imports_neither_the_compiler_nor_distributed_tensors():
    code = ("import sys; from isoscale.config import RunConfig; import isoscale.train, isoscale.sweep.study\n"
            "from isoscale.train.setup import meta_plan; meta_plan(RunConfig(), 256)\n"
            "found = {'torch._dynamo', 'torch.distributed.tensor'} & set(sys.modules); assert not found, found")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
    wrong = code.replace("import sys;", "import sys, torch.distributed.tensor;")
    assert subprocess.run([sys.executable, "-c", wrong], capture_output=True, check=False).returncode != 0  # the control
