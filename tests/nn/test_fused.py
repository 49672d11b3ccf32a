"""A model with fused parts is the plain one up to rounding, and plain where the kernels cannot run."""

import pytest
import torch

from isoscale.kernels import cpu_step
from isoscale.models import Decoder, DecoderConfig
from isoscale.nn import fused

pytestmark = pytest.mark.skipif(not cpu_step.available(), reason=cpu_step.why_not())
SHAPE = {"vocab": 50, "width": 32, "depth": 2, "head_size": 16}


def pair(**shape):
    torch.manual_seed(0)
    plain = Decoder(DecoderConfig(**{**SHAPE, **shape}))
    quick = Decoder(plain.config)
    quick.load_state_dict(plain.state_dict())
    for model in (plain, quick):
        for block in model.blocks:
            block.attn_tau, block.mlp.act_mult, block.attn.logit_scale = 0.7, 1.3, 0.09
    quick.fused = True
    return plain, quick


def gradients(model, ids, targets):
    model.zero_grad()
    loss = model(ids, targets, tokens=1024)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def apart(one, other):
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other))


@pytest.fixture
def batch():
    ids = torch.randint(0, 50, (3, 41), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize(
    "shape",
    [{}, {"scaling": "plain"}, {"kv_heads": 1}, {"norm": "trainable"}, {"qk_norm": True}, {"separate": True},
     {"tied": True}],
    ids=lambda s: next(iter(s), "default"),
)  # fmt: skip
def test_loss_and_gradients_agree_within_rounding(shape, batch):
    plain, quick = pair(**shape)
    found = apart(gradients(plain, *batch), gradients(quick, *batch))
    assert 0 < found < 2e-5  # not 0: other code ran
    quick.blocks[1].mlp_tau = 0.9 * plain.blocks[1].mlp_tau
    assert apart(gradients(plain, *batch), gradients(quick, *batch)) > 1e-3  # the control


@pytest.mark.parametrize("shape", [{"head_size": 8}, {"width": 48, "ffn_ratio": 2.9}, {"dropout": 0.1}])
def test_what_is_not_covered_runs_as_ever(shape, batch):
    plain, quick = pair(**shape)
    if "dropout" in shape:
        plain.eval(), quick.eval()
        assert apart(gradients(plain, *batch), gradients(quick, *batch)) < 2e-5
    else:
        assert apart(gradients(plain, *batch), gradients(quick, *batch)) == 0


def test_no_kernel_under_torch_func_autocast_or_a_probe(batch, monkeypatch):
    plain, quick = pair()
    monkeypatch.setattr(cpu_step, "attend", lambda *_: pytest.fail("the kernel ran"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(*batch), quick(*batch))
    state = dict(quick.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(quick, p, batch))(state)
    seen = []
    quick(*batch, probe=lambda path, *_: seen.append(path))
    assert "blocks.1.attn" in seen
    with pytest.raises(pytest.fail.Exception):  # the control
        quick(*batch)


def test_a_gradient_that_skips_the_branch():
    x = torch.randn(2, 3, 16, requires_grad=True)
    _, skip = fused.norm_split(x, 0.5, 0.25, 1e-5)
    skip.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.25))
