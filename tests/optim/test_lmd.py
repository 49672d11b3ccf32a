"""What LMD computes: medians from any init, samples of the right law, steps by the formulas, pulls that bound weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from isoscale._base.errors import ConfigError
from isoscale.models import Decoder, DecoderConfig, ViT, ViTConfig
from isoscale.optim import LMD, split_parameters
from isoscale.optim.lmd_state import rms_of

FORMS = ("split", "hypentropy")


def matrix(rows: int = 64, cols: int = 96, seed: int = 0, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(std * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)))


def give(p: nn.Parameter, seed: int = 1, size: float = 1.0) -> Tensor:
    p.grad = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
    return p.grad


def draws(optimizer: LMD, p: nn.Parameter, count: int) -> Tensor:
    out = []
    for _ in range(count):
        with optimizer.sampled():
            out.append(p.detach().clone())
    return torch.stack(out)


@pytest.mark.parametrize("options", [
    {"split": "max"}, {"split": "product"}, {"form": "hypentropy"}, {"offset": 0.5}, {"offset": 0.02}, {"sigma": 0.3},
], ids=str)  # fmt: skip
def test_the_mean_of_the_first_medians_is_the_init(options: dict[str, Any]) -> None:
    p = matrix()
    start = p.detach().clone()
    optimizer = LMD([p], **options)
    with optimizer.sampled():
        assert not torch.equal(p, start)
    with optimizer.mean():
        torch.testing.assert_close(p.detach(), start, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_8_bit_medians_keep_the_init_without_bias(form: str) -> None:
    p = matrix(256, 256)
    start = p.detach().clone()
    optimizer = LMD([p], form=form, state="int8-log", lr=0.0)
    give(p)
    optimizer.step()
    with optimizer.mean():
        error = (p.detach() - start) / start.std()
    assert 0.01 < float(error.std()) < 0.05  # a cell is 1/16 of a factor e
    assert abs(float((error * start.sign()).mean())) < 5 * float(error.std()) / 256


def test_a_sampled_part_is_log_normal_about_its_median() -> None:
    """The law itself: log p+ is normal with the median's log and sigma; the net weight's is not."""
    p = nn.Parameter(torch.full((1, 4000), 1.0))
    optimizer = LMD([p], sigma=0.2, offset=1e-4)  # the other part is 1e-4 of it
    with optimizer.sampled():
        logs = p.detach().flatten().log().numpy()
    assert logs.mean() == pytest.approx(-0.02, abs=0.015)  # median e^(-sigma^2 / 2): the mean is the weight
    assert logs.std() == pytest.approx(0.2, rel=0.05)
    assert stats.kstest((logs - logs.mean()) / logs.std(), "norm").pvalue > 1e-3
    wide = matrix(1, 4000, std=1.0)
    other = LMD([wide], sigma=0.2)
    with other.sampled():
        net = wide.detach().abs().flatten().log().numpy()
    assert stats.kstest((net - net.mean()) / net.std(), "norm").pvalue < 1e-6


def test_one_vector_has_the_mean_and_variance_of_two_with_their_product_held() -> None:
    a, b = matrix(8, 8, std=0.3), matrix(8, 8, std=0.3)
    two, one = LMD([a], sigma=0.2, split="product", offset=0.5), LMD([b], sigma=0.2, form="hypentropy", offset=0.5)
    first, second = draws(two, a, 4000), draws(one, b, 4000)
    assert float((first.mean(0) - second.mean(0)).abs().max()) < 6 * float(first.std()) / math.sqrt(4000)
    ratio = first.std(0) / second.std(0)
    assert float(ratio.min()) > 0.93
    assert float(ratio.max()) < 1.07


def by_hand(w: np.ndarray, grads: list[np.ndarray], noise: list[np.ndarray], *, lr: float, sigma: float, b1: float, b2: float,
            decay: float) -> np.ndarray:  # fmt: skip
    """The reconstruction's lines 3 to 6 in float64, two medians, given the noise of each step."""
    b = 0.1 * np.sqrt((w**2).mean())
    m = [np.maximum(w, 0) * np.exp(-(sigma**2) / 2) + b, np.maximum(-w, 0) * np.exp(-(sigma**2) / 2) + b]
    v = [np.zeros_like(w), np.zeros_like(w)]
    for g, eps in zip(grads, noise):
        for k, sign in enumerate((1.0, -1.0)):
            u = sign * g * m[k] * eps[k]
            t = b1 * v[k] + (1 - b1) * u
            v[k] = b2 * v[k] + (1 - b2) * u
            m[k] = m[k] * np.exp(-lr * (np.sign(t) + decay * np.log(m[k] / b)))
    return np.exp(sigma**2 / 2) * (m[0] - m[1])


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_steps_are_the_papers_lines(kernel: str) -> None:
    """Against float64 numpy, with the noise that the samples themselves show."""
    p = matrix(16, 16, std=0.5)
    start, sigma = p.detach().double().numpy().copy(), 0.1
    optimizer = LMD([p], lr=0.05, sigma=sigma, betas=(0.9, 0.99), decay=0.2, kernel=kernel)
    grads, noise = [], [[np.exp(np.full((16, 16), sigma**2 / 2))] * 2]  # the first gradient is at the mean
    for step in range(6):
        grads.append(give(p, seed=step).double().numpy().copy())
        optimizer.step()
        state = optimizer.state[p]
        from isoscale.kernels.normals import base_keys, indices, normals, step_keys, words
        from isoscale.optim.lmd_state import place_of

        index = indices(p.shape, place_of(p), p.device)
        z = [normals(words(step_keys(base_keys(0, 0, k), int(state["draws"])), index)).double().numpy() for k in (0, 1)]
        noise.append([np.exp(sigma * x) for x in z])
    with optimizer.mean():
        got = p.detach().double().numpy()
    want = by_hand(start, grads, noise, lr=0.05, sigma=sigma, b1=0.9, b2=0.99, decay=0.2)
    assert np.abs(got - want).max() < 2e-6
    wrong = by_hand(start, grads, [[1.0, 1.0]] * 7, lr=0.05, sigma=sigma, b1=0.9, b2=0.99, decay=0.2)
    assert np.abs(got - wrong).max() > 1e-4  # control: the noise in the gradient's factor matters


def test_the_parent_rule_moves_by_the_momentum_itself() -> None:
    p = matrix(4, 4, std=1.0)
    optimizer = LMD([p], lr=0.5, sigma=1e-6, betas=(0.9,), decay=0.0, direction="raw")
    g = give(p)
    optimizer.step()
    after = optimizer.state[p]["log_pos"].clone()
    w = 0.1 * rms_of(matrix(4, 4, std=1.0)) + matrix(4, 4, std=1.0).detach().clamp(min=0)
    want = torch.log(w / (0.1 * rms_of(matrix(4, 4, std=1.0)))) - 0.5 * 0.1 * g * w
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8-log"])
def test_a_pull_bounds_weights_that_grow_without_it(form: str, state: str) -> None:
    """Gradients of one sign: |ln(m / b)| <= 1 / decay with the log-normal pull; without it up to the clamp."""

    def largest(decay: float) -> float:
        p = matrix(16, 16)
        optimizer = LMD([p], lr=0.5, decay=decay, form=form, state=state)
        for _ in range(60):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        keys = ("log_pos", "log_neg") if form == "split" else ("theta",)
        scale = {"fp32": 1.0, "bf16": 2.0**-11, "int8-log": 1 / 16}[state]
        return max(float(optimizer.state[p][key].float().abs().max()) * scale for key in keys)

    assert largest(0.5) <= 2.0 + 0.3
    assert largest(0.0) > 7.0


@pytest.mark.parametrize("regulariser", ["constant", "half-normal", "exponential"])
def test_other_priors_shrink_what_is_above_them(regulariser: str) -> None:
    p = matrix(16, 16)
    optimizer = LMD([p], lr=0.05, decay=0.05, regulariser=regulariser, betas=(0.0,))
    for step in range(50):
        give(p, seed=step)
        optimizer.step()
    control = matrix(16, 16)
    free = LMD([control], lr=0.05, decay=0.0, betas=(0.0,))
    for step in range(50):
        give(control, seed=step)
        free.step()
    shift = (optimizer.state[p]["log_pos"] - free.state[control]["log_pos"]).mean()
    assert float(shift) < -0.05


def test_a_gradient_of_zero_moves_nothing() -> None:
    """Rows of an embedding that no token used stay, momentum and all; with a plain sign of the momentum they would not."""
    table = nn.Embedding(10, 32)
    optimizer = LMD(table.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (table(torch.tensor([1, 2, 3])) * torch.randn(3, 32, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
        if step == 0:
            kept = {key: value.clone() for key, value in optimizer.state[table.weight].items()}
    for key in ("log_pos", "log_neg", "momentum_pos", "momentum_neg"):
        now, then = optimizer.state[table.weight][key], kept[key]
        assert torch.equal(now[[0, *range(4, 10)]], then[[0, *range(4, 10)]])
        assert not torch.equal(now[1:4], then[1:4])


def test_gradient_auto_is_the_papers_for_two_medians_and_the_cheaper_for_one_vector() -> None:
    found = {}
    for form in FORMS:
        for gradient in ("auto", "sample", "median"):
            p = matrix(16, 16, std=0.5)
            optimizer = LMD([p], form=form, gradient=gradient, direction="raw", sigma=0.3)
            for step in range(3):
                give(p, seed=step)
                optimizer.step()
            found[form, gradient] = p.detach().clone()
    assert torch.equal(found["split", "auto"], found["split", "sample"])
    assert not torch.equal(found["split", "auto"], found["split", "median"])
    assert torch.equal(found["hypentropy", "auto"], found["hypentropy", "median"])
    assert not torch.equal(found["hypentropy", "auto"], found["hypentropy", "sample"])


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_gives_back_the_sample_of_the_step_at_every_scale(form: str) -> None:
    for size in range(40):
        p = matrix(16, 16, std=0.5 + 0.01 * size)
        optimizer = LMD([p], form=form)
        give(p)
        optimizer.step()
        before = p.detach().clone()
        with optimizer.mean():
            assert not torch.equal(p, before)
        assert torch.equal(p, before)


def test_no_weight_moves_by_more_than_a_factor_e() -> None:
    p = matrix(16, 16)
    optimizer = LMD([p], lr=1.0, decay=5.0)
    for step in range(5):
        give(p, seed=step)
        if step == 0:
            optimizer.step()
            continue
        before = optimizer.state[p]["log_pos"].clone()
        optimizer.step()
        assert float((optimizer.state[p]["log_pos"] - before).abs().max()) <= 1.0 + 1e-6


def test_monte_carlo_samples_are_averaged() -> None:
    """Gradients of several samples, each times its own sampled part, against the same by hand."""
    p = matrix(8, 8, std=0.5)
    optimizer = LMD([p], lr=0.0, betas=(0.0,), sigma=0.3, samples=3, decay=0.0)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(seen) == 3
    assert not torch.equal(seen[1], seen[2])
    assert float(loss) == pytest.approx(sum(float((w**2).sum()) for w in seen) / 3, rel=1e-5)
    # u+ - u- = g (p+ + p-) has no closed form in w alone, but u+ + u- = g w: the sum of both momenta
    total = optimizer.state[p]["momentum_pos"] + optimizer.state[p]["momentum_neg"]
    torch.testing.assert_close(total, sum(2 * w * w for w in seen) / 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["decoder", "vit", "torch"])
def test_matrices_go_to_lmd_and_the_rest_to_adamw(model: str) -> None:
    if model == "torch":
        made: nn.Module = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 3))
        made.register_parameter("pos_embed", nn.Parameter(torch.randn(1, 4, 8)))
        want = {"1.weight", "3.weight"}
    elif model == "vit":
        made = ViT(ViTConfig(width=32, depth=1, head_size=16, norm="trainable", scaling="plain"))
        want = {name for name, p in made.named_parameters() if "blocks" in name and p.dim() > 1} | {"head.weight"}
    else:
        made = Decoder(DecoderConfig(vocab=64, width=32, depth=1, head_size=16, norm="trainable", scaling="plain"))
        want = {name for name, p in made.named_parameters() if p.dim() > 1} - {"embed.weight"}
    groups = {group["optimizer"]: {name for name, _ in group["params"]} for group in split_parameters(made)}
    assert groups["lmd"] == want
    assert groups["lmd"] | groups["adamw"] == {name for name, _ in made.named_parameters()}
    optimizer = LMD(split_parameters(made), aux={"lr": 0.5}) if model != "decoder" else LMD(
        made.named_parameters(), aux={"lr": 0.5}, route=lambda name, p: p.dim() > 1 and name != "embed.weight")  # fmt: skip
    found = {group["optimizer"]: set(group["param_names"]) for group in optimizer.param_groups}
    assert found == groups
    assert {group["lr"] for group in optimizer.param_groups if group["optimizer"] == "adamw"} == {0.5}


def test_the_rest_moves_as_torchs_adamw_moves_it() -> None:
    torch.manual_seed(0)
    here, there = nn.Linear(4, 4), nn.Linear(4, 4)
    there.load_state_dict(here.state_dict())
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, plain = LMD(here.parameters(), aux=settings), torch.optim.AdamW([there.bias], **settings)
    for step in range(5):
        give(here.weight, seed=step)
        there.bias.grad = give(here.bias, seed=10 + step).clone()
        optimizer.step()
        plain.step()
    assert torch.equal(here.bias, there.bias)


def test_bad_settings_are_refused_by_name() -> None:
    p = matrix()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sigma": 0.0}, "sigma"), ({"sigma": 1.5}, "sigma"), ({"sigma": -0.1}, "sigma"), ({"lr": 1.5}, "lr"),
        ({"lr": float("nan")}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"betas": (0.9, 0.9, 0.9)}, "betas"),
        ({"decay": -1.0}, "decay"), ({"regulariser": "lognormal"}, "log-normal"), ({"form": "hyper"}, "hypentropy"),
        ({"state": "int8"}, "int8-log"), ({"aux": {"learning_rate": 1.0}}, "aux"), ({"samples": 0}, "samples"),
        ({"kernel": "triton"}, "kernel"), ({"form": "hypentropy", "regulariser": "constant"}, "regulariser"),
        ({"split": "min"}, "split"), ({"gradient": "mean"}, "gradient"), ({"offset": 0.0}, "offset"),
    ]  # fmt: skip
    for settings, word in cases:
        with pytest.raises(ConfigError, match=word):
            LMD([p], **settings)


def test_a_matrix_of_zeros_is_refused_with_what_to_do() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ConfigError, match=r"(?s)weight is all zeros.*optimizer='adamw'"):
        LMD(layer.named_parameters())
    LMD([{"params": [layer.weight], "optimizer": "adamw"}])  # as the hint says
    late = nn.Linear(4, 4)
    optimizer = LMD(late.named_parameters())
    nn.init.zeros_(late.weight)
    give(late.weight)
    with pytest.raises(ConfigError, match="weight is all zeros"):
        optimizer.step()


def test_gradients_that_are_not_finite_leave_everything_as_it_was() -> None:
    model = nn.Linear(8, 8)
    optimizer = LMD(model.parameters())
    for p in model.parameters():
        give(p)
    optimizer.step()
    before = [x.clone() for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())]
    for bad in (math.nan, math.inf, -math.inf):
        for p in model.parameters():
            give(p)
        model.bias.grad[3] = bad
        optimizer.step()
    after = [x for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after))
    assert optimizer.skipped == 3
    give(model.bias)
    optimizer.step()
    assert optimizer.skipped == 3
    assert int(optimizer.state[model.weight]["draws"]) == 2
    assert not torch.equal(next(model.parameters()).detach(), before[0])


def test_sparse_and_complex_are_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = LMD(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="dense"):
        optimizer.step()
    with pytest.raises(ConfigError, match="complex"):
        LMD([nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))])


def test_groups_that_are_another_optimisers_or_misspelt_are_refused() -> None:
    layer = nn.Linear(4, 4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"eps": 1e-8, "weight_decay": 0.1, "betas": (0.9, 0.95)}, "AdamW's"), ({"weight_decay": 0.0}, "decay"),
        ({"sigmaa": 0.1}, "sigma"), ({"optimizer": "lmd", "weight_decay": 0.0}, "decay"),
    ]  # fmt: skip
    for more, word in cases:
        with pytest.raises(ConfigError, match=word):
            LMD([{"params": layer.parameters(), **more}])
    with pytest.raises(ConfigError, match="split_parameters"):
        LMD(list(layer.state_dict()))
    broken = nn.Linear(4, 4)
    broken.weight.data[0, 0] = math.nan
    with pytest.raises(ConfigError, match="weight is not finite"):
        LMD(broken.named_parameters())


def test_an_empty_matrix_is_no_trouble() -> None:
    empty, p = nn.Parameter(torch.zeros(0, 4)), matrix(4, 4)
    optimizer = LMD([empty, p])
    empty.grad = torch.zeros(0, 4)
    give(p)
    optimizer.step()
    assert int(optimizer.state[p]["draws"]) == 1
