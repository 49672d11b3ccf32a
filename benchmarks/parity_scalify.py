"""What the rules of the authors' package (jax-scalify) give on fixed inputs, written as a golden file.

The file is what tests/scalify/test_parity.py holds isoscale's rules against, without JAX. The script runs in an
environment of its own, since the package works on old versions of JAX only (Python 3.11):

    pip install jax==0.4.30 jaxlib==0.4.30 chex==0.1.86 "numpy==1.26.*" "scipy==1.13.*" jax-scalify==0.1.1
    python benchmarks/parity_scalify.py --out tests/golden/scalify_parity.json

Each primitive's rule is called as the package registered it, on float32 data with float32 scales; softmax and
log_softmax have no rule of their own and go through the transform. Scalars are split by the package (rounded down).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src.ad_util import add_any_p
from jax._src.lax.windowed_reductions import reduce_window_max_p, reduce_window_sum_p
from jax_scalify.core import ScaledArray, ScalifyConfig, as_scaled_array, find_registered_scaled_op, scalify
from jax_scalify.lax import scaled_stop_gradient

COMMAND = "python benchmarks/parity_scalify.py --out tests/golden/scalify_parity.json"
PACKAGES = ("jax-scalify", "jax", "jaxlib", "chex", "numpy", "scipy")
ONE = [2.0**e for e in (-6, -3, 0, 1, 6)]
TWO = [(2.0**-6, 2.0**6), (2.0**3, 2.0**3), (2.0**-2, 2.0**5), (2.0**4, 2.0**-1), (1.0, 2.0**-6)]
WINDOW = {"window_dimensions": (1, 1, 2, 2), "window_strides": (1, 1, 2, 2), "padding": ((0, 0),) * 4,
          "base_dilation": (1,) * 4, "window_dilation": (1,) * 4}  # fmt: skip
DOT = {"dimension_numbers": (((1,), (0,)), ((), ()))}
CONV = {
    "window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1),
    "dimension_numbers": lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)), "feature_group_count": 1,
    "batch_group_count": 1, "precision": None, "preferred_element_type": None,
}  # fmt: skip


def inputs() -> dict[str, np.ndarray]:
    """Fixed float32 data, three decimals, no zero."""
    rng = np.random.RandomState(0)
    shapes = {"a": (2, 4), "b": (2, 4), "row": (4,), "long": (2, 18), "left": (2, 20), "right": (20, 3),
              "image": (1, 2, 4, 4), "kernel": (2, 2, 3, 3)}  # fmt: skip
    out = {name: np.round(rng.randn(*shape), 3).astype(np.float32) for name, shape in shapes.items()}
    out["positive"] = np.round(np.abs(rng.randn(2, 4)) + 0.1, 3).astype(np.float32)
    assert all((x != 0).all() for x in out.values())
    return out


def bound(primitive: Any, **params: Any) -> Callable[..., Any]:
    """The registered rule of a primitive."""
    rule, _ = find_registered_scaled_op(primitive)
    return lambda *args: rule(*args, **params)


def number(x: float) -> Any:
    """A Python number as the package makes it a scaled scalar."""
    return as_scaled_array(np.float32(x))


def cases() -> list[tuple[str, Callable[..., Any], tuple[str, ...], list[Any], dict[str, Any]]]:
    """(name, rule, names of inputs, scales to try, parameters that the other side needs)."""
    unary: dict[str, tuple[Callable[..., Any], str]] = {
        "neg": (bound(lax.neg_p), "a"),
        "abs": (bound(lax.abs_p), "a"),
        "sign": (bound(lax.sign_p), "a"),
        "exp": (bound(lax.exp_p), "row"),
        "log": (bound(lax.log_p), "positive"),
        "sin": (bound(lax.sin_p), "row"),
        "cos": (bound(lax.cos_p), "row"),
        "sqrt": (bound(lax.sqrt_p), "positive"),
        "rev": (bound(lax.rev_p, dimensions=(1,)), "a"),
        "reshape": (bound(lax.reshape_p, new_sizes=(4, 2), dimensions=None), "a"),
        "transpose": (bound(lax.transpose_p, permutation=(1, 0)), "a"),
        "slice": (bound(lax.slice_p, start_indices=(0, 1), limit_indices=(2, 3), strides=None), "a"),
        "broadcast_in_dim": (bound(lax.broadcast_in_dim_p, shape=(3, 4), broadcast_dimensions=(1,)), "row"),
        "stop_gradient": (scaled_stop_gradient, "row"),  # a function of lax, not a primitive
        "convert_element_type": (bound(lax.convert_element_type_p, new_dtype=np.float16), "row"),
        "pad": (lambda x: bound(lax.pad_p, padding_config=((0, 0, 0), (1, 2, 0)))(x, np.float32(0)), "a"),
        "reduce_sum": (bound(lax.reduce_sum_p, axes=(1,)), "long"),
        "reduce_sum_all": (bound(lax.reduce_sum_p, axes=(0, 1)), "long"),
        "reduce_max": (bound(lax.reduce_max_p, axes=(1,)), "a"),
        "reduce_min": (bound(lax.reduce_min_p, axes=(1,)), "a"),
        "reduce_window_max": (bound(reduce_window_max_p, **WINDOW), "image"),
        "reduce_window_sum": (bound(reduce_window_sum_p, **WINDOW), "image"),
        "argmax": (bound(lax.argmax_p, axes=(1,), index_dtype=np.int32), "a"),
        "argmin": (bound(lax.argmin_p, axes=(1,), index_dtype=np.int32), "a"),
        "is_finite": (bound(lax.is_finite_p), "row"),
        "relu": (lambda x: bound(lax.max_p)(x, as_scaled_array(np.float32(0))), "a"),
        "softmax": (scalify(lambda x: jax.nn.softmax(x, axis=1)), "a"),
        "log_softmax": (scalify(lambda x: jax.nn.log_softmax(x, axis=1)), "a"),
    }
    binary: dict[str, Any] = {
        "add": lax.add_p, "add_any": add_any_p, "sub": lax.sub_p, "mul": lax.mul_p, "div": lax.div_p, "max": lax.max_p,
        "min": lax.min_p, "eq": lax.eq_p, "ne": lax.ne_p, "gt": lax.gt_p, "ge": lax.ge_p, "lt": lax.lt_p, "le": lax.le_p,
    }  # fmt: skip
    out: list[Any] = [(name, rule, (data,), [(s,) for s in ONE], {}) for name, (rule, data) in unary.items()]
    out += [(name, bound(primitive), ("a", "b"), TWO, {}) for name, primitive in binary.items()]
    out += [("integer_pow", bound(lax.integer_pow_p, y=y), ("row",), [(s,) for s in ONE], {"y": y}) for y in (2, 3)]
    out.append(("reduce_prod", bound(lax.reduce_prod_p, axes=(1,)), ("a",), [(s,) for s in ONE], {}))
    out.append(("dot_general", bound(lax.dot_general_p, **DOT), ("left", "right"), TWO, {}))
    out.append(("conv_general_dilated", bound(lax.conv_general_dilated_p, **CONV), ("image", "kernel"), TWO[:2], {}))
    out.append(("concatenate", lambda x, y: bound(lax.concatenate_p, dimension=1)([x, y]), ("a", "b"), TWO, {}))
    mask = np.array([[True, False, True, False], [False, False, True, True]])
    out.append(("select_n", lambda x, y: bound(lax.select_n_p)(mask, x, y), ("a", "b"), TWO, {"mask": mask.tolist()}))
    for x in (0.999, -5.0, 3.0, 0.25, 1e-3):
        out.append(("mul_number", lambda v, x=x: bound(lax.mul_p)(v, number(x)), ("row",), [(0.125,), (4.0,)], {"y": x}))
        out.append(("add_number", lambda v, x=x: bound(lax.add_p)(v, number(x)), ("row",), [(0.125,), (4.0,)], {"y": x}))
    return out


def digits(x: Any) -> Any:
    """Nested lists; floats with the nine digits that bring float32 back."""
    array = np.asarray(x)
    if array.dtype.kind != "f":
        return array.tolist()
    flat = [float(f"{v:.9g}") for v in array.astype(np.float64).ravel()]
    return np.array(flat, dtype=object).reshape(array.shape).tolist()


def rows(data: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    out = []
    for name, rule, names, tries, params in cases():
        for scales in tries:
            args = [ScaledArray(data[n], np.float32(s)) for n, s in zip(names, scales)]
            found = rule(*args)
            scaled = isinstance(found, ScaledArray)
            row: dict[str, Any] = {"op": name, "inputs": list(names), "scales": list(scales)}
            if params:
                row["params"] = params
            row["data"] = digits(found.data if scaled else found)
            row["scale"] = float(found.scale) if scaled else None
            out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    said = parser.parse_args()
    data = inputs()
    with ScalifyConfig(scale_dtype=np.float32):
        found = rows(data)
    header = {"command": COMMAND, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found)
    pool = ",\n".join(f'"{name}":{json.dumps(digits(x), separators=(",", ":"))}' for name, x in data.items())
    said.out.write_text(f'{{"header":{json.dumps(header)},\n"inputs":{{\n{pool}}},\n"rows":[\n{lines}]}}\n')
    print(f"{len(found)} rows of {len({row['op'] for row in found})} operators, {said.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
