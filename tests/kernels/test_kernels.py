"""The CPU kernels, in C and in NumPy, bit for bit, against the reference and torch's own rounding."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch

from surgery.kernels import backends, cpu, masks, native, plain
from surgery.kernels.plain import narrow, narrow_stochastic, widen
from surgery.noise import BLOCK
from surgery.noisytune import merge_blocks

SIZES = [1, 2, 1023, 1024, 1025, 4095, 4096, 4097, 70_000]
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(autouse=True, params=["C", "NumPy"])
def kernels(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(backends, "on_cpu", lambda: plain)
    elif not native.find():
        pytest.skip("model-surgery was installed without a C compiler")


def storage(values: np.ndarray, dtype: str) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[dtype])
    return (tensor.view(torch.uint16) if dtype in ("F16", "BF16") else tensor).numpy().copy()


def values(w: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(w.copy())
    return tensor.view(TORCH[dtype]) if dtype in ("F16", "BF16") else tensor


def weights(n: int, dtype: str, *, seed: int = 0) -> np.ndarray:
    return storage(np.random.default_rng(seed).normal(0.01, 0.05, n), dtype)


def expected_bits(w: np.ndarray, dtype: str, u: np.ndarray, scale: float) -> np.ndarray:
    """w + u * scale, multiplied then added, rounded once by torch."""
    if dtype == "F64":
        return w + u * scale
    wide = values(w, dtype).to(torch.float32).numpy()
    summed = wide + u.astype(np.float32) * np.float32(scale)
    return storage(summed, dtype)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("n", SIZES)
def test_add_noise_equals_reference(dtype, n):
    w = weights(n, dtype)
    out = w.copy()
    scale = 0.0123456789 if dtype == "F64" else float(np.float32(0.0123456789))
    cpu.add_noise(out, dtype, first_block=0, key=reference.key(3, "w"), scale=scale)
    assert np.array_equal(out, expected_bits(w, dtype, reference.uniform(3, "w", n), scale))
    assert n < 10 or not np.array_equal(out, w)


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_add_noise_normal_matches_scipy(dtype):
    n = 300_000
    out = storage(np.zeros(n), dtype)
    cpu.add_noise(out, dtype, first_block=0, key=reference.key(3, "w"), scale=1.0, is_normal=True)
    expected = reference.normal(3, "w", n)
    tolerance = 1e-14 if dtype == "F64" else 2.0**-24
    assert np.max(np.abs(out - expected) / np.abs(expected)) <= tolerance
    assert np.max(np.abs(expected)) * math.sqrt(12) > 4, "the tails were not reached"


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("is_normal", "is_stochastic"), [(False, False), (True, False), (False, True)])
def test_add_noise_does_not_depend_on_the_cut(dtype, is_normal, is_stochastic):
    w = weights(30_000, dtype)
    settings = {"key": (5, 6), "scale": 0.01, "is_normal": is_normal, "is_stochastic": is_stochastic}
    whole, cut = w.copy(), w.copy()
    sums = cpu.add_noise(whole, dtype, first_block=0, **settings)
    edges = [0, 4096, 5 * 4096, 6 * 4096, 30_000]
    parts = [cpu.add_noise(cut[a:b], dtype, first_block=a // 4096, **settings) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(whole, cut)
    assert np.array_equal(sums, np.concatenate(parts))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_widen_is_exact_for_every_finite_half(dtype):
    half = np.arange(65536, dtype=np.uint16)
    half = half[np.isfinite(values(half, dtype).to(torch.float32).numpy())]
    wide = widen(half, dtype)
    expected = values(half, dtype).to(torch.float32).numpy()
    assert np.array_equal(wide.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_rounds_as_torch_does(dtype):
    rng = np.random.default_rng(1)
    wide = (rng.normal(size=500_000) * 10.0 ** rng.integers(-9, 5, 500_000)).astype(np.float32)
    ties = np.arange(0, 65536, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)
    wide = np.concatenate([wide, ties.view(np.float32), np.float32([0.0, -0.0, 65519.9, 65520.0, 1e-8, 6e-8, 3e38])])
    wide = wide[np.isfinite(wide)]
    assert np.array_equal(narrow(wide, dtype), storage(wide, dtype))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("value", [1.0003, -0.7123, 3.1e-6, -2e-7, 1.99999])
def test_narrow_stochastic_keeps_the_mean(dtype, value):
    n = 400_000
    wide = np.full(n, value, np.float32)
    half = narrow_stochastic(wide, dtype, reference.words(0, "r", n, stream=2))
    rounded = values(half, dtype).double()
    distinct = rounded.unique()
    assert 1 <= len(distinct) <= 2
    spacing = (distinct.max() - distinct.min()).item()
    assert abs(rounded.mean().item() - float(wide[0])) <= 5 * spacing / math.sqrt(n)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("n", SIZES)
def test_moments_are_the_contracts_to_the_bit(dtype, n):
    w = weights(n, dtype)
    x = values(w, dtype).double().numpy()
    d = np.zeros(-(-n // 4096) * 4096)
    d[:n] = x - x[0]
    for column, terms in enumerate((d, d * d)):
        rows = terms.reshape(-1, 4, 1024)
        t = (rows[:, 0] + rows[:, 1]) + (rows[:, 2] + rows[:, 3])
        for h in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
            t = t[:, :h] + t[:, h : 2 * h]
        assert np.array_equal(cpu.moments(w, dtype, float(x[0]))[:, column], t[:, 0])


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("mean", [0.0, 1.0, -300.0])
def test_std_equals_numpy(dtype, mean):
    w = storage(np.random.default_rng(2).normal(mean, 0.5, 200_001), dtype)
    x = values(w, dtype).double().numpy()
    moments = merge_blocks(cpu.moments(w, dtype, float(x[0])), x.size, float(x[0]), what="w")
    assert moments.std == pytest.approx(np.std(x, ddof=1), rel=1e-12)
    assert moments.mean == pytest.approx(np.mean(x), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 5, 4999])
def test_moments_are_not_finite_if_the_input_is_not(dtype, bad, position):
    x = np.random.default_rng(2).normal(size=5000)
    x[position] = bad
    w = storage(x, dtype)
    assert not np.isfinite(cpu.moments(w, dtype, cpu.to_float(w[:1], dtype))).all()


@pytest.mark.parametrize("dtype", TORCH)
def test_add_noise_reports_overflow(dtype):
    largest = float(torch.finfo(TORCH[dtype]).max)
    w = storage(np.full(5000, largest), dtype)
    sums = cpu.add_noise(w, dtype, first_block=0, key=(1, 2), scale=largest / 4)
    assert sums[0, 3] > 0
    assert sums[1, 3] > 0


@pytest.mark.parametrize("dtype", TORCH)
def test_add_noise_measures_its_effect(dtype):
    n, scale = 4096 * 40, 0.003
    w = storage(np.random.default_rng(4).normal(0, 0.05, n), dtype)
    old = values(w, dtype).double().numpy()
    sums = cpu.add_noise(w, dtype, first_block=0, key=reference.key(0, "w"), scale=scale)
    drawn = reference.uniform(0, "w", n) * scale
    sampled = (np.arange(n) // 4096 % 16 == 0) & (np.arange(n) % 4096 < 1024)
    change = values(w, dtype).double().numpy() - old
    expected = [np.sum((a * b)[sampled]) for a, b in ((change, drawn), (drawn, drawn), (change, change))]
    assert np.allclose(sums.sum(0)[:3], expected, rtol=1e-5)


# -- Mixout's masks


def test_masks_are_those_of_numpys_own_generator():
    """The generator j of block b starts from (seed, 8 b + j, golden ratio), and its first 18 numbers are left out."""
    seed, size = 2**63 + 5, 3 * BLOCK - 7
    words = np.empty((3, BLOCK // 16, 8), np.uint64)
    generator = np.random.SFC64()
    for block, stream in np.ndindex(3, 8):
        state = np.array([seed, 8 * block + stream, 0x9E3779B97F4A7C15, 1], np.uint64)
        generator.state = generator.state | {"state": {"state": state}, "has_uint32": 0}
        words[block, :, stream] = generator.random_raw(18 + BLOCK // 16)[18:]
    for share in (0.0, 0.1, 0.5, 0.9):
        expected = words.reshape(-1).view(np.uint32)[:size] < round(share * 2**32)
        assert (masks.draw_mask(seed, share, size) == expected).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_masks_are_independent_with_the_share_that_is_asked_for(share):
    n = 64 * BLOCK
    drawn = np.stack([masks.draw_mask(seed, share, n) for seed in (0, 1, 2, 2**32, 2**62)]).astype(float) - share
    z = drawn / math.sqrt(share * (1 - share))
    assert np.abs(z.mean(1)).max() < 4.5 / math.sqrt(n)
    seeds = z @ z.T / n
    assert np.abs(seeds - np.diag(np.diag(seeds))).max() < 4.5 / math.sqrt(n)
    for lag in (1, 2, 8, 15, 16, 17, 32, BLOCK, 2 * BLOCK):
        assert abs(z[0, lag:] @ z[0, :-lag]) / n < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("p", [0.1, 0.7, 0.9, 1.0])
@np.errstate(invalid="ignore")
def test_mix_and_gate_are_the_formula(kind, p):
    w, w_pre = np.random.default_rng(0).standard_normal((2, 10_000)).astype(kind)
    w[:3], w_pre[2] = [np.nan, np.inf, 1.0], -0.0
    scale, mixed, gated = 1 / (1 - p) if p < 1 else 0.0, np.empty_like(w), np.empty_like(w)
    how = {"seed": 3, "share": 1 - p, "scale": scale}
    masks.mix(w, w_pre, **how, out=mixed)
    masks.gate(w, **how, out=gated)
    mask = masks.draw_mask(3, 1 - p, w.size)
    assert mixed[~mask].tobytes() == w_pre[~mask].tobytes()
    assert gated[~mask].tobytes() == np.zeros_like(w[~mask]).tobytes()
    wide, wide_pre = w.astype(np.longdouble), w_pre.astype(np.longdouble)
    largest = np.maximum(np.abs(wide), np.abs(wide_pre)) * max(scale, 1)
    error = np.abs(mixed - (wide_pre + (wide - wide_pre) * mask * scale)) / largest
    assert np.nanmax(error[3:]) < 4 * np.finfo(kind).eps
    assert np.nanmax(np.abs(gated - wide * mask * scale)[3:] / largest[3:]) < np.finfo(kind).eps
