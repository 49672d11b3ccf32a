"""Where other packages' casts differ from ours, and which of the two follows the standard.

Every differing element is judged by exact rational arithmetic of the rule (OCP Microscaling Formats 1.0, section 6.3, for
floor; the others by their definition in `isoscale.formats.BlockFormat`): `right` counts how often each side has the
exact value. Blocks with an inf or a NaN have no standard: what each side does is printed in words.

Prediction: isoscale is right on every element of every input. Confirmed if no differing element has isoscale wrong.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --out docs/results/data/peers.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isoscale import formats as F

NAMES = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4")
BLOCKS = 4096
Cast = Callable[[Tensor, str], Tensor]


def exact(row: list[float], fmt: F.BlockFormat) -> list[Fraction]:
    """The cast of one finite block in rational arithmetic."""
    element, rule = fmt.element, fmt.scale_rule
    amax = max(abs(Fraction(v)) for v in row)
    top = Fraction(element.max)

    def log2(q: Fraction) -> int:
        k = q.numerator.bit_length() - q.denominator.bit_length()
        return k - 1 if Fraction(2) ** k > q else k

    if not amax:
        return [Fraction(0)] * len(row)
    if rule == "rceil":
        e = log2(amax / top) + (Fraction(2) ** log2(amax / top) != amax / top)
    else:
        e = log2(amax) - element.emax + (rule == "ceil" and Fraction(2) ** log2(amax) != amax)
    scale = Fraction(2) ** max(-127, min(127, e))
    out = []
    for value in row:
        v = min(abs(Fraction(value)) / scale, top)
        step = Fraction(2) ** (max(log2(v), element.emin) - element.mantissa_bits) if v else Fraction(1)
        n, rest = divmod(v / step, 1)
        n += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n % 2 == 1)
        out.append((-1 if value < 0 else 1) * min(n * step, top) * scale)
    return out


def inputs(rule: str) -> Iterator[tuple[str, Callable[[F.ElementFormat], Tensor]]]:
    """Finite inputs by name, each [BLOCKS, 32] float32."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(BLOCKS, 32, generator=generator)

    def top_at(x: Tensor, top: Tensor) -> Tensor:
        x = x / x.abs().amax(1, keepdim=True) * top[:, None] * 0.99
        x[:, 0] = top
        return x

    powers = torch.exp2(torch.randint(-20, 20, (BLOCKS,), generator=generator).float())
    yield "fp32 normals", lambda element: normal()
    yield "bf16-valued normals", lambda element: normal().bfloat16().float()
    yield "multiples of 1/8", lambda element: (normal() * 8).round() / 8
    below = torch.nextafter(powers, torch.zeros(()))
    yield "amax one ulp below 2^k", lambda element: top_at(normal(), below)
    if rule == "rceil":
        for ulps in (0, 1, 2):
            def edge(element: F.ElementFormat, ulps: int = ulps) -> Tensor:
                top = powers * element.max
                for _ in range(ulps):
                    top = torch.nextafter(top, torch.full((), torch.inf))
                return top_at(normal(), top)

            yield f"amax = max x 2^k + {ulps} ulp", edge
    yield "tiny, scale 2^-127", lambda element: normal() * 2.0**-130
    yield "huge, 2^125", lambda element: normal().clamp(-3.9, 3.9) * 2.0**125
    zeros = torch.zeros(BLOCKS, 32)
    zeros[:, ::3], zeros[:, 1] = -0.0, 1.0
    yield "zeros and -0", lambda element: zeros.clone()


def torchao_peer(mode: str) -> Cast:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    kinds = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp6_e3m2": "fp6_e3m2",
             "mxfp6_e2m3": "fp6_e2m3", "mxfp4": torch.float4_e2m1fn_x2}  # fmt: skip

    def cast(x: Tensor, name: str) -> Tensor:
        made = MXTensor.to_mx(x, kinds[name], 32, scaling_mode=getattr(ScaleCalculationMode, mode))
        return made.dequantize(torch.float32)

    return cast


def gfloat_peer() -> Cast:
    import gfloat
    import gfloat.formats as gf

    kinds = {"mxfp8_e4m3": gf.format_info_mxfp8_e4m3, "mxfp8_e5m2": gf.format_info_mxfp8_e5m2, "mxfp6_e3m2":
             gf.format_info_mxfp6_e3m2, "mxfp6_e2m3": gf.format_info_mxfp6_e2m3, "mxfp4": gf.format_info_mxfp4_e2m1}  # fmt: skip

    def cast(x: Tensor, name: str) -> Tensor:
        rows = [gfloat.quantize_block(kinds[name], row, gfloat.compute_scale_amax) for row in x[:512].numpy()]
        return torch.from_numpy(np.stack(rows)).float()

    return cast


def microxcaling_peer(rounding: str) -> Cast:
    from mx.mx_ops import _quantize_mx

    kinds = {"mxfp8_e4m3": "fp8_e4m3", "mxfp8_e5m2": "fp8_e5m2", "mxfp6_e3m2": "fp6_e3m2", "mxfp6_e2m3": "fp6_e2m3",
             "mxfp4": "fp4_e2m1"}  # fmt: skip
    return lambda x, name: _quantize_mx(x, 8, kinds[name], axes=[-1], block_size=32, round=rounding)


def peers() -> Iterator[tuple[str, str, Cast | str]]:
    """(name, scale rule, cast, or the reason why there is none)."""
    makers: list[tuple[str, str, Callable[[], Cast]]] = [
        ("torchao FLOOR", "floor", lambda: torchao_peer("FLOOR")), ("torchao RCEIL", "rceil", lambda: torchao_peer("RCEIL")),
        ("torchao CEIL", "ceil", lambda: torchao_peer("CEIL")), ("gfloat", "floor", gfloat_peer),
        ("microxcaling nearest", "floor", lambda: microxcaling_peer("nearest")),
        ("microxcaling even", "floor", lambda: microxcaling_peer("even")),
    ]  # fmt: skip
    for name, rule, make in makers:
        try:
            yield name, rule, make()
        except ImportError as problem:
            yield name, rule, f"not installed ({problem}); it is not on PyPI" if "mx" in str(problem) else str(problem)


def compare(x: Tensor, fmt: F.BlockFormat, cast: Cast, name: str) -> dict[str, object]:
    """How many elements differ, and how often each side is exactly right where they do."""
    theirs = cast(x, name)
    x = x[: len(theirs)]
    mine = F.fake_cast(x, fmt)
    same = (mine == theirs) & (mine.signbit() == theirs.signbit()) | mine.isnan() & theirs.isnan()
    rows = (~same).any(1).nonzero()[:200, 0].tolist()
    right = {"ours": 0, "theirs": 0, "judged": 0, "sign of zero": int(((mine == theirs) & ~same).sum())}
    for row in rows:
        want = exact(x[row].tolist(), fmt)
        for at in (~same[row]).nonzero()[:, 0].tolist():
            pair = [float(side[row, at]) for side in (mine, theirs)]
            if pair[0] == pair[1]:
                continue
            right["judged"] += 1
            for side, value in zip(("ours", "theirs"), pair):
                right[side] += bool(np.isfinite(value)) and Fraction(value) == want[at]
    return {"elements": x.numel(), "differ": int((~same).sum()), "share": float((~same).double().mean()), **right}


def special(cast: Cast, name: str) -> dict[str, str]:
    """What becomes of a block with an inf, and with a NaN."""
    said = {}
    for label, value in (("inf", torch.inf), ("NaN", torch.nan)):
        x = torch.ones(1, 32)
        x[0, 3] = value
        try:
            y = cast(x, name)[0]
        except (ValueError, AssertionError, RuntimeError) as problem:
            said[label] = f"raises: {str(problem).splitlines()[0][:60]}" if str(problem) else "raises"
            continue
        others = torch.cat([y[:3], y[4:]])
        rest = "NaN" if others.isnan().all() else "0" if (others == 0).all() else f"{others.unique().tolist()}"
        said[label] = f"it becomes {float(y[3])}, the other 31 {rest}"
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    lines: list[dict[str, object]] = []
    wrong = judged = 0
    print(f"{'peer':22s} {'input':28s} {'format':12s} {'differ':>8s}  right where they differ: ours / theirs of judged")
    for peer, rule, cast in peers():
        if isinstance(cast, str):
            print(f"{peer:22s} {cast}")
            lines.append({"peer": peer, "missing": cast})
            continue
        for label, make in inputs(rule):
            for name in NAMES:
                fmt = F.by_name(f"{name}/{rule}")
                found = compare(make(fmt.element), fmt, cast, name)
                wrong += found["judged"] - found["ours"]  # type: ignore[operator]
                judged += found["judged"]  # type: ignore[operator]
                lines.append({"peer": peer, "input": label, "format": str(fmt), **found})
                if found["differ"]:
                    print(f"{peer:22s} {label:28s} {name:12s} {found['share']:8.2%}  {found['ours']} / {found['theirs']} "
                          f"of {found['judged']}" + (f", {found['sign of zero']} signs of zero" if found["sign of zero"] else ""))  # fmt: skip
        for name in NAMES:
            said = special(cast, name)
            lines.append({"peer": peer, "input": "special", "format": name, **said})
            print(f"{peer:22s} {'inf / NaN in a block':28s} {name:12s} inf: {said['inf']}; NaN: {said['NaN']}")
    verdict = "confirmed" if judged and not wrong else "refuted" if wrong else "undecided"
    print(f"\n{judged} differing elements judged; isoscale wrong on {wrong}: {verdict}")
    lines.append({"judged": judged, "ours_wrong": wrong, "verdict": verdict})
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
