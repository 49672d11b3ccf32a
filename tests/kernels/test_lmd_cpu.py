"""The compiled LMD step: noise to the bit, weights beside float64, what is stored beside the torch reference."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from lmd_oracle import PAIRS, check_step, check_weights, numbers, tensors

from isoscale._base.errors import ConfigError
from isoscale.kernels import build, cpu_lmd, lmd
from isoscale.kernels.lmd import Spec
from isoscale.kernels.normals import Place, indices, normals, words

pytestmark = pytest.mark.skipif(not cpu_lmd.available(), reason=cpu_lmd.why_not())
FORMS = ("split", "hypentropy")
RULES = ("log-normal", "constant", "half-normal", "exponential")
PLACES = (
    Place(0, 5000, 5000), Place(12345, 100, 1000), Place(7, 3, 11), Place(2**32 - 700, 5000, 5000),
    Place(2**32 - 70, 33, 64), Place(2**40 + 5, 700, 2**33 + 1), Place(2**53, 1, 2),
)  # fmt: skip
MOST = {"fp32": 0.0, "log16": 0.03, "log8": 0.002, "bf16": 0.002}  # stored numbers that rounding may move over a boundary


def specs(**fixed: object) -> list[Spec]:
    pairs = [(f, r) for f, r in product(FORMS, RULES) if (f, r) != ("hypentropy", "constant")]
    return [Spec(form=f, regulariser=r, **fixed) for f, r in pairs]  # type: ignore[arg-type]


def assert_step(spec: Spec, n: int, dtype: torch.dtype = torch.float32, **how: object) -> None:
    a, m = check_step(cpu_lmd, spec, n, dtype, **how)  # type: ignore[arg-type]
    assert a <= MOST[spec.medians]
    assert spec.momentum == "fp32" or m <= MOST["bf16"]


@pytest.mark.parametrize("place", PLACES)
def test_words_and_normals_are_those_of_the_definition(place: Place) -> None:
    for n in (1, 255, 257, 4999):
        for keys in ((0, 0), *PAIRS[0]):
            index = indices(torch.Size([n]), place, torch.device("cpu"))
            bits, z = cpu_lmd._noise(keys, n, place)
            want = words(keys, index)
            assert torch.equal(bits, want)
            assert torch.equal(z, normals(want))


@pytest.mark.parametrize("spec", specs(), ids=str)
def test_forms_and_regularisers(spec: Spec) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_step(spec, 5000, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("medians", ["fp32", "log16", "log8"])
@pytest.mark.parametrize("momentum", ["fp32", "bf16", "log8"])
def test_storages(form: str, medians: str, momentum: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_step(Spec(form=form, medians=medians, momentum=momentum), 20000, dtype, alpha=0.03)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [{"raw": True}, {"single": True}, {"at_median": True}, {"given": True},
                                   {"raw": True, "single": True, "given": True}], ids=str)  # fmt: skip
def test_flags(form: str, flags: dict[str, bool]) -> None:
    for momentum in ("fp32", "bf16", "log8"):
        assert_step(Spec(form=form, momentum=momentum, **flags), 5000)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 255, 256, 257, 271, 1023, 1025, 2100])
def test_sizes(n: int) -> None:
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            assert_step(Spec(form=form), n, dtype)
            assert_step(Spec(form=form, medians="log8", momentum="log8"), n, dtype)


@pytest.mark.parametrize("place", PLACES)
def test_places(place: Place) -> None:
    for form in FORMS:
        assert_step(Spec(form=form), 5000, place=place)


@pytest.mark.parametrize("how", [{"sigma": 0.0}, {"sigma": 1.0}, {"sigma": 0.3, "lift": 0.045}, {"alpha": 0.9, "decay": 0.5},
                                 {"alpha": 0.0}, {"centre": -40.0}, {"centre": 3.0}], ids=str)  # fmt: skip
def test_numbers(how: dict[str, float]) -> None:
    for spec in specs():
        assert_step(spec, 3000, **how)


def test_a_piece_has_the_bits_of_the_whole() -> None:
    """A tensor in pieces, by rows and by columns, and on several threads."""
    threads = torch.get_num_threads()
    for spec in (Spec(), Spec(form="hypentropy", momentum="bf16"), Spec(medians="log8", momentum="log8")):
        rows, cols = 300, 700
        nums = numbers(spec, rows * cols)
        parts = tensors(spec, rows * cols)
        medians, momenta, given, out = (
            tuple(x.view(rows, cols) for x in group) if isinstance(group, tuple) else group.view(rows, cols) for group in parts
        )
        pieces = [(slice(100, 133), slice(0, 700)), (slice(0, 300), slice(33, 50)), (slice(299, 300), slice(699, 700))]
        kept = [[tuple(x[at].clone() for x in group) for group in (medians, momenta, given, (out,))] for at in pieces]
        torch.set_num_threads(3)
        try:
            cpu_lmd.step(spec, nums, medians, momenta, given, out)
        finally:
            torch.set_num_threads(threads)
        for (r, c), (a, v, g, w) in zip(pieces, kept):
            place = Place(r.start * cols + c.start, c.stop - c.start, cols)
            cpu_lmd.step(spec, nums._replace(place=place), a, v, g, w[0])
            for part, whole in zip((*a, *v, w[0]), (*medians, *momenta, out)):
                assert torch.equal(part, whole[r, c])


def test_samples() -> None:
    for spec in (Spec(), Spec(form="hypentropy"), Spec(medians="log16"), Spec(medians="log8"), Spec("hypentropy", medians="log8")):
        for dtype in (torch.float32, torch.bfloat16):
            for lift, sigma in ((0.0, 0.1), (0.005, 0.1), (0.005, 0.0)):
                medians, _, _, out = tensors(spec, 3001, dtype)
                nums = numbers(spec, 3001, sigma=sigma, lift=lift)
                cpu_lmd.sample(spec, nums, medians, out)
                check_weights(spec, nums, medians, out)
    with pytest.raises(AssertionError):  # the control: other noise is not within the bound
        check_weights(spec, nums._replace(next=nums.next._replace(sigma=0.001)), medians, out)


def test_a_step_draws_what_a_sample_draws() -> None:
    for spec in (Spec(), Spec(form="hypentropy", momentum="bf16"), Spec(medians="log8", momentum="log8")):
        medians, momenta, given, out = tensors(spec, 4000)
        nums = numbers(spec, 4000)
        cpu_lmd.step(spec, nums, medians, momenta, given, out)
        again = torch.zeros_like(out)
        cpu_lmd.sample(spec, nums, medians, again)
        assert torch.equal(out, again)


def test_other_rounding_keys_are_seen() -> None:
    """The control of the shares: with other random bits far more codes differ than rounding explains."""
    spec = Spec(medians="log8", momentum="log8")

    class Other:
        @staticmethod
        def step(spec: Spec, nums: lmd.Numbers, *rest: object) -> None:
            cpu_lmd.step(spec, nums._replace(rounding=PAIRS[0]), *rest)  # type: ignore[arg-type]

    a, m = check_step(Other, spec, 20000)
    assert a > 20 * MOST["log8"]
    assert m > 20 * MOST["bf16"]


@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64"])
def test_narrower_machines(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for machines of narrower registers: the same noise, and the same bounds."""
    source = Path(build.__file__).with_name("lmd.cpp")
    target = tmp_path / "lmd.so"
    done = subprocess.run([*build._compiler(), *build.FLAGS, flags, "-o", str(target), str(source)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this compiler does not know {flags}")
    library = ctypes.CDLL(str(target))
    monkeypatch.setattr(cpu_lmd, "library", lambda: library)
    for place in PLACES:
        index = indices(torch.Size([999]), place, torch.device("cpu"))
        bits, z = cpu_lmd._noise((1, 2), 999, place)
        assert torch.equal(bits, words((1, 2), index))
        assert torch.equal(z, normals(bits))
    for spec in specs():
        assert_step(spec, 1003)
    for form, medians, momentum in product(FORMS, ("log16", "log8"), ("bf16", "log8")):
        assert_step(Spec(form=form, medians=medians, momentum=momentum), 5003, torch.bfloat16)
    assert not cpu_lmd.all_finite([torch.tensor([1.0] * 9 + [float("nan")])])
    assert cpu_lmd.all_finite([torch.full((1001,), 3e38)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_finite(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    for n in (0, 1, 2, 31, 32, 33, 64, 1000, 8200):
        x = torch.full((n,), top, dtype=dtype)
        x[::2] *= -1
        assert cpu_lmd.all_finite([x, torch.zeros(3, dtype=dtype)])
        for at in {0, 1, n // 2, n - 2, n - 1}:
            for bad in (float("inf"), float("-inf"), float("nan")):
                if 0 <= at < n:
                    y = x.clone()
                    y[at] = bad
                    assert not cpu_lmd.all_finite([x, y])
    assert cpu_lmd.all_finite([])
    every = torch.zeros(64, 64, dtype=dtype)
    every[1, 2] = float("nan")
    assert not cpu_lmd.all_finite([every.t()])
    assert cpu_lmd.all_finite([every[2:].t()])


def test_what_is_covered_and_refused() -> None:
    spec = Spec()
    medians, momenta, given, out = tensors(spec, 64)
    nums = numbers(spec, 64)
    assert cpu_lmd.covers(spec, (*medians, *momenta, *given, out))
    assert not cpu_lmd.covers(spec, (*medians, out.half()))
    assert not cpu_lmd.covers(spec, (torch.zeros(8, 8).t(),))
    assert not cpu_lmd.covers(spec, (torch.zeros(8, device="meta"),))
    cases = [
        ("form", spec._replace(form="spilt"), medians, momenta, given, out),
        ("regulariser", Spec(form="hypentropy", regulariser="constant"), medians[:1], momenta[:1], given, out),
        ("medians", spec, medians[:1], momenta, given, out),
        ("medians", spec._replace(medians="log8"), medians, momenta, given, out),
        ("momenta", spec, medians, (momenta[0], momenta[1][:5]), given, out),
        ("given", spec._replace(given=True), medians, momenta, given, out),
        ("out", spec, medians, momenta, given, out.half()),
        ("given", spec, medians, momenta, (given[0].view(8, 8).t(),), out),
    ]
    for key, *rest in cases:
        with pytest.raises(ConfigError) as error:
            cpu_lmd.step(rest[0], nums, *rest[1:])  # type: ignore[arg-type]
        assert error.value.key == key
    log8 = Spec(momentum="log8")
    medians, momenta, given, out = tensors(log8, 64)
    with pytest.raises(ConfigError, match="largest 8-bit"):
        cpu_lmd.step(log8, nums._replace(range=-200.0), medians, momenta, given, out)


def test_the_structs_are_the_same_on_both_sides() -> None:
    assert build.library().isoscale_lmd_size() == cpu_lmd._LMD.size
