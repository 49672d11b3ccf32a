"""The Triton LMD step against the torch reference; run by test_lmd_triton.py, interpreted or on a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from lmd_oracle import PAIRS, check_step, check_weights, numbers, tensors

from isoscale._base.errors import ConfigError
from isoscale.kernels import triton_lmd
from isoscale.kernels.lmd import Spec
from isoscale.kernels.normals import Place, indices, normals, words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("split", "hypentropy")
RULES = ("log-normal", "constant", "half-normal", "exponential")
PLACES = (Place(0, 3000, 3000), Place(12345, 100, 1000), Place(2**32 - 700, 3000, 3000), Place(2**40 + 5, 700, 2**33 + 1))
MOST = {"fp32": 0.0, "log16": 0.03, "log8": 0.002, "bf16": 0.002}


def run(spec: Spec, n: int = 3000, dtype: torch.dtype = torch.float32, **how: object) -> None:
    a, m = check_step(triton_lmd, spec, n, dtype, DEVICE, **how)  # type: ignore[arg-type]
    assert a <= MOST[spec.medians]
    assert spec.momentum == "fp32" or m <= MOST["bf16"]


@pytest.mark.parametrize("place", PLACES)
def test_noise(place: Place) -> None:
    for keys in ((0, 0), *PAIRS[0], *PAIRS[1]):
        bits, z = triton_lmd._noise(keys, 2999, place, DEVICE)
        want = words(keys, indices(torch.Size([2999]), place, torch.device("cpu")))
        assert torch.equal(bits.cpu(), want)
        assert torch.equal(z.cpu(), normals(want))


@pytest.mark.parametrize(("form", "rule"), [x for x in product(FORMS, RULES) if x != ("hypentropy", "constant")])
def test_forms(form: str, rule: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        run(Spec(form=form, regulariser=rule), 3000, dtype)


@pytest.mark.parametrize(("medians", "momentum"), list(product(("fp32", "log16", "log8"), ("fp32", "bf16", "log8"))))
def test_storages(medians: str, momentum: str) -> None:
    for form in FORMS:
        run(Spec(form=form, medians=medians, momentum=momentum), 8000, alpha=0.03)


@pytest.mark.parametrize("form", FORMS)
def test_flags_and_numbers(form: str) -> None:
    for flags in ({"raw": True}, {"single": True}, {"at_median": True}, {"given": True}):
        run(Spec(form=form, **flags))
    for how in ({"sigma": 0.0}, {"sigma": 1.0}, {"alpha": 0.9, "decay": 0.5}, {"alpha": 0.0}, {"centre": -40.0}):
        run(Spec(form=form), **how)


@pytest.mark.parametrize("place", PLACES)
def test_places_and_sizes(place: Place) -> None:
    for form, n in product(FORMS, (1, 1023, 1025)):
        run(Spec(form=form), n, place=place)


def test_samples_and_refusals() -> None:
    for spec in (Spec(), Spec(form="hypentropy"), Spec(medians="log16"), Spec("hypentropy", medians="log8")):
        medians, momenta, given, out = (
            tuple(x.to(DEVICE) for x in group) if isinstance(group, tuple) else group.to(DEVICE)
            for group in tensors(spec, 2001)
        )
        nums = numbers(spec, 2001, lift=0.005)
        triton_lmd.sample(spec, nums, medians, out)
        check_weights(spec, nums, tuple(x.cpu() for x in medians), out.cpu())
        triton_lmd.step(spec, nums, medians, momenta, given, out)
        again = torch.zeros_like(out)
        triton_lmd.sample(spec, nums, medians, again)
        assert torch.equal(out, again)
    triton_lmd.sample(spec, nums, tuple(x[:0] for x in medians), out[:0])
    assert triton_lmd.covers(spec, (*medians, out))
    assert not triton_lmd.covers(spec, (out.half(),))
    with pytest.raises(ConfigError, match="cannot take"):
        triton_lmd.sample(spec, nums, medians, out.half())
