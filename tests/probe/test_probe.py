"""Probes look and never change."""

import math

import pytest
import torch
from torch import nn

from isoscale.probe import first_bad, site_scales
from isoscale.train.setup import build


class Spoiler(nn.Module):
    """Hands its input on; spoils it, or its gradient."""

    def __init__(self, forward=None, backward=None):
        super().__init__()
        self.spoil, self.spoil_grad = forward, backward

    def forward(self, x):
        if self.spoil is not None:
            x = x * self.spoil
        if self.spoil_grad is not None:
            x.register_hook(lambda grad: grad * self.spoil_grad)
        return x


def model_with(spoiler):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), spoiler, nn.Linear(4, 1))
    return model, lambda: model(torch.ones(3, 4)).sum()


@pytest.mark.parametrize(("spoiler", "name"), [
    (Spoiler(forward=math.nan), "output of 1 (Spoiler): 12 NaN and 0 Inf among 12 values"),
    (Spoiler(forward=math.inf), "output of 1 (Spoiler): 0 NaN and 12 Inf"),
    (Spoiler(backward=math.nan), "gradient of 0."),
    (Spoiler(), "nothing non-finite"),
])  # fmt: skip
def test_first_bad_names_what_went_bad_first(spoiler, name):
    assert first_bad(*model_with(spoiler)).startswith(name)


def test_first_bad_sees_weights_before_what_they_cause():
    model, loss = model_with(Spoiler(forward=math.nan))
    with torch.no_grad():
        model[2].weight[0, 1] = math.inf
    assert first_bad(model, loss) == "weight 2.weight: 0 NaN and 1 Inf among 4 values"


def test_first_bad_names_a_loss_that_is_bad_by_itself():
    model, loss = model_with(Spoiler())
    assert first_bad(model, lambda: loss() * math.nan).startswith("the loss: 1 NaN")


def test_first_bad_leaves_no_hook_no_gradient_and_no_change():
    model, loss = model_with(Spoiler(backward=math.nan))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first_bad(model, loss)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_site_scales_are_those_the_plan_expects_under_u_mup_and_far_from_one_under_sp(tiny):
    torch.manual_seed(0)
    batch = torch.randint(256, (8, 33))
    measured = {}
    for name in ("u-mup", "sp"):
        config = tiny(**{"rules.parametrisation": name, "model.width": 64, "model.depth": 2})
        model, plan = build(config, 256, torch.device("cpu"))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        scales = site_scales(model, batch[:, :-1], batch[:, 1:])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        measured[name] = {f"{scale.path}.{scale.port}": scale.rms for scale in scales}
        if name == "u-mup":
            expected = {site.name: site.expected_scale for site in plan.sites if site.expected_scale is not None}
    shared = measured["u-mup"].keys() & expected.keys()
    assert len(shared) > 15
    assert all(1 / 1.6 < measured["u-mup"][site] / expected[site] < 1.6 for site in shared)
    assert min(measured["sp"].values()) < 0.01  # the control
