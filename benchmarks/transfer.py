"""Does the proxy's learning rate carry over width? u-muP against SP (two inits) and muP (default and tuned).

Pre-registered (before any row was run):
  T1  u-muP: the fitted optimum moves at most 0.5 octave between any two of the widths 64, 128, 256.
  T2  u-muP: the LR tuned at width 64 costs <= 0.01 nats/byte at width 256 (upper end of the interval <= 0.02).
  T3  SP (init 0.02) and SP (init 1/sqrt(fan_in)): the optimum drifts >= 1 octave from 64 to 256 and the width-64 LR
      costs > 0.05 nats/byte there. This is the control: if it does not drift, the test says nothing.
  T4  u-muP's best loss is equal to or lower than muP's, default and tuned, at every width.
Setting: decoder of 4 blocks, head size 16, FFN ratio 3, non-parametric norms, byte-level Austen + WEB, 200 steps of
8 x 128 tokens, AdamW (0.9, 0.95), 10 % warm-up, cosine to 10 %. u-muP: independent decay 2^-13 (as its paper); SP and
muP: coupled decay 0.1. Width 32 and 512 are context (one seed), not part of a claim.

    OMP_NUM_THREADS=1 python benchmarks/transfer.py --workers 2
"""

from __future__ import annotations

import json

from study import DATA, Cell, main

STEPS = {"train.steps": 200, "train.batch": 8, "data.seq_len": 128}
SCHEMES: dict[str, tuple[dict[str, object], range]] = {
    "u-mup": ({"rules.parametrisation": "u-mup", "hps.weight_decay": 2.0**-13}, range(-2, 5)),
    "sp": ({"rules.parametrisation": "sp", "hps.weight_decay": 0.1}, range(-11, -4)),
    "sp-lecun": ({"rules.parametrisation": "sp-lecun", "hps.weight_decay": 0.1}, range(-11, -4)),
    "mup": ({"rules.parametrisation": "mup", "hps.weight_decay": 0.1, "base.width": 64}, range(-10, -3)),
}  # fmt: skip
# Context, added after u-muP's first rows: one HP line at width 64 had shown that alpha_res 1/2 lowers its loss.
SCHEMES["u-mup-res-half"] = ({**SCHEMES["u-mup"][0], "hps.alpha_res": 0.5}, range(3))
TUNED = DATA / "mup_tuned.json"  # written by tune_mup.py: independent search at width 64
if TUNED.exists():
    SCHEMES["mup-tuned"] = ({**SCHEMES["mup"][0], **json.loads(TUNED.read_text())}, SCHEMES["mup"][1])


def cell(scheme: str, width: int, log2_lr: float, seed: int) -> Cell:
    """One run."""
    settings, _ = SCHEMES[scheme]
    return {
        "label": {"scheme": scheme, "width": width, "log2_lr": log2_lr, "seed": seed},
        "config": {**STEPS, **settings, "model.width": width, "hps.lr": 2.0**log2_lr, "seed": seed},
    }


def cells() -> list[Cell]:
    """Most telling first: one seed at both ends, u-muP's other seeds, muP near its optimum, then the rest."""
    ours = SCHEMES["u-mup"][1]
    out = [cell(s, w, e, 0) for w in (64, 256) for s in ("u-mup", "sp", "sp-lecun") for e in SCHEMES[s][1]]
    out += [cell("u-mup", 128, e, 0) for e in ours]
    out += [cell("u-mup", 256, e, seed) for seed in (1, 2) for e in (0, 1, 2)]
    out += [cell("u-mup", w, e, seed) for w in (64, 128) for seed in (1, 2) for e in ours]
    rivals = [name for name in ("mup", "mup-tuned") if name in SCHEMES]
    out += [cell(s, 64, e, 0) for s in rivals for e in SCHEMES[s][1]]
    out += [cell(s, w, e, 0) for w in (256, 128) for s in rivals for e in (-9, -8, -7, -6)]
    out += [cell("u-mup-res-half", w, e, 0) for w in (64, 256, 128) for e in SCHEMES["u-mup-res-half"][1]]
    out += [cell(s, 64, e, seed) for s in ("sp", "sp-lecun") for seed in (1, 2) for e in SCHEMES[s][1]]
    out += [cell("u-mup", 32, e, 0) for e in ours]
    out += [cell("u-mup", 512, e, 0) for e in (0, 1, 2)]
    out += [cell(s, 128, e, 0) for s in ("sp", "sp-lecun") for e in SCHEMES[s][1]]
    return out


if __name__ == "__main__":
    from transfer_verdict import judge

    main("transfer", __doc__ or "", cells(), judge)
