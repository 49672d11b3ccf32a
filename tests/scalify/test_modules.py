"""Every common module gives, scaled, what it gives plain: outputs, input gradients, parameter gradients, buffers.

Power-of-two scaling is exact, so float64 agrees to round-off whatever the scales. Scales are drawn at random, far from
those that would fit the values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from isoscale.scalify import ScaledTensor, as_plain, as_scaled

Make = Callable[[], nn.Module]


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Any:
        return self.function(*xs)


def fn(function: Callable[..., Any]) -> Make:
    return lambda: Fn(function)


LABELS = torch.tensor([1, 0, 2])
TOKENS = torch.tensor([[1, 2, 1, 0], [5, 1, 9, 9]])
SDPA = F.scaled_dot_product_attention
CAUSAL = torch.tril(torch.ones(3, 3, dtype=torch.bool))
FLOATS = torch.zeros(3, 3, dtype=torch.float64).masked_fill(~CAUSAL, float("-inf"))
HEADS = (2, 2, 3, 4)
MODULES: dict[str, tuple[Make, tuple[Any, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 4), ((3, 8),)),
    "Linear-3d": (lambda: nn.Linear(8, 4), ((2, 3, 8),)),
    "Linear-no-bias": (lambda: nn.Linear(8, 4, bias=False), ((2, 3, 8),)),
    "Bilinear": (lambda: nn.Bilinear(4, 5, 6), ((3, 4), (3, 5))),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), ((2, 4, 9),)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same"), ((2, 4, 9, 9),)),
    "Conv2d-strided-grouped": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), ((2, 4, 9, 9),)),
    "Conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), ((2, 4, 5, 5),)),
    "Conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), ((2, 4, 5, 5),)),
    "Conv2d-replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), ((2, 4, 5, 5),)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), ((2, 4, 5, 5, 5),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), ((2, 4, 5),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), ((2, 4, 5, 5),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3), ((2, 4, 3, 3, 3),)),
    "Embedding": (lambda: nn.Embedding(10, 4), (TOKENS,)),
    "Embedding-padding": (lambda: nn.Embedding(10, 4, padding_idx=1), (TOKENS,)),
    "Embedding-by-frequency": (lambda: nn.Embedding(10, 4, scale_grad_by_freq=True), (TOKENS,)),
    "LayerNorm": (lambda: nn.LayerNorm(8), ((3, 8),)),
    "LayerNorm-2d": (lambda: nn.LayerNorm((4, 8)), ((3, 4, 8),)),
    "LayerNorm-no-affine": (lambda: nn.LayerNorm(8, elementwise_affine=False), ((3, 8),)),
    "LayerNorm-no-bias": (lambda: nn.LayerNorm(8, bias=False), ((3, 8),)),
    "LayerNorm-large-eps": (lambda: nn.LayerNorm(8, eps=0.5), ((3, 8),)),
    "RMSNorm": (lambda: nn.RMSNorm(8), ((3, 8),)),
    "RMSNorm-no-affine": (lambda: nn.RMSNorm(8, eps=0.1, elementwise_affine=False), ((3, 8),)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), ((3, 8, 4),)),
    "GroupNorm-no-affine": (lambda: nn.GroupNorm(2, 8, affine=False), ((3, 8, 4, 2),)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), ((5, 8),)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), ((3, 8, 4, 4),)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), ((3, 4, 2, 2, 2),)),
    "BatchNorm2d-eval": (lambda: nn.BatchNorm2d(8).eval(), ((3, 8, 4, 4),)),
    "BatchNorm2d-cumulative": (lambda: nn.BatchNorm2d(8, momentum=None), ((3, 8, 4, 4),)),
    "BatchNorm2d-no-stats": (lambda: nn.BatchNorm2d(8, track_running_stats=False), ((3, 8, 4, 4),)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(8, affine=True), ((3, 8, 4),)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), ((3, 8, 4),)),
    "GELU-tanh": (lambda: nn.GELU("tanh"), ((3, 8),)),
    "Softmax": (lambda: nn.Softmax(-1), ((3, 8),)),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), ((3, 8),)),
    "Softmin": (lambda: nn.Softmin(-1), ((3, 8),)),
    "Threshold": (lambda: nn.Threshold(0.1, 2.0), ((3, 8),)),
    "ReLU-inplace": (fn(lambda x: F.relu(x * 1, inplace=True)), ((3, 8),)),
    "Dropout": (lambda: nn.Dropout(0.3), ((3, 8),)),
    "Dropout-0": (lambda: nn.Dropout(0.0), ((3, 8),)),
    "Dropout-inplace": (fn(lambda x: F.dropout(x * 1, 0.3, inplace=True)), ((3, 8),)),
    "Dropout2d": (lambda: nn.Dropout2d(0.3), ((3, 8, 2, 2),)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), ((3, 8),)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), ((2, 3, 8),)),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1), ((2, 3, 8, 8),)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), ((2, 3, 4, 4, 4),)),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), ((2, 3, 8),)),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1), ((2, 3, 8, 8),)),
    "AvgPool2d-divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), ((2, 3, 8, 8),)),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), ((2, 3, 4, 4, 4),)),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), ((2, 3, 8),)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(3), ((2, 3, 8, 8),)),
    "AdaptiveAvgPool2d-1": (lambda: nn.AdaptiveAvgPool2d(1), ((2, 3, 8, 8),)),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), ((2, 3, 4, 4, 4),)),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(2), ((2, 3, 8),)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), ((2, 3, 8, 8),)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), ((2, 3, 8, 8),)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), ((2, 4, 3, 3),)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), ((2, 4, 4, 4),)),
    "Upsample-nearest-1d": (lambda: nn.Upsample(scale_factor=2), ((2, 3, 4),)),
    "Upsample-nearest": (lambda: nn.Upsample(scale_factor=2), ((2, 3, 4, 4),)),
    "Upsample-linear": (lambda: nn.Upsample(scale_factor=2, mode="linear"), ((2, 3, 4),)),
    "Upsample-bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), ((2, 3, 4, 4),)),
    "Upsample-bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), ((2, 3, 4, 4),)),
    "Upsample-trilinear": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), ((2, 3, 4, 4, 4),)),
    "ReflectionPad1d": (lambda: nn.ReflectionPad1d(1), ((2, 3, 4),)),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), ((2, 3, 4, 4),)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), ((2, 3, 4, 4),)),
    "ConstantPad1d": (lambda: nn.ConstantPad1d(1, 3.0), ((2, 3, 4),)),
    "CircularPad2d": (lambda: nn.CircularPad2d(1), ((2, 3, 4, 4),)),
    "Unfold": (lambda: nn.Unfold(2), ((2, 3, 4, 4),)),
    "Fold": (lambda: nn.Fold((4, 4), 2), ((2, 12, 9),)),
    "Flatten": (lambda: nn.Flatten(), ((2, 3, 4),)),
    "CosineSimilarity": (lambda: nn.CosineSimilarity(), ((4, 5), (4, 5))),
    "PairwiseDistance": (lambda: nn.PairwiseDistance(), ((4, 5), (4, 5))),
    "normalize": (fn(F.normalize), ((4, 5),)),
    "cdist": (fn(torch.cdist), ((4, 5), (3, 5))),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), ((2, 3, 8), (2, 5, 8), (2, 5, 8))),
    "attention": (fn(SDPA), (HEADS, HEADS, HEADS)),
    "attention-causal": (fn(lambda q, k, v: SDPA(q, k, v, is_causal=True)), (HEADS, HEADS, HEADS)),
    "attention-bool-mask": (fn(lambda q, k, v: SDPA(q, k, v, attn_mask=CAUSAL)), (HEADS, HEADS, HEADS)),
    "attention-float-mask": (fn(lambda q, k, v: SDPA(q, k, v, attn_mask=FLOATS)), (HEADS, HEADS, HEADS)),
    "attention-grouped": (
        fn(lambda q, k, v: SDPA(q, k, v, is_causal=True, enable_gqa=True)), ((2, 4, 3, 4), HEADS, HEADS),
    ),
    "attention-dropout": (fn(lambda q, k, v: SDPA(q, k, v, dropout_p=0.2)), (HEADS, HEADS, HEADS)),
    "attention-by-hand": (
        fn(lambda q, k, v: ((q @ k.mT) / 2).masked_fill(~CAUSAL, float("-inf")).softmax(-1) @ v), (HEADS, HEADS, HEADS),
    ),
    "attention-min-mask": (
        fn(lambda q, k, v: ((q @ k.mT) / 2).masked_fill(~CAUSAL, -3e38).softmax(-1) @ v), (HEADS, HEADS, HEADS),
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), ((2, 3, 8),)),
    "TransformerEncoderLayer-dropout": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ((2, 3, 8),)),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0), ((3, 2, 8), (4, 2, 8))),
    "LSTM": (lambda: nn.LSTM(4, 5, num_layers=2, batch_first=True), ((2, 3, 4),)),
    "LSTM-bidirectional": (lambda: nn.LSTM(4, 5, bidirectional=True, bias=False), ((2, 3, 4),)),
    "LSTM-projection": (lambda: nn.LSTM(4, 5, proj_size=3), ((2, 3, 4),)),
    "GRU": (lambda: nn.GRU(4, 5, num_layers=2, batch_first=True), ((2, 3, 4),)),
    "GRU-bidirectional": (lambda: nn.GRU(4, 5, bidirectional=True), ((2, 3, 4),)),
    "RNN": (lambda: nn.RNN(4, 5), ((2, 3, 4),)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 5), ((2, 4),)),
    "GRUCell": (lambda: nn.GRUCell(4, 5), ((2, 4),)),
    "cross_entropy": (fn(lambda x: F.cross_entropy(x, LABELS)), ((3, 5),)),
    "cross_entropy-sum": (fn(lambda x: F.cross_entropy(x, LABELS, reduction="sum")), ((3, 5),)),
    "cross_entropy-none": (fn(lambda x: F.cross_entropy(x, LABELS, reduction="none")), ((3, 5),)),
    "cross_entropy-smooth": (fn(lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1)), ((3, 5),)),
    "cross_entropy-ignore": (fn(lambda x: F.cross_entropy(x, LABELS, ignore_index=0)), ((3, 5),)),
    "cross_entropy-weight": (fn(lambda x, w: F.cross_entropy(x, LABELS, weight=w.detach().abs())), ((3, 5), (5,))),
    "cross_entropy-probabilities": (fn(lambda x, y: F.cross_entropy(x, y.detach().softmax(-1))), ((3, 5), (3, 5))),
    "cross_entropy-2d": (
        fn(lambda x: F.cross_entropy(x, torch.zeros(3, 2, 2, dtype=torch.long))), ((3, 5, 2, 2),),
    ),
    "mse_loss": (fn(F.mse_loss), ((3, 5), (3, 5))),
    "l1_loss": (fn(F.l1_loss), ((3, 5), (3, 5))),
    "smooth_l1_loss": (fn(lambda x, y: F.smooth_l1_loss(x, y, beta=0.3)), ((3, 5), (3, 5))),
    "huber_loss": (fn(lambda x, y: F.huber_loss(x, y, delta=0.7)), ((3, 5), (3, 5))),
    "huber_loss-sum": (fn(lambda x, y: F.huber_loss(x, y, reduction="sum")), ((3, 5), (3, 5))),
    "binary_cross_entropy": (fn(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.detach().sigmoid())), ((3, 5), (3, 5))),
    "binary_cross_entropy_with_logits": (
        fn(lambda x, y: F.binary_cross_entropy_with_logits(x, y.detach().sigmoid(), pos_weight=torch.full((5,), 2.0))),
        ((3, 5), (3, 5)),
    ),
    "kl_div": (
        fn(lambda x, y: F.kl_div(x.log_softmax(-1), y.detach().softmax(-1), reduction="batchmean")), ((3, 5), (3, 5)),
    ),
    "kl_div-log": (
        fn(lambda x, y: F.kl_div(x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="sum")),
        ((3, 5), (3, 5)),
    ),
    "gaussian_nll_loss": (fn(lambda x, y: F.gaussian_nll_loss(x, y, y.exp())), ((3, 5), (3, 5))),
    "poisson_nll_loss": (fn(lambda x, y: F.poisson_nll_loss(x, y.detach().exp())), ((3, 5), (3, 5))),
    "soft_margin_loss": (fn(lambda x: F.soft_margin_loss(x, torch.tensor([1.0, -1, 1]))), ((3,),)),
    "cosine_embedding_loss": (
        fn(lambda x, y: F.cosine_embedding_loss(x, y, torch.tensor([1.0, -1, 1]))), ((3, 5), (3, 5)),
    ),
    "margin_ranking_loss": (fn(lambda x, y: F.margin_ranking_loss(x, y, torch.tensor([1.0, -1, 1]))), ((3,), (3,))),
    "hinge_embedding_loss": (fn(lambda x: F.hinge_embedding_loss(x, torch.tensor([1.0, -1, 1]))), ((3,),)),
    "triplet_margin_loss": (fn(F.triplet_margin_loss), ((3, 5), (3, 5), (3, 5))),
    "multilabel_soft_margin_loss": (fn(lambda x: F.multilabel_soft_margin_loss(x, torch.ones(3, 5))), ((3, 5),)),
}  # fmt: skip
for _name in (
    "ReLU", "ReLU6", "LeakyReLU", "GELU", "SiLU", "Mish", "ELU", "SELU", "CELU", "Tanh", "Sigmoid", "Softplus", "Softsign",
    "Softshrink", "Hardshrink", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink", "GLU", "PReLU",
):  # fmt: skip
    MODULES[_name] = (getattr(nn, _name), ((4, 8),))


def scale(generator: torch.Generator) -> float:
    return float(2.0 ** torch.randint(-12, 13, (), generator=generator).item())


def scaled(x: Tensor, generator: torch.Generator) -> Tensor:
    return as_scaled(x.detach().clone(), scale(generator)).detach()


def scaled_module(module: nn.Module, generator: torch.Generator) -> nn.Module:
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(scaled(parameter, generator))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = scaled(buffer, generator)
        if hasattr(part, "_flat_weights"):  # a recurrent module keeps a second list
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    return module


def outputs(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [leaf for part in out if part is not None for leaf in outputs(part)]


def run(module: nn.Module, inputs: list[Tensor], weights: list[Tensor] | None) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Everything a forward and a backward leave behind, by name; and the cotangents that were used."""
    torch.manual_seed(3)
    out = outputs(module(*inputs))
    weights = weights or [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in out]
    given = [as_scaled(w, 2.0**3) if isinstance(y, ScaledTensor) else w for y, w in zip(out, weights)]
    live = [(y, g) for y, g in zip(out, given) if y.requires_grad]
    torch.autograd.backward([y for y, _ in live], [g for _, g in live])
    found = {f"output {i}": y for i, y in enumerate(out)}
    found |= {f"input gradient {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    found |= dict(module.named_buffers())
    return found, weights


def both(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    make, shapes = MODULES[name]
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    plain = make().to(dtype)
    for parameter in plain.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, dtype=dtype))  # ones and zeros would hide mistakes
    inputs = [s if isinstance(s, Tensor) else torch.randn(s, dtype=dtype) for s in shapes]
    ours = scaled_module(plain, generator)
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    mine = [scaled(x, generator).requires_grad_() if x.is_floating_point() else x for x in inputs]
    want, weights = run(plain, given, None)
    found, _ = run(ours, mine, weights)
    return want, found


def worst(want: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    assert want.keys() == found.keys()
    errors = []
    for name, plain in want.items():
        ours = as_plain(found[name].detach(), torch.float64)
        assert plain.shape == ours.shape, name
        difference = (plain.detach().double() - ours).abs().max() if plain.numel() else torch.zeros(())
        errors.append((float(difference / plain.detach().double().abs().max().clamp(min=1e-300)), name))
    return max(errors)


@pytest.mark.parametrize("name", MODULES)
def test_float64_is_that_of_the_plain_module(name: str) -> None:
    want, found = both(name, torch.float64)
    assert any(isinstance(part, ScaledTensor) for part in found.values())
    error, where = worst(want, found)
    assert error < 1e-10, f"{where}: {error:.1e}"


@pytest.mark.parametrize("name", ["LSTM", "LSTM-bidirectional", "TransformerEncoderLayer", "Conv2d", "cross_entropy"])
def test_float32_is_that_of_the_plain_module(name: str) -> None:
    """The fused LSTM exists in float32 only."""
    error, where = worst(*both(name, torch.float32))
    assert error < 2e-5, f"{where}: {error:.1e}"


PADDING = torch.tensor([[False, False, True], [False, False, False]])
FAST: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any]]] = {
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x)),
    "encoder-gelu": (lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True, batch_first=True), lambda m, x: m(x)),
    "encoder-causal": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x, src_mask=~CAUSAL)),
    "encoder-padding": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x, src_key_padding_mask=PADDING)),
    "encoder-both": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x, src_mask=~CAUSAL, src_key_padding_mask=PADDING),
    ),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x)),
    "attention-heads": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, average_attn_weights=False)),
    "attention-no-weights": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_evaluation_without_gradients_is_that_of_the_plain_module(name: str) -> None:
    """torch runs these as one operator then."""
    make, call = FAST[name]
    torch.manual_seed(0)
    plain = make().double().eval()
    for parameter in plain.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    generator = torch.Generator().manual_seed(7)
    ours = scaled_module(plain, generator)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        want, found = outputs(call(plain, x)), outputs(call(ours, scaled(x, generator)))
    assert isinstance(found[0], ScaledTensor)
    error, where = worst(dict(enumerate(want)), dict(enumerate(found)))  # type: ignore[arg-type]
    assert error < 1e-10, f"{where}: {error:.1e}"


def test_a_wrong_scale_is_seen() -> None:
    """Control: a scale that is off by one octave fails the comparison."""
    want, found = both("Linear", torch.float64)
    found["output 0"]._scale.mul_(2)  # type: ignore[attr-defined]
    error, where = worst(want, found)
    assert error > 0.5
    assert where == "output 0"


@pytest.mark.parametrize("name", ["Linear", "LayerNorm", "GELU", "MultiheadAttention", "cross_entropy", "Conv2d"])
def test_scales_stay_powers_of_two(name: str) -> None:
    _, found = both(name, torch.float64)
    for part in found.values():
        if isinstance(part, ScaledTensor):
            mantissa, _ = torch.frexp(part.scale)
            assert float(mantissa) in (0.0, 0.5)
