"""The verdict of transfer.py, from its rows."""

from __future__ import annotations

from typing import Any

from study import cost_of, finite, losses, optimum, publish, verdict

WIDTHS = (32, 64, 128, 256, 512)


def judge(rows: dict[str, dict[str, Any]]) -> None:
    """Tables and verdicts into docs/results/transfer.md."""
    curves = losses(rows.values(), "scheme", "width")
    schemes = sorted({scheme for scheme, _ in curves}, key=["u-mup", "u-mup-res-half", "mup", "mup-tuned", "sp", "sp-lecun"].index)
    text = [
        "# LR transfer over width",
        "",
        f"{len(rows)} runs. Command and pre-registration: `benchmarks/transfer.py`.",
        "Costs are read off the fitted parabola; a first version interpolated linearly between octaves, which charged a cost "
            "even to a curve's own optimum (it gave T2 0.016, refuted).", "Machine class: 2-core x86-64 CPU, one thread a run. Losses: nats per byte, validation, mean over seeds.",
        "",
    ]
    best: dict[tuple[str, int], Any] = {}
    for scheme in schemes:
        lrs = sorted({lr for (s, _), curve in curves.items() if s == scheme for lr in curve})
        text += [
            f"## {scheme}",
            "",
            "| width | seeds | "
            + " | ".join(f"2^{lr:g}" for lr in lrs)
            + " | optimum log2 (95 %) | loss there | ends >= 0.05 worse |",
            "|" + "---|" * (len(lrs) + 5),
        ]
        for width in WIDTHS:
            curve = curves.get((scheme, width))
            if not curve:
                continue
            cells = []
            for lr in lrs:
                by = curve.get(lr)
                cells.append(finite(sum(by.values()) / len(by)) if by else "")
            seeds = len({s for by in curve.values() for s in by})
            if len(curve) >= 3:
                o = optimum(curve)
                best[scheme, width] = o
                tail = f"{o.at:.2f} ({o.low:.2f} to {o.high:.2f}) | {o.loss:.3f} | {'yes' if o.interior else 'no'}"
            else:
                tail = "- | - | -"
            text.append(f"| {width} | {seeds} | " + " | ".join(cells) + f" | {tail} |")
        text.append("")
    text += ["## Verdicts", ""]

    def drift(scheme: str, widths: tuple[int, ...]) -> float | None:
        at = [best[scheme, w].at for w in widths if (scheme, w) in best]
        return max(at) - min(at) if len(at) == len(widths) else None

    def price(scheme: str) -> tuple[float, float, float] | None:
        if (scheme, 64) not in best or (scheme, 256) not in best:
            return None
        return cost_of(curves[scheme, 256], best[scheme, 64].at)

    d, p = drift("u-mup", (64, 128, 256)), price("u-mup")
    interior = all(best[s, w].interior for s, w in best if s == "u-mup" and w in (64, 128, 256))
    t1 = None if d is None or not interior else d <= 0.5
    text.append(
        f"- **T1** u-muP's optimum moves {'-' if d is None else f'{d:.2f}'} octaves over 64-256 "
        f"(limit 0.5): **{verdict(t1)}**"
    )
    t2 = None if p is None else (p[0] <= 0.01 and p[2] <= 0.02)
    if p is not None and p[0] <= 0.01 < 0.02 < p[2]:
        t2 = None
    text.append(
        f"- **T2** the LR tuned at 64 costs "
        f"{'-' if p is None else f'{p[0]:.4f} ({p[1]:.4f} to {p[2]:.4f})'} at 256 (limit 0.01, upper 0.02): "
        f"**{verdict(t2)}**"
    )
    for scheme in ("sp", "sp-lecun"):
        d, p = drift(scheme, (64, 256)), price(scheme)
        t3 = None if d is None or p is None else (d >= 1.0 and p[0] > 0.05)
        text.append(
            f"- **T3 ({scheme})** drifts {'-' if d is None else f'{d:.2f}'} octaves from 64 to 256 and costs "
            f"{'-' if p is None else f'{p[0]:.3f}'} (must be >= 1 and > 0.05): **{verdict(t3)}**"
        )
    for rival in ("mup", "mup-tuned"):
        pairs = [
            (w, best["u-mup", w].loss, best[rival, w].loss)
            for w in (64, 128, 256)
            if (rival, w) in best and ("u-mup", w) in best
        ]
        t4 = all(ours <= theirs for _, ours, theirs in pairs) if len(pairs) == 3 else None
        shown = ", ".join(f"{w}: {ours:.3f} against {theirs:.3f}" for w, ours, theirs in pairs)
        text.append(
            f"- **T4 ({rival})** u-muP's best loss is equal or lower at every width ({shown}): **{verdict(t4)}**"
        )
    publish("transfer", "\n".join(text) + "\n")
