"""Normal numbers by counter: their distribution, their streams, their places."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from isoscale.kernels import normals as module
from isoscale.kernels.normals import Place, base_keys, indices, normals, step_keys, uniform, words

CPU = torch.device("cpu")


def draw(keys: tuple[int, int], n: int, start: int = 0) -> Tensor:
    return words(keys, indices(torch.Size([n]), Place(start, n, n), CPU))


def exact() -> tuple[Tensor, Tensor]:
    """Each value that a normal number can have, in order, and its probability: the sum of four bytes is enumerated."""
    ways = torch.ones(1, dtype=torch.float64)
    for _ in range(4):
        ways = torch.nn.functional.conv1d(ways.view(1, 1, -1), torch.ones(1, 1, 256, dtype=torch.float64), padding=255).flatten()
    s = torch.arange(-510, 511, dtype=torch.float32)
    return (s * (s * s + module.CUBIC)) * module.UNIT, ways / ways.sum()


def test_the_distribution_is_nearly_normal() -> None:
    value, share = exact()
    z = value.double()
    assert float((z * share).sum()) == pytest.approx(0.0, abs=1e-12)
    assert float((z**2 * share).sum()) == pytest.approx(1.0, abs=1e-5)
    assert float((z**4 * share).sum()) == pytest.approx(3.0, abs=1e-4)
    assert float(value.max()) == pytest.approx(module.LARGEST, abs=1e-6)
    below = share.cumsum(0) - share / 2
    gap = max(abs(float(b) - NormalDist().cdf(float(v))) for b, v in zip(below, z))
    assert gap < 0.0021
    plain = torch.arange(-510, 511, dtype=torch.float64)  # the control: without the cubic the kurtosis is 2.7
    variance = (plain**2 * share).sum()
    assert float((plain**4 * share).sum() / variance**2) == pytest.approx(2.7, abs=0.01)


def test_drawn_numbers_follow_it() -> None:
    bits = draw((123, 456), 1 << 20)
    z = normals(bits)
    value, _ = exact()
    assert set(z.unique().tolist()) <= set(value.tolist())
    assert abs(float(z.mean())) < 5e-3
    assert float(z.var()) == pytest.approx(1.0, abs=0.01)


def test_every_byte_is_uniform_and_neighbours_are_not_related() -> None:
    n = 1 << 20
    bits = draw((1, 2), n)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
        chi = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert 160 < chi < 370  # 255 degrees of freedom, 5 sigma
    z = normals(bits)
    for lag in (1, 2, 3, 16, 64, 256, 1024, 4096):
        for f in (lambda x: x, lambda x: x * x - 1):
            a, b = f(z[:-lag]), f(z[lag:])
            assert abs(float((a * b).mean() / (a * a).mean())) < 6 / n**0.5


def test_lanes_of_a_line_are_not_related() -> None:
    """The words of a line come from one hash: of each pair of places in it, normals, squares and cubes."""
    n = 1 << 20
    z = normals(draw((77, 88), n)).double().view(-1, 16)
    powers = torch.stack([z, (z**2 - 1) / 2**0.5, (z**3 - 3 * z) / 6**0.5, z.roll(1, 0)])
    for a in range(4):
        for b in range(a, 4):
            r = powers[a].T @ powers[b] / z.shape[0]
            if a == b or b < 3:  # a place and itself
                r.fill_diagonal_(0.0)
            assert float(r.abs().max()) < 6 / z.shape[0] ** 0.5
            assert 0.6 < float((r**2).mean()) * z.shape[0] < 1.4
    plain = (indices(torch.Size([n]), Place(0, n, n), CPU) >> 4).to(torch.int32) * 0x735A2D97  # the control: one multiply
    lanes = normals(plain.view(-1, 16) * torch.arange(1, 33, 2, dtype=torch.int32)).double()
    r = torch.corrcoef((lanes**2).T)
    assert float((r - torch.eye(16)).abs().max()) > 0.05


def test_streams_are_not_related() -> None:
    """Two words of a tensor, two tensors, two steps, two seeds: neither equal, nor shifted, nor correlated."""
    n = 1 << 18
    first = base_keys(7, 0, 0)
    z = normals(draw(step_keys(first, 5), n))  # type: ignore[arg-type]
    others = (
        step_keys(base_keys(7, 0, 1), 5), step_keys(base_keys(7, 1, 0), 5), step_keys(first, 6),
        step_keys(base_keys(8, 0, 0), 5), step_keys(base_keys(7 + (1 << 32), 0, 0), 5),
    )  # fmt: skip
    for keys in others:
        other = normals(draw(keys, n))  # type: ignore[arg-type]
        for lag in (0, 1, 2, 5):
            assert abs(float((z[: n - lag] * other[lag:]).mean())) < 6 / n**0.5
            assert float((z[: n - lag] == other[lag:]).float().mean()) < 0.01
    assert float((z * normals(draw(step_keys(first, 5), n))).mean()) > 0.9  # type: ignore[arg-type]  # the control


def test_one_bit_of_the_index_or_of_a_key_turns_half_of_the_word() -> None:
    n = 1 << 14
    index = indices(torch.Size([n]), Place(0, n, n), CPU)

    def turned(other: Tensor) -> float:
        x = words((3, 9), index) ^ other
        return float(sum(((x >> b) & 1).float().mean() for b in range(32)))

    for bit in (0, 7, 15, 16, 31, 32, 40):
        assert 15.5 < turned(words((3, 9), index ^ (1 << bit))) < 16.5
    for bit in (0, 13, 31):
        assert 15.0 < turned(words((3 ^ (1 << bit), 9), index)) < 17.0
    assert turned(words((3, 9), index)) == 0


def test_keys_as_tensors_are_those_of_numbers() -> None:
    for seed, tensor, word, step in ((0, 0, 0, 0), (-1, 5, 1, 77), (1 << 63, 1000, 3, (1 << 31) + 3)):
        base = base_keys(seed, tensor, word)
        keys = step_keys(base, step)
        assert all(0 <= k < 1 << 32 for k in (*base, *keys))
        held = step_keys(base, torch.tensor(step))
        assert [int(k) for k in held] == list(keys)
        assert torch.equal(draw(held, 100), draw(keys, 100))  # type: ignore[arg-type]
    assert base_keys(-1, 0, 0) == base_keys((1 << 64) - 1, 0, 0)


def test_places() -> None:
    whole = words((1, 2), indices(torch.Size([6, 10]), Place(0, 60, 60), CPU))
    piece = words((1, 2), indices(torch.Size([6, 3]), Place(4, 3, 10), CPU))
    assert torch.equal(piece, whole[:, 4:7])
    rows = words((1, 2), indices(torch.Size([2, 10]), Place(30, 20, 20), CPU))
    assert torch.equal(rows, whole[3:5])
    high = indices(torch.Size([3]), Place(2**32 - 1, 3, 3), CPU)
    assert high.tolist() == [2**32 - 1, 2**32, 2**32 + 1]
    assert not torch.equal(words((1, 2), high[1:]), words((1, 2), high[1:] - 2**32))


def test_uniform_numbers() -> None:
    bits = draw((5, 6), 1 << 18)
    low, high = uniform(bits, 0), uniform(bits, 1)
    for u in (low, high):
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        assert float(u.mean()) == pytest.approx(0.5, abs=5e-3)
    assert abs(float(((low - 0.5) * (high - 0.5)).mean())) < 1e-3
    assert torch.equal(torch.round(high * 65536).to(torch.int32) << 16 | torch.round(low * 65536).to(torch.int32), bits)


def test_golden_words() -> None:
    """They may never change: a run that is resumed would go on with other noise."""
    assert draw((123, 456), 4).tolist() == GOLDEN
    assert base_keys(42, 7, 1) == KEYS


GOLDEN = [737776630, 1602121665, 1150039203, 1021053498]
KEYS = (1771913784, 2069953545)
