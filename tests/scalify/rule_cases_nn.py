"""Cases of products, activations, norms, softmax, losses, attention, convolutions, pools, recurrent layers."""

from __future__ import annotations

import torch

from rule_cases import INF, case, chain, image, pair_of_squares, square  # isort: skip

# --- products
for name in ("mm", "matmul"):
    case(name, pair_of_squares, wide=(0.25, 64))
case("bmm", lambda g: (g(2, 3, g.n), g(2, g.n, 4)))
case("matmul:batched", lambda g: (g(2, 3, 4, g.n), g(3, g.n, 4)))
case("mv", lambda g: (square(g), g(g.n)))
for name in ("dot", "vdot"):
    case(name, lambda g: (g(g.n), g(g.n)), band=(0.01, 4))
chain("addmm", lambda c, g: c("addmm", g(4), g(3, g.n), g(g.n, 4)), band=(0.1, 4))
chain("addmm:factors", lambda c, g: c("addmm", g(4), g(3, g.n), g(g.n, 4), beta=0.3, alpha=-1.7), band=(0.1, 4))
chain("addmm:no bias", lambda c, g: c("addmm", g(4), g(3, g.n), g(g.n, 4), beta=0, alpha=3), band=(0.1, 4))
chain("baddbmm", lambda c, g: c("baddbmm", g(2, 3, 4), g(2, 3, g.n), g(2, g.n, 4), beta=0.3, alpha=2), band=(0.1, 4))
chain("addmv", lambda c, g: c("addmv", g(3), g(3, g.n), g(g.n), beta=0.3, alpha=2), band=(0.1, 4))
chain("addr", lambda c, g: c("addr", g(3, 4), g(3), g(4), beta=0.3, alpha=2), band=(0.02, 4))
chain("addbmm", lambda c, g: c("addbmm", g(3, 4), g(2, 3, g.n), g(2, g.n, 4)), band=(0.1, 4))
case("linear", lambda g: (g(2, 3, g.n), g(4, g.n), g(4)), band=(0.1, 4))
case("linear:no bias", lambda g: (g(2, 3, g.n), g(4, g.n)))
case("_trilinear", lambda g: (g(3, g.n), g(4, g.n, 5), g(3, 5), [1, 3], [0], [1, 2], [2, 3]))

# --- activations
for name in ("gelu", "silu", "mish", "hardswish", "softshrink", "hardshrink", "relu", "leaky_relu", "elu", "celu"):
    none = (0.0, 4) if "shrink" in name else (0.02, 4)
    case(name, lambda g: (square(g),), 9, band=none, wide=none)
    case(f"{name}:large scales", lambda g: (square(g),), 40, half=False, band=(0.0, 4), wide=(0.0, 4))
chain("gelu:tanh", lambda c, g: c("gelu", square(g), approximate="tanh"), 3, band=(0.1, 4))
case("elu:selu", lambda g: (square(g), 1.67, 1.05, 1.0), 9, band=(0.1, 4))
case("glu", lambda g: (square(g), 1), 3, band=(0.1, 4))
for name in ("gelu_backward", "silu_backward", "mish_backward", "hardswish_backward", "softshrink_backward", "hardshrink_backward"):
    case(name, lambda g, name=name: (*pair_of_squares(g), *((0.5,) if "shrink" in name else ())), 9, band=(0.0, 4), wide=(0, 4))
case("glu_backward", lambda g: (g(g.n, g.n // 2), square(g), 1), 2, band=(0.1, 4))
case("hardtanh_backward", lambda g: (*pair_of_squares(g), -1.0, 1.0), 9, band=(0, 4), wide=(0, 4))
case("threshold_backward", lambda g: (*pair_of_squares(g), 0.0))
case("threshold_backward:0.3", lambda g: (*pair_of_squares(g), 0.3), 9, band=(0, 4), wide=(0, 4))
case("leaky_relu_backward", lambda g: (*pair_of_squares(g), 0.1, False))
case("elu_backward", lambda g: (square(g), 1.0, 1.0, 1.0, False, square(g)), 3)
case("_prelu_kernel", lambda g: (square(g), g(g.n)), 3)
case("_prelu_kernel_backward", lambda g: (*pair_of_squares(g), g(g.n)), 3)
case("threshold", lambda g: (square(g), 0.1, 2.0), 3, band=(0.02, 16), wide=(0.02, 16))
case("hardtanh", lambda g: (square(g), -2.0, 6.0), 9, band=(0.2, 8), wide=(0.2, 8))
for low, high in ((-1.0, 1.0), (0.0, None), (None, 0.5), (0.01, None), (None, -2.0), (2.0, 3.0), (-INF, 2.0)):
    case(f"clamp:{low},{high}", lambda g, low=low, high=high: (square(g), low, high), 9, band=(0.02, 16), wide=(0.02, 16))
case("clamp:number", lambda g: (g.positive(), None, 1.0), late=True, band=(0.5, 2), wide=(0.5, 2))
case("clamp_min", lambda g: (square(g), 1e-3), 9)
case("clamp_max", lambda g: (square(g), 1.0), 9, band=(0.1, 4))
case("clamp.Tensor", lambda g: (square(g), square(g), square(g)), band=(0.2, 4))
case("clamp.Tensor:one", lambda g: (square(g), None, square(g)))
case("clamp_min.Tensor", pair_of_squares)
chain("clamp_max.Tensor", lambda c, g: c("clamp_max.Tensor", square(g), max=square(g)))

# --- functions of the value
FUNCTIONS = ("exp", "exp2", "cos", "cosh", "erfc", "sigmoid", "hardsigmoid", "sinc", "special_ndtr", "special_log_ndtr", "tanh",
             "erf", "sin", "atan", "sinh", "asinh", "expm1", "softplus")  # fmt: skip
for name in FUNCTIONS:
    case(name, lambda g: (square(g),), 2, band=(0.1, 1e5), wide=(0.05, 1e5), half=name not in ("cosh", "exp", "sinh", "expm1"))
case("softplus:beta", lambda g: (square(g), 2.0, 10.0), 3, band=(0.1, 4))
case("tan", lambda g: (square(g),), 0, band=(0.1, 1e5), wide=(0.1, 1e5), half=False)
case("special_entr", lambda g: (g.positive(g.n, g.n),), 1, band=(0.05, 8))
for name in ("log", "log2", "log10"):
    case(name, lambda g: (g.positive(g.n, g.n),), 9, band=(0.02, 32))
for name in ("lgamma", "digamma", "acosh"):
    case(name, lambda g, name=name: ((g.positive if name != "acosh" else lambda *s: g.pack(1.5 + g.positive(*s).data if g.pairs else 1.5 + g.positive(*s)))(g.n, g.n),), 0, band=(0.02, 32), half=False)
case("polygamma", lambda g: (1, g.positive(g.n, g.n)), 0, band=(0.02, 32), half=False)
case("log1p", lambda g: (g.positive(g.n, g.n),), 9, band=(0.1, 32))
for name in ("acos", "asin", "atanh", "erfinv", "logit"):
    case(name, lambda g: (g.inside(g.n, g.n),), band=(0.1, 4))
case("tanh:small", lambda g: (g.positive(g.n, g.n),), 40, band=(0.25, 2))
case("xlogy.Tensor", lambda g: (square(g), g.positive(g.n, g.n)), 3, band=(0.02, 8))
case("xlogy.Scalar_Other", lambda g: (square(g), 3.0), 3)
case("xlogy.Scalar_Self", lambda g: (3.0, g.positive(g.n, g.n)), 3, band=(0.02, 8))
case("log_sigmoid_forward", lambda g: (square(g),), 3, outputs=(0,))
chain("log_sigmoid_backward", lambda c, g: (lambda x: c("log_sigmoid_backward", square(g), x, c("log_sigmoid_forward", x)[1]))(square(g)), 3, band=(0.05, 4))
for name in ("sigmoid", "tanh", "hardsigmoid"):
    chain(f"{name}_backward", lambda c, g, name=name: c(f"{name}_backward", square(g), square(g) if name == "hardsigmoid" else c(name, square(g))), 2, band=(0.05, 4))
chain("softplus_backward", lambda c, g: c("softplus_backward", square(g), square(g), 1.0, 20.0), 2, band=(0.05, 4))

# --- softmax
for name in ("_softmax", "_log_softmax"):
    case(name, lambda g: (square(g), 1, False), 3, band=(0.1, 8))
    chain(f"{name}_backward_data", lambda c, g, name=name: c(f"{name}_backward_data", square(g), c(name, square(g), 1, False), 1, g.dtype if g.pairs else torch.float64), 2, band=(0.05, 4), wide=(1e-3, 64))
chain("_softmax:masked", lambda c, g: c("_softmax", c("masked_fill.Scalar", square(g), torch.triu(torch.ones(g.n, g.n), 1).bool(), -INF), 1, False), 3)
case("_safe_softmax", lambda g: (square(g), 1), 3, band=(0.1, 4))

# --- norms
EPS, FROM_1 = 1e-3, (0, 6)  # below, eps takes over and the output shrinks: rightly
for name, more in {"affine": True, "none": False}.items():
    def layer(c, g, more=more):
        x = g(4, 3, g.n)
        return x, c("native_layer_norm", x, [g.n], g(g.n) if more else None, g(g.n) if more else None, EPS)

    chain(f"native_layer_norm:{name}", lambda c, g, layer=layer: layer(c, g)[1], 20, outputs=(0,), band=(0.1, 4), exponents=FROM_1)

    def layer_back(c, g, layer=layer, more=more):
        x, (_, mean, rstd) = layer(c, g)
        return c("native_layer_norm_backward", g(4, 3, g.n), x, [g.n], mean, rstd, g(g.n) if more else None, g(g.n) if more else None, [True, more, more])

    chain(f"native_layer_norm_backward:{name}", layer_back, 20, band=(0.05, 4), exponents=FROM_1)

    def rms_back(c, g, more=more):
        x, w = g(4, 3, g.n), g(g.n) if more else None
        return c("_fused_rms_norm_backward", g(4, 3, g.n), x, [g.n], c("_fused_rms_norm", x, [g.n], w, EPS)[1], w, [True, more])

    chain(f"_fused_rms_norm:{name}", lambda c, g, more=more: c("_fused_rms_norm", g(4, 3, g.n), [g.n], g(g.n) if more else None, EPS), 20, outputs=(0,), exponents=FROM_1)
    chain(f"_fused_rms_norm_backward:{name}", rms_back, 20, band=(0.05, 4), exponents=FROM_1)

    def group(c, g, more=more):
        x = g(3, 4, g.n)
        return x, c("native_group_norm", x, g(4) if more else None, g(4) if more else None, 3, 4, g.n, 2, EPS)

    chain(f"native_group_norm:{name}", lambda c, g, group=group: group(c, g)[1], 20, outputs=(0,), band=(0.1, 4), exponents=FROM_1)

    def group_back(c, g, group=group, more=more):
        x, (_, mean, rstd) = group(c, g)
        return c("native_group_norm_backward", g(3, 4, g.n), x, mean, rstd, g(4) if more else None, 3, 4, g.n, 2, [True, more, more])

    chain(f"native_group_norm_backward:{name}", group_back, 20, band=(0.02, 4), exponents=FROM_1)

    for train in (True, False):
        def batch_back(c, g, more=more, train=train):
            x, w, mean, var = g(6, 4, g.n), g(4) if more else None, g(4), g.positive(4)
            _, m, r = c("native_batch_norm", x, w, None, mean, var, train, 0.1, EPS)
            return c("native_batch_norm_backward", g(6, 4, g.n), x, w, mean, var, m, r, train, EPS, [True, more, more])

        chain(f"native_batch_norm_backward:{name}-{train}", batch_back, 12, band=(0.0, 99), wide=(0.0, 99), half=False)


def batch(c, g, name, training=(True,)):
    x, w, b, mean, var = g(6, 4, g.n), g(4), g(4), g(4), g.positive(4)
    out = c(name, x, w, b, mean, var, *training, 0.1, EPS)
    return [*out, mean, var]


for name in ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"):
    chain(name, lambda c, g, name=name: batch(c, g, name), 12, outputs=(0,), band=(0.02, 4))
chain("native_batch_norm:eval", lambda c, g: batch(c, g, "native_batch_norm", (False,)), 12, outputs=(0,), band=(0.0, 99), wide=(0, 99), half=False)
case("_native_batch_norm_legit.no_stats", lambda g: (g(6, 4, g.n), g(4), g(4), True, 0.1, EPS), 12, outputs=(0,), band=(0.02, 4))

def cudnn_back(c, g):
    x, w, mean, var = g(6, 4, g.n), g(4), g(4), g.positive(4)
    _, m, r, reserve = c("cudnn_batch_norm", x, w, g(4), mean, var, True, 0.1, EPS)
    return c("cudnn_batch_norm_backward", x, g(6, 4, g.n), w, mean, var, m, r, EPS, reserve)


chain("cudnn_batch_norm", lambda c, g: batch(c, g, "cudnn_batch_norm"), 12, outputs=(0,), band=(0.02, 4))
chain("cudnn_batch_norm_backward", cudnn_back, 12, band=(0.0, 99), wide=(0.0, 99), half=False)

# --- losses
for reduction in (0, 1, 2):
    for name in ("mse_loss", "huber_loss", "smooth_l1_loss"):
        knee = () if name == "mse_loss" else (0.7,)
        case(f"{name}:{reduction}", lambda g, r=reduction, knee=knee: (*pair_of_squares(g), r, *knee), 20 if name == "mse_loss" else 4, band=(0.05, 8))
        case(f"{name}_backward:{reduction}", lambda g, r=reduction, knee=knee: (g(*([] if r else [g.n, g.n])), *pair_of_squares(g), r, *knee), 4, band=(0.01, 8))
    case(f"binary_cross_entropy:{reduction}", lambda g, r=reduction: (g.inside(g.n, g.n), g.inside(g.n, g.n), g.positive(g.n, g.n), r))
    case(f"binary_cross_entropy_backward:{reduction}", lambda g, r=reduction: (g(*([] if r else [g.n, g.n])), g.inside(g.n, g.n), g.inside(g.n, g.n), g.positive(g.n, g.n), r), band=(0.05, 16))
    case(f"binary_cross_entropy_with_logits:{reduction}", lambda g, r=reduction: (square(g), g.inside(g.n, g.n), g.positive(g.n, g.n), None, r), 2)
    case(f"soft_margin_loss:{reduction}", lambda g, r=reduction: (square(g), torch.sign(g.normal(g.n, g.n)), r), 2)
    case(f"soft_margin_loss_backward:{reduction}", lambda g, r=reduction: (g(*([] if r else [g.n, g.n])), square(g), torch.sign(g.normal(g.n, g.n)), r), 1, band=(0.05, 4))
    for weighted in (False, True):
        for dims, name in (([], "nll_loss"), ([2, 3], "nll_loss2d")):
            def forward(c, g, r=reduction, weighted=weighted, dims=dims, name=name):
                x, target = g(8, g.n, *dims), g.labels(g.n, 8, *dims)
                w = g.positive(g.n) if weighted else None
                return x, target, w, c(f"{name}_forward", x, target, w, r, 1)

            def backward(c, g, r=reduction, dims=dims, name=name, forward=forward):
                x, target, w, (_, total) = forward(c, g)
                return c(f"{name}_backward", g(*([] if r else [8, *dims])), x, target, w, r, 1, total)

            tail = f"{reduction}-{'weight' if weighted else 'plain'}"
            chain(f"{name}_forward:{tail}", lambda c, g, forward=forward: forward(c, g)[3], 20, outputs=(0,), band=(0.01, 8))
            chain(f"{name}_backward:{tail}", backward, 20, band=(0.01, 8))
case("binary_cross_entropy_with_logits:positive weight", lambda g: (square(g), g.inside(g.n, g.n), None, torch.full((g.n,), 2.0, dtype=torch.float64), 1), 2)
case("embedding_dense_backward", lambda g: (g(8, g.n), g.labels(5, 8), 5, -1, False), band=(0.2, 4))
case("embedding_dense_backward:padding", lambda g: (g(8, g.n), g.labels(50, 8), 50, 1, True), band=(0.02, 4))

# --- attention
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
MASKS = {"plain": (False, None), "causal": (True, None), "mask": (False, "mask")}
for kind, (causal, mask) in MASKS.items():
    def attention(c, g, causal=causal, mask=mask):
        q, k, v = g(2, 2, 6, g.n), g(2, 2, 6, g.n), g(2, 2, 6, g.n)
        above = torch.ones(6, 6, dtype=torch.float64).triu(1)
        bias = None if mask is None else torch.zeros_like(above).masked_fill(above.bool(), -INF)
        return q, k, v, bias, c(FLASH, q, k, v, 0.0, causal, attn_mask=bias, scale=0.3)

    def attention_back(c, g, attention=attention, causal=causal):
        q, k, v, bias, (out, lse) = attention(c, g)
        return c(f"{FLASH}_backward", g(2, 2, 6, g.n), q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=0.3)

    chain(f"{FLASH}:{kind}", lambda c, g, attention=attention: attention(c, g)[4], 1, outputs=(0,))
    chain(f"{FLASH}_backward:{kind}", attention_back, 1, band=(0.02, 16), wide=(1e-3, 64))
chain(f"{FLASH}:large scales", lambda c, g: c(FLASH, g(2, 2, 6, g.n), g(2, 2, 6, g.n), g(2, 2, 6, g.n), scale=1e-9), 12, half=False, outputs=(0,))

# --- convolutions
CONV = {
    "1d": ((3,), ([1], [1], [1], False, [0], 1)), "2d": ((3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "3d": ((2, 2, 2), ([1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1)),
    "strided": ((3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
    "grouped": ((3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    "transposed": ((3, 3), ([2, 2], [1, 1], [1, 1], True, [1, 1], 1)),
    "transposed grouped": ((3, 3), ([1, 1], [1, 1], [1, 1], True, [0, 0], 2)),
}  # fmt: skip
for kind, (kernel, args) in CONV.items():
    groups = args[-1]
    for bias in (True, False):
        tail = f"{kind}{'' if bias else ' no bias'}"
        chain(f"convolution:{tail}", lambda c, g, kernel=kernel, args=args, groups=groups, bias=bias: c("convolution", image(g, 4, len(kernel)), g(4, 4 // groups, *kernel), g(4) if bias else None, *args), band=(0.1, 4))

    def conv_back(c, g, kernel=kernel, args=args, groups=groups):
        x, w = image(g, 4, len(kernel)), g(4, 4 // groups, *kernel)
        grad = g.like(c("convolution", x, w, None, *args))
        return c("convolution_backward", grad, x, w, [4], *args, [True, True, True])

    chain(f"convolution_backward:{kind}", conv_back, band=(0.1, 4), wide=(1 / 64, 128))
case("_convolution", lambda g: (image(g, 4), g(4, 4, 3, 3), None, *CONV["2d"][1], False, False, True, True))

# --- pools and resampling
for dims in (2, 3):
    op = f"max_pool{dims}d_with_indices"
    one = [1] * dims
    case(op, lambda g, dims=dims: (image(g, 3, dims), [2] * dims, [2] * dims))
    def max_back(c, g, dims=dims, op=op, one=one):
        x = image(g, 3, dims)
        out, indices = c(op, x, [2] * dims, [2] * dims)
        return c(f"{op}_backward", g.like(out), x, [2] * dims, [2] * dims, [0] * dims, one, False, indices)

    chain(f"{op}_backward", max_back)
    op = f"adaptive_max_pool{dims}d"
    case(op, lambda g, dims=dims: (image(g, 3, dims), [2] * dims), band=(0.2, 8))

    def adaptive_max_back(c, g, dims=dims, op=op):
        x = image(g, 3, dims)
        out, indices = c(op, x, [2] * dims)
        return c(f"{op}_backward", g.like(out), x, indices)

    chain(f"{op}_backward", adaptive_max_back, band=(0.02, 4))
    op = f"avg_pool{dims}d"
    case(op, lambda g, dims=dims: (image(g, 3, dims), [3] * dims, [2] * dims, [1] * dims))
    case(f"{op}:one number", lambda g, dims=dims: (image(g, 3, dims), [2]))
    case(f"{op}:divisor", lambda g, dims=dims: (image(g, 3, dims), [2] * dims, [2] * dims, [0] * dims, False, True, 3))
    for divisor in (None, 3):
        def avg_back(c, g, dims=dims, op=op, divisor=divisor):
            x = image(g, 3, dims)
            more = ([2] * dims, [2] * dims, [0] * dims, False, True, divisor)
            return c(f"{op}_backward", g.like(c(op, x, *more)), x, *more)

        chain(f"{op}_backward:{divisor}", avg_back)
    op = f"_adaptive_avg_pool{dims}d"
    case(op, lambda g, dims=dims: (image(g, 3, dims), [3] * dims))
    chain(f"{op}_backward", lambda c, g, dims=dims, op=op: c(f"{op}_backward", g(2, 3, *[3] * dims), image(g, 3, dims)))
for kind, corners in {"nearest": (), "linear": (False,), "bicubic": (False,), "exact": ()}.items():
    for dims in (1, 2, 3):
        name = {"nearest": f"upsample_nearest{dims}d", "exact": f"_upsample_nearest_exact{dims}d", "bicubic": "upsample_bicubic2d",
                "linear": ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")[dims - 1]}[kind]  # fmt: skip
        if kind == "bicubic" and dims != 2:
            continue
        case(name, lambda g, dims=dims, corners=corners: (g(2, 3, *[4] * dims), [8] * dims, *corners))
        case(f"{name}_backward", lambda g, dims=dims, corners=corners: (g(2, 3, *[8] * dims), [8] * dims, [2, 3, *[4] * dims], *corners))
case("_upsample_bilinear2d_aa", lambda g: (g(2, 3, 4, 4), [8, 8], False))
case("col2im", lambda g: (g(2, 12, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]))
