"""The fused parts of a step against torch in double precision; a NaN stays one."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from isoscale.kernels import build, cpu_step

pytestmark = pytest.mark.skipif(not cpu_step.available(), reason=cpu_step.why_not())


def reference(qkv, cos, sin, heads, groups, scale, causal):
    batch, length, wide = qkv.shape
    size = wide // (heads + 2 * groups)
    q, k, v = qkv.view(batch, length, -1, size).transpose(1, 2).split((heads, groups, groups), 1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def turn(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    out = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, -1)


def close(found, wanted, ulps=32):
    return float((found - wanted).abs().max()) <= ulps * 2**-24 * float(wanted.abs().max())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "size"),
    [(2, 128, 4, 4, 16), (2, 37, 4, 2, 16), (1, 50, 4, 1, 32), (1, 70, 2, 2, 48), (1, 40, 2, 1, 64), (3, 1, 2, 2, 16)],
)
def test_attention_and_its_gradient(batch, length, heads, groups, size, threads, causal):
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, (heads + 2 * groups) * size)
    angles, grad = torch.randn(length, size // 2), torch.randn(batch, length, heads * size)
    cos, sin, settings = angles.cos(), angles.sin(), (heads, groups, 3 / size, causal)
    wide = qkv.double().requires_grad_()
    wanted = reference(wide, cos.double(), sin.double(), *settings)
    wanted.backward(grad.double())
    torch.set_num_threads(threads)
    out, log = cpu_step.attend(qkv, cos, sin, *settings)
    back = cpu_step.attend_backward(grad, qkv, log, cos, sin, *settings)
    assert close(out, wanted.detach())
    assert close(back, wide.grad)
    other = reference(qkv.double(), cos.double(), sin.double(), heads, groups, 3.01 / size, causal)
    assert length == 1 or not close(out, other)  # the control: one percent of the scale is seen


def test_large_logits_are_a_choice_of_one():
    qkv = torch.randn(1, 33, 3 * 16) * 300
    ones, zeros = torch.ones(33, 8), torch.zeros(33, 8)
    out, log = cpu_step.attend(qkv, ones, zeros, 1, 1, 1.0, True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(log).all()
    assert close(out, reference(qkv.double(), ones.double(), zeros.double(), 1, 1, 1.0, True), 4096)


@pytest.mark.parametrize("at", [3, 20, 40])  # in q, k, v
def test_a_nan_is_not_lost(at):
    qkv = torch.randn(1, 33, 3 * 16)
    qkv[0, 5, at] = float("nan")
    cos = torch.ones(33, 8)
    out, log = cpu_step.attend(qkv, cos, 0 * cos, 1, 1, 0.1, True)
    assert out[0, 5].isnan().any()
    assert at >= 32 or not out[0, :5].isnan().any()  # nothing times a NaN of v is one, as in torch
    back = cpu_step.attend_backward(torch.ones_like(out), qkv, log, cos, 0 * cos, 1, 1, 0.1, True)
    assert back.isnan().any()
    assert cpu_step.glu(qkv[..., :32].clone(), 1.0).isnan().any() == (at < 32)


@pytest.mark.parametrize("mult", [0.3, 1.0, 4.0])
def test_swiglu_and_its_gradient(mult):
    both, grad = torch.randn(5, 7, 96) * 4, torch.randn(5, 7, 48)
    wide = both.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    wanted = F.silu(gate * mult) * up
    wanted.backward(grad.double())
    assert close(cpu_step.glu(both, mult), wanted.detach())
    assert close(cpu_step.glu_backward(grad, both, mult), wide.grad)
    assert not close(cpu_step.glu(both, mult * 1.01), wanted.detach())


def test_swiglu_far_out():
    both = torch.cat((torch.full((1, 16), -300.0), torch.full((1, 16), 2.0)), -1)
    assert cpu_step.glu(both, 1.0).abs().max() < 1e-30
    assert torch.equal(cpu_step.glu(-both, 1.0), torch.full((1, 16), -600.0))
    assert torch.isfinite(cpu_step.glu_backward(torch.ones(1, 16), both, 1.0)).all()


@pytest.mark.parametrize("with_skip", [True, False])
def test_the_norm_and_its_gradient(with_skip):
    x, grad, skip = torch.randn(9, 48) * 3, torch.randn(9, 48), torch.randn(9, 48)
    wide = x.double().requires_grad_()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted.backward(grad.double())
    normed, reciprocal = cpu_step.rms(x, 1e-5)
    back = cpu_step.rms_backward(grad, normed, reciprocal, 0.5, skip if with_skip else None, 0.25)
    assert close(normed, wanted.detach())
    assert close(back, 0.5 * wide.grad + (0.25 * skip.double() if with_skip else 0))
    assert not close(back, 0.51 * wide.grad + (0.25 * skip.double() if with_skip else 0))


def test_the_structs_are_the_same_on_both_sides():
    sizes = (ctypes.c_int64 * 3)()
    build.library("step").isoscale_step_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in (cpu_step._Attend, cpu_step._Glu, cpu_step._Rms)]
