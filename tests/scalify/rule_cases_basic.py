"""Cases of arithmetic, powers, reductions, comparisons, layout, creation and selection."""

from __future__ import annotations

import torch

from rule_cases import INF, case, chain, pair_of_squares, square  # isort: skip

# --- arithmetic
for name in ("add.Tensor", "sub.Tensor", "rsub.Tensor", "maximum", "minimum", "fmax", "fmin", "hypot", "max.other", "min.other"):
    case(name, pair_of_squares)
chain("add.Tensor:alpha", lambda c, g: c("add.Tensor", *pair_of_squares(g), alpha=0.3), wide=(0.1, 8))
case("add.Tensor:plain", lambda g: (square(g), torch.ones(g.n, g.n, dtype=g.dtype)))
case("add.Tensor:number tensor", lambda g: (square(g), g.zero_d(0.3)), late=True)
case("add.Tensor:number", lambda g: (square(g), 0.3))
case("add.Tensor:zero", lambda g: (square(g), 0.0))
case("add.Tensor:broadcast", lambda g: (square(g), g(g.n)))
chain("sub.Tensor:number", lambda c, g: c("sub.Tensor", square(g), 0.3, alpha=3.0))
for name in ("add.Scalar", "sub.Scalar", "rsub.Scalar"):
    case(name, lambda g: (square(g), 3e-4))
case("rsub.Scalar:alpha", lambda g: (square(g), 2.0, 0.7))
case("mul.Tensor", pair_of_squares, wide=(0.5, 2))
case("mul.Tensor:number tensor", lambda g: (square(g), g.zero_d(3e-4)), late=True)
case("mul.Scalar", lambda g: (square(g), 0.999))
case("div.Tensor", lambda g: (square(g), g.positive(g.n, g.n)))
case("div.Tensor:number", lambda g: (square(g), 3.0))
case("div.Scalar", lambda g: (square(g), 1e5))
chain("div.Tensor_mode", lambda c, g: c("div.Tensor_mode", square(g), g.positive(g.n, g.n), rounding_mode=None))
chain("div.Tensor_mode:floor", lambda c, g: c("div.Tensor_mode", square(g), g.positive(g.n, g.n), rounding_mode="floor"), 3)
chain("div.Scalar_mode", lambda c, g: c("div.Scalar_mode", square(g), 0.4, rounding_mode="trunc"), 3, wide=(0, 4))
case("floor_divide", lambda g: (square(g), g.positive(g.n, g.n)), 3, wide=(0, 4))
case("floor_divide.Scalar", lambda g: (square(g), 0.4), 3, wide=(0, 4))
case("reciprocal", lambda g: (g.positive(g.n, g.n),))
case("remainder.Tensor", lambda g: (square(g), g.positive(g.n, g.n)), 3, half=False)
case("remainder.Scalar", lambda g: (square(g), 0.7), 3, half=False)
case("remainder.Scalar_Tensor", lambda g: (0.7, g.positive(g.n, g.n)), 3, half=False, band=(0.1, 4))
case("fmod.Tensor", lambda g: (square(g), g.positive(g.n, g.n)), 3, half=False)
case("fmod.Scalar", lambda g: (square(g), 0.7), 3, half=False)
for name in ("floor", "ceil", "trunc", "round"):
    case(name, lambda g: (square(g),), 6, band=(0, 4), wide=(0, 4))
chain("round.decimals", lambda c, g: c("round.decimals", square(g), decimals=1), 6, band=(0, 4))
case("frac", lambda g: (square(g),), 6, half=False)
case("sign", lambda g: (square(g),))
case("sgn", lambda g: (square(g),))
case("copysign.Tensor", pair_of_squares)
case("copysign.Scalar", lambda g: (square(g), -2.0))
case("atan2", pair_of_squares, 6, band=(0.25, 4), wide=(0.05, 4))
case("logaddexp", pair_of_squares, 6)
case("logaddexp2", pair_of_squares, 6)
case("nan_to_num", lambda g: (square(g),))
case("nan_to_num:numbers", lambda g: (square(g), 1.0, 2.0, -2.0), 1, band=(0.2, 4))  # 2 beside data under 1/2
case("neg", lambda g: (square(g),))
case("abs", lambda g: (square(g),))

# --- powers
case("sqrt", lambda g: (g.positive(g.n, g.n),))
case("rsqrt", lambda g: (g.positive(g.n, g.n),))
case("square", lambda g: (square(g),))
for p in (2, 3, -1, 0, 1, 0.5, -0.5):
    case(f"pow.Tensor_Scalar:{p}", lambda g, p=p: ((square(g) if p in (2, 3) else g.positive(g.n, g.n)), p))
case("pow.Tensor_Scalar:0.37", lambda g: (g.positive(g.n, g.n), 0.37))
case("pow.Tensor_Scalar:-1.7", lambda g: (g.positive(g.n, g.n), -1.7), 20)
case("pow.Scalar", lambda g: (2.5, square(g)), 1, band=(0.25, 64), wide=(0.25, 64))
case("pow.Tensor_Tensor", lambda g: (g.positive(g.n, g.n), square(g)), 1, band=(0.1, 99), wide=(0.05, 99))

# --- reductions
for name in ("sum", "mean", "nansum"):
    case(name, lambda g: (square(g),), wide=(0.25, 64), band=(1e-3, 4))
for name in ("sum.dim_IntList", "mean.dim"):
    case(name, lambda g: (square(g), [1]), wide=(0.25, 64))
    case(f"{name}:all", lambda g: (square(g), None), band=(1e-3, 4))
    case(f"{name}:keep", lambda g: (g(3, g.n, g.n), [0, 2], True))
chain("sum:dtype", lambda c, g: c("sum", square(g), dtype=torch.float64), band=(1e-3, 4))
case("nansum:dim", lambda g: (square(g), [1], True))
case("prod", lambda g: (g.positive(3),), 20, band=(0.05, 8))
case("prod.dim_int", lambda g: (g.positive(g.n, 3), 1), 20)
for name in ("amax", "amin"):
    case(name, lambda g: (square(g), [1]))
for name in ("max", "min"):
    case(name, lambda g: (square(g),), band=(0.25, 8))
for name in ("max.dim", "min.dim", "median.dim", "nanmedian.dim", "cummax", "cummin"):
    case(name, lambda g: (square(g), 1), band=(0.02, 4))
case("median", lambda g: (square(g),), band=(1e-4, 4))
case("nanmedian", lambda g: (square(g),), band=(1e-4, 4))
case("mode", lambda g: (square(g), 1))
case("aminmax", lambda g: (square(g),), band=(0.25, 8))
case("kthvalue", lambda g: (square(g), 2, 1))
case("sort", lambda g: (square(g), 1))
chain("sort.stable", lambda c, g: c("sort.stable", square(g), stable=True, dim=0))
case("topk", lambda g: (square(g), 3))
for name in ("var", "std", "var_mean", "std_mean"):
    op = f"{name}.correction"
    chain(op, lambda c, g, op=op: c(op, square(g), [1], correction=1), band=(0.25, 4))
    chain(f"{op}:all", lambda c, g, op=op: c(op, square(g), correction=0, keepdim=True), band=(1e-3, 4))
for p in (2, 1, 0, 3, INF):
    case(f"linalg_vector_norm:{p}", lambda g, p=p: (square(g), p), band=(0.25, 16), wide=(0.25, 16))
case("linalg_vector_norm:dim", lambda g: (square(g), 2, [1], True))
case("norm.Scalar", lambda g: (square(g), 2))
case("norm.ScalarOpt_dim", lambda g: (square(g), 2, [1], True))
chain("norm.ScalarOpt_dtype", lambda c, g: c("norm.ScalarOpt_dtype", square(g), 2, dtype=torch.float64))
chain("norm.ScalarOpt_dim_dtype", lambda c, g: c("norm.ScalarOpt_dim_dtype", square(g), 2, [1], False, dtype=torch.float64))
case("dist", pair_of_squares)
case("trace", lambda g: (square(g),), band=(1e-3, 4))
case("cumsum", lambda g: (square(g), 1), band=(0.1, 4))
case("cumprod", lambda g: (g.positive(g.n, 3), 1), 2, band=(0.05, 64), wide=(0.05, 64))
case("logsumexp", lambda g: (square(g), [1]), 4, band=(0.25, 8), wide=(0.25, 8))
case("logcumsumexp", lambda g: (square(g), 1), 4, band=(0.25, 8), wide=(0.25, 8))
case("_cdist_forward", lambda g: (g(g.n, g.n), g(3, g.n), 2.0, None), tolerance=1e-7)  # torch's own form cancels
chain("_cdist_backward", lambda c, g: (lambda x, y: c(
    "_cdist_backward", g(g.n, 3), x, y, 2.0, c("_cdist_forward", x, y, 2.0, None)))(g(g.n, g.n), g(3, g.n)),
    band=(0.02, 4), tolerance=1e-7, half=False)  # fmt: skip

# --- comparisons and tests
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    case(f"{name}.Tensor", pair_of_squares, band=None)
    case(f"{name}.Tensor:equal", lambda g: (lambda x: (x, x))(square(g)), band=None)
    for value in (0.0, 0.3, INF):
        case(f"{name}.Scalar:{value}", lambda g, value=value: (square(g), value), band=None)
chain("equal", lambda c, g: (lambda x: c("equal", x, x))(square(g)), band=None)
chain("allclose", lambda c, g: (lambda x: c("allclose", x, x))(square(g)), band=None)
for name in ("isnan", "isinf", "isposinf", "isneginf", "signbit", "logical_not", "argmax", "argmin", "any", "all", "nonzero",
             "count_nonzero"):  # fmt: skip
    case(name, lambda g: (square(g),), band=None)
for name in ("any.dim", "all.dim", "argsort"):
    case(name, lambda g: (square(g), 1), band=None)
for name in ("any.dims", "all.dims", "count_nonzero.dim_IntList"):
    case(name, lambda g: (square(g), [1]), band=None)
chain("argsort.stable", lambda c, g: c("argsort.stable", square(g), stable=True), band=None)
for name in ("is_nonzero", "_local_scalar_dense"):
    case(name, lambda g: (g(),), band=None)
for name in ("logical_and", "logical_or", "logical_xor"):
    case(name, pair_of_squares, band=None)
case("heaviside", lambda g: (square(g), g.zero_d(0.5)), wide=(0.25, 4))

# --- layout
LAYOUT = {
    "alias": (), "detach": (), "clone": (), "t": (), "t_copy": (), "lift_fresh": (), "lift_fresh_copy": (), "alias_copy": (),
    "detach_copy": (), "squeeze": (), "squeeze_copy": (), "view": ([-1],), "view_copy": ([-1],), "_unsafe_view": ([-1],),
    "transpose.int": (0, 1), "transpose_copy.int": (0, 1), "permute": ([1, 0],), "permute_copy": ([1, 0],),
    "expand": ([2, -1, -1],), "expand_copy": ([2, -1, -1],), "unsqueeze": (0,), "unsqueeze_copy": (0,), "squeeze.dim": (0,),
    "squeeze.dims": ([0],), "select.int": (0, 1), "select_copy.int": (0, 1), "slice.Tensor": (0, 1, 3),
    "slice_copy.Tensor": (0, 1, 3), "as_strided": ([2, 2], [1, 2]), "as_strided_copy": ([2, 2], [1, 2]), "diagonal": (),
    "diagonal_copy": (), "unfold": (0, 2, 1), "unfold_copy": (0, 2, 1), "split.Tensor": (2,), "unsafe_split.Tensor": (2,),
    "unbind.int": (0,), "flip": ([0],), "roll": ([1],), "repeat": ([2, 1],), "tril": (), "triu": (), "rot90": (),
    "diag_embed": (),
}  # fmt: skip
for name, more in LAYOUT.items():
    case(name, lambda g, more=more: (square(g), *more), band=(0.05, 4))
for name in ("split_with_sizes", "unsafe_split_with_sizes"):
    case(name, lambda g: (square(g), [2, g.n - 2]))
for name, more in {"transpose_": (0, 1), "t_": (), "squeeze_": (), "squeeze_.dim": (0,), "squeeze_.dims": ([0],), "unsqueeze_": (0,)}.items():
    case(name, lambda g, more=more: (square(g), *more))
case("_to_copy", lambda g: (square(g),))
chain("_to_copy:half", lambda c, g: c("_to_copy", square(g), dtype=torch.float32), 20, tolerance=1e-6)
chain("_to_copy:int", lambda c, g: c("_to_copy", square(g), dtype=torch.int64), 6, band=None)
case("copy", pair_of_squares)
case("copy:number", lambda g: (square(g), g.zero_d(0.3)), late=True)
case("constant_pad_nd", lambda g: (square(g), [1, 1]))
case("constant_pad_nd:value", lambda g: (square(g), [1, 1], 2.0), 9, band=(1e-3, 4), wide=(1e-3, 4))
case("slice_backward", lambda g: (g(2, g.n), [g.n, g.n], 0, 1, 3, 1), band=(0.02, 4))
case("select_backward", lambda g: (g(g.n), [g.n, g.n], 0, 1), band=(0.02, 4))
case("unfold_backward", lambda g: (g(g.n - 1, g.n, 2), [g.n, g.n], 0, 2, 1))
case("diagonal_backward", lambda g: (g(g.n), [g.n, g.n], 0, 0, 1), band=(0.02, 4))
case("pixel_shuffle", lambda g: (g(2, 4, 3, 3), 2))
case("pixel_unshuffle", lambda g: (g(2, 4, 4, 4), 2))
case("im2col", lambda g: (g(2, 3, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]))
for dims in (1, 2, 3):
    for kind in ("reflection", "replication"):
        op = f"{kind}_pad{dims}d"
        case(op, lambda g, dims=dims: (g(2, 3, *[4] * dims), [1] * 2 * dims))
        case(f"{op}_backward", lambda g, dims=dims: (g(2, 3, *[6] * dims), g(2, 3, *[4] * dims), [1] * 2 * dims))
for name in ("index.Tensor", "_unsafe_index.Tensor"):
    case(name, lambda g: (square(g), [g.labels(g.n, 4)]))
case("index_select", lambda g: (square(g), 0, g.labels(g.n, 4)))
case("gather", lambda g: (square(g), 1, g.labels(g.n, g.n, 3)))
case("take", lambda g: (square(g), g.labels(g.n, 4)))
case("masked_select", lambda g: (square(g), g.mask(g.n, g.n)))
case("embedding", lambda g: (square(g), g.labels(g.n, 2, 3)))

# --- new tensors
for name in ("zeros_like", "empty_like", "ones_like", "zero"):
    case(name, lambda g: (square(g),), band=None)
for name in ("rand_like", "randn_like"):
    case(name, lambda g: (square(g),), band=None)
case("bernoulli.p", lambda g: (square(g), 0.5), band=None)
for name in ("new_zeros", "new_empty", "new_ones"):
    case(name, lambda g: (square(g), [2, 3]), band=None)
case("new_empty_strided", lambda g: (square(g), [2, 3], [3, 1]), band=None)
case("full_like", lambda g: (square(g), 0.3), wide=(0.5, 2))
chain("full_like:int", lambda c, g: c("full_like", square(g), 3, dtype=torch.int64), band=None)
case("new_full", lambda g: (square(g), [2, 3], 300.0), wide=(0.5, 2))
case("fill.Scalar", lambda g: (square(g), -3e-4), wide=(0.5, 2))
case("fill.Tensor", lambda g: (square(g), g.zero_d(-3e-4)), wide=(0.5, 2), late=True)
case("bernoulli", lambda g: (g.inside(g.n, g.n),), band=None)
case("multinomial", lambda g: (g.positive(g.n, g.n), 2), band=None)
case("uniform", lambda g: (square(g), -3.0, 3.0))
case("normal_functional", lambda g: (square(g), 0.0, 0.02))
case("normal_", lambda g: (square(g), 0.0, 0.02), 3, band=None)
case("bernoulli_.float", lambda g: (square(g), 0.5), band=None)
chain("native_dropout", lambda c, g: c("native_dropout", square(g), 0.3, True))
case("native_dropout_backward", lambda g: (square(g), g.mask(g.n, g.n), 1 / 0.3))

# --- selection
case("where.self", lambda g: (g.mask(g.n, g.n), *pair_of_squares(g)), band=(0.25, 4))
case("where.self:number", lambda g: (g.mask(g.n, g.n), square(g), g.zero_d(0.3)), 9, late=True)
case("where.self:minus infinity", lambda g: (g.mask(g.n, g.n), g.zero_d(-INF), square(g)), band=None, late=True)
case("where.ScalarOther", lambda g: (g.mask(g.n, g.n), square(g), 0.0))
case("where.ScalarSelf", lambda g: (g.mask(g.n, g.n), 2.0, square(g)), 9)
case("where.Scalar", lambda g: (g.mask(g.n, g.n), 2.0, 3.0), half=False, band=None)
for value in (0.0, -INF, 3.0):
    case(f"masked_fill.Scalar:{value}", lambda g, value=value: (square(g), g.mask(g.n, g.n), value), 8, band=None if value == -INF else (0.25, 4))
case("masked_fill.Tensor", lambda g: (square(g), g.mask(g.n, g.n), g.zero_d(0.3)), 9, late=True)
case("masked_scatter", lambda g: (square(g), g.mask(g.n, g.n), square(g)))
case("masked_scatter_backward", lambda g: (square(g), g.mask(g.n, g.n), [g.n, g.n]), band=(0.02, 4))
case("scatter.src", lambda g: (square(g), 1, g.labels(g.n, g.n, 1), g(g.n, 1)), band=(0.1, 4))
case("scatter.value", lambda g: (square(g), 1, g.labels(g.n, g.n, 2), 0.7), 9)
case("index_fill.int_Scalar", lambda g: (square(g), 1, g.labels(g.n, 2), 0.7), 9)
case("index_fill.int_Tensor", lambda g: (square(g), 1, g.labels(g.n, 2), g.zero_d(0.7)), 9, late=True)
case("scatter_add", lambda g: (square(g), 1, g.labels(g.n, g.n, 3), g(g.n, 3)), band=(0.1, 4))
for reduce in ("sum", "mean", "amax"):
    case(f"scatter_reduce.two:{reduce}", lambda g, reduce=reduce: (square(g), 1, g.labels(g.n, g.n, 3), g(g.n, 3), reduce), band=(0.1, 4))
case("scatter_reduce.two:prod", lambda g: (square(g), 1, g.labels(g.n, g.n, 3), g(g.n, 3), "prod"), 3, half=False, band=(0.01, 99), wide=(0.01, 99))
case("index_add", lambda g: (square(g), 0, g.labels(g.n, 3), g(3, g.n)), band=(0.1, 4))
chain("index_add:alpha", lambda c, g: c("index_add", square(g), 0, g.labels(g.n, 3), g(3, g.n), alpha=-0.3), band=(0.1, 4))
case("index_copy", lambda g: (square(g), 0, torch.tensor([2, 0, 1]), g(3, g.n)), band=(0.1, 4))
for name in ("index_put", "_unsafe_index_put"):
    case(name, lambda g: (square(g), [torch.tensor([2, 0, 1])], g(3, g.n)), band=(0.1, 4))
    case(f"{name}:add", lambda g: (square(g), [g.labels(g.n, 3)], g(3, g.n), True), band=(0.1, 4))
case("put", lambda g: (square(g), torch.tensor([2, 0, 1]), g(3)), band=(0.01, 4))
case("slice_scatter", lambda g: (square(g), g(2, g.n), 0, 1, 3), band=(0.1, 4))
case("select_scatter", lambda g: (square(g), g(g.n), 0, 1), band=(0.1, 4))
case("diagonal_scatter", lambda g: (square(g), g(g.n)), band=(0.1, 4))
case("as_strided_scatter", lambda g: (square(g), g(2, 2), [2, 2], [1, 2]), band=(0.01, 4))
for name in ("cat", "stack"):
    case(name, lambda g: (list(pair_of_squares(g)), 1), band=(0.25, 4))
case("cat:empty", lambda g: ([torch.zeros(0, dtype=g.dtype), g(g.n)], 0))

# --- averages
case("lerp.Scalar", lambda g: (*pair_of_squares(g), 0.1), band=(0.05, 4), wide=(0.05, 4))
case("lerp.Tensor", lambda g: (*pair_of_squares(g), g.inside(g.n, g.n)), band=(0.1, 4))
case("lerp.Tensor:number tensor", lambda g: (*pair_of_squares(g), g.zero_d(0.1)), band=(0.05, 4), wide=(0.05, 4))
for name in ("addcmul", "addcdiv"):
    for value in (1, -0.001, 3.0):
        op = name
        chain(f"{name}:{value}", lambda c, g, op=op, value=value: c(op, square(g), square(g), g.positive(g.n, g.n), value=value), 30, band=(0.02, 4))
