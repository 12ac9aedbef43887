"""Statistics and differences of tensors, beside numpy in float64 and torch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.checkpoint.tensorfile import TensorFile
from surgery.dtypes import BITS, is_measurable, storage, to_numbers
from surgery.inspect import scan as scan_module
from surgery.inspect.scan import Measurement, Run, scan
from surgery.inspect.stats import Stats, merge_sums, pool_stats, stats_measurement
from surgery.inspect.tensor_diff import TensorDiff, diff_measurement
from surgery.kernels import backends, cpu, plain
from surgery.kernels.sums import compare, summarize
from surgery.noisytune import Moments, merge_blocks, pool

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOAT8 = {
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
INTS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
}
SIZES = [0, 1, 2, 4095, 4096, 4097, 10_000]


def draw(n: int, dtype: str, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1).to(
        FLOATS[dtype]
    )


def raw(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    return storage(memoryview(bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes())), dtype)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()


def stats_of(tensor: torch.Tensor, dtype: str) -> Stats:
    w = raw(tensor, dtype)
    first = float(tensor[0]) if tensor.numel() and math.isfinite(float(tensor[0])) else 0.0
    return merge_sums([summarize(w, dtype, first)] if w.size else [], w.size, first)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_stats_of_finite_elements(dtype: str, n: int) -> None:
    tensor = draw(n, dtype)
    found, x = stats_of(tensor, dtype), tensor.double().numpy()
    assert (found.nan, found.inf, found.moments.n) == (0, 0, n)
    assert (found.min, found.max) == (x.min(initial=math.inf), x.max(initial=-math.inf))
    assert found.moments.mean == pytest.approx(x.mean() if n else 0.0, rel=1e-12)
    assert found.moments.std == pytest.approx(x.std(ddof=1) if n > 1 else 0.0, rel=1e-12)


@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.parametrize("dtype", FLOATS)
def test_std_is_the_contracts_to_the_bit(dtype: str, n: int) -> None:
    tensor = draw(n, dtype)
    shift = float(tensor[0])
    contract = merge_blocks(cpu.moments(raw(tensor, dtype), dtype, shift), n, shift, what="")
    assert stats_of(tensor, dtype).moments == contract


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 9_999], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_are_counted_and_left_out(dtype: str, at: int) -> None:
    tensor = draw(10_000, dtype)
    for place, flaw in enumerate((math.nan, math.inf, -math.inf, -math.nan)):
        tensor[(at + place) % 10_000] = flaw
    found, x = stats_of(tensor, dtype), tensor.double().numpy()
    x = x[np.isfinite(x)]
    assert (found.nan, found.inf, found.moments.n) == (2, 2, 9_996)
    assert (found.min, found.max) == (x.min(), x.max())
    assert found.moments.mean == pytest.approx(x.mean(), rel=1e-12)
    assert found.moments.std == pytest.approx(x.std(ddof=1), rel=1e-12)


@pytest.mark.parametrize("flaw", [math.nan, -math.nan, math.inf, -math.inf], ids=["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_flaw_of_any_sign_is_found(dtype: str, flaw: float) -> None:
    tensor = draw(5_000, dtype)
    tensor[4_500] = flaw
    found = stats_of(tensor, dtype)
    assert (found.nan, found.inf) == (int(math.isnan(flaw)), int(math.isinf(flaw)))
    assert math.isfinite(found.moments.std)


@pytest.mark.parametrize("dtype", FLOATS)
def test_stats_where_nothing_is_finite(dtype: str) -> None:
    found = stats_of(torch.tensor([math.nan, math.inf], dtype=FLOATS[dtype]), dtype)
    assert found == Stats(Moments(0, 0.0, 0.0), math.inf, -math.inf, 1, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes_of_subnormals_zeros_and_the_largest(dtype: str) -> None:
    info = torch.finfo(FLOATS[dtype])
    tiny = 5e-324 if dtype == "F64" else info.tiny * info.eps
    assert tiny > 0
    found = stats_of(torch.tensor([tiny, -tiny, 0.0], dtype=FLOATS[dtype]), dtype)
    assert (found.min, found.max) == (-tiny, tiny)
    largest = stats_of(torch.tensor([info.max, info.min], dtype=FLOATS[dtype]), dtype)
    assert (largest.min, largest.max, largest.nan, largest.inf) == (info.min, info.max, 0, 0)
    zero = stats_of(torch.tensor([-0.0], dtype=FLOATS[dtype]), dtype)
    assert str(zero.min) == "0.0"


def test_spread_that_overflows_is_nan() -> None:
    found = stats_of(torch.tensor([1e300, -1e300], dtype=torch.float64), "F64")
    assert math.isnan(found.moments.std)
    assert found.max == 1e300


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_values_are_torchs(dtype: str) -> None:
    code = np.arange(256, dtype=np.uint8)
    ours, wide = to_numbers(code, dtype)
    theirs = torch.from_numpy(code).view(FLOAT8[dtype]).float().numpy()
    assert wide == "F32"
    np.testing.assert_array_equal(ours, theirs)
    assert (np.signbit(ours) == np.signbit(theirs))[~np.isnan(ours)].all()


def test_every_dtype_is_measured_or_known_not_to_be() -> None:
    assert {dtype for dtype in BITS if not is_measurable(dtype)} == {"F4", "F6_E2M3", "F6_E3M2", "C64"}


def scanned(path: Path, *others: Path, workers: int = 2) -> dict[str, Stats | TensorDiff]:
    """Measure the tensors of a file, or compare them with those of another."""
    files = [TensorFile(p, label=str(p)) for p in (path, *others)]
    places = [{tensor.name: (file, tensor) for tensor in file.header.tensors} for file in files]
    jobs = {
        name: diff_measurement(places[0][name], places[1][name]) if others else stats_measurement(*places[0][name])
        for name in places[0]
    }
    read: list[int] = []
    scan(jobs.values(), workers=workers, on_bytes=read.append)
    for file in files:
        file.close()
    assert sum(read) == sum(tensor.nbytes for side in places for _, tensor in side.values())
    return {name: job.result for name, job in jobs.items()}


@pytest.mark.parametrize("dtype", [*FLOAT8, *INTS])
def test_stats_of_other_dtypes(dtype: str, tmp_path: Path) -> None:
    torch_dtype = (FLOAT8 | INTS)[dtype]
    code = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4096 * 8, dtype=np.uint8))
    tensor = code.remainder(2).bool() if dtype == "BOOL" else code.view(torch_dtype)
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    x = (tensor.float() if dtype in FLOAT8 else tensor).to(torch.float64).numpy()
    finite = x[np.isfinite(x)]
    found = scanned(tmp_path / "w.safetensors")["w"]
    assert (found.nan, found.inf) == (np.isnan(x).sum(), np.isinf(x).sum())
    assert (found.min, found.max) == (finite.min(), finite.max())
    assert found.moments.mean == pytest.approx(finite.mean(), rel=1e-9)
    assert found.moments.std == pytest.approx(finite.std(ddof=1), rel=1e-9)


def reference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """Return max |d|, rms d and cosine."""
    x, y = a.double(), b.double()
    d = y - x
    return d.abs().max().item(), d.square().mean().sqrt().item(), torch.nn.functional.cosine_similarity(x, y, 0).item()


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_is_compared_in_any_two_dtypes(dtype: str, to: str, tmp_path: Path) -> None:
    a, b = draw(300_000, dtype), draw(300_000, dtype, seed=1)
    b = torch.where(torch.arange(300_000) % 3 == 0, a, b).to(FLOATS[to])
    save_file({"w": a}, tmp_path / "a.safetensors")
    save_file({"w": b}, tmp_path / "b.safetensors")
    found = scanned(tmp_path / "a.safetensors", tmp_path / "b.safetensors")["w"]
    most, rms, cosine = reference(a, b)
    assert found.max_d == most
    assert found.rms == pytest.approx(rms, rel=1e-12)
    assert found.cosine == pytest.approx(cosine, abs=1e-12)
    assert found.changed == (a.double() != b.double()).sum()
    assert found.rms_over_std == pytest.approx(rms / a.double().std().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_pair(dtype: str) -> None:
    w = raw(draw(5_000, dtype), dtype)
    found = compare(w, w.copy(), dtype)
    assert (found.changed, found.broken, found.skipped) == (0, 0, 0)
    assert (found.blocks[:, [0, 3]] == 0).all()
    assert (found.blocks[:, 1] == found.blocks[:, 2]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_pairs_that_are_not_finite_are_counted_and_left_out(dtype: str) -> None:
    a, b = draw(5_000, dtype), draw(5_000, dtype, seed=1)
    a[7] = b[7] = math.nan  # equal
    a[8], b[4_999] = math.inf, math.nan
    found = compare(raw(a, dtype), raw(b, dtype), dtype)
    assert found.changed == np.count_nonzero(bits(a) != bits(b))
    assert (found.broken, found.skipped) == (2, 3)
    both = torch.isfinite(a) & torch.isfinite(b)
    most, _, _ = reference(a[both], b[both])
    assert found.blocks[:, 3].max() == most
    assert found.blocks[:, 0].sum() == pytest.approx((b[both].double() - a[both].double()).square().sum().item())


def test_cosine_of_opposites_and_of_nothing() -> None:
    assert TensorDiff(2, 0, 2, sum_d2=8.0, sum_a2=2.0, sum_b2=2.0).cosine == pytest.approx(-1)
    assert TensorDiff(2, 0, 2, sum_d2=2.0, sum_a2=0.0, sum_b2=2.0).cosine is None
    assert TensorDiff(0).cosine is None


def test_change_without_spread_is_infinitely_far() -> None:
    stats = Stats(Moments(2, 1.0, 0.0), 1.0, 1.0, 0, 0)
    assert TensorDiff(1, 0, 2, sum_d2=1.0, stats=stats).rms_over_std == math.inf
    assert TensorDiff(0, 0, 2, stats=stats).rms_over_std == 0.0


@settings(max_examples=25, deadline=None)
@given(
    workers=st.integers(1, 5), piece=st.sampled_from([8192, 32768, 65536, 1 << 20]), n=st.integers(1, 40_000),
    dtype=st.sampled_from([*FLOATS]),
)  # fmt: skip
def test_results_do_not_depend_on_pieces_and_threads(workers, piece, n, dtype, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    for name, seed in (("a", 0), ("b", 1)):
        save_file({"w": draw(n, dtype, seed), "v": draw(3, dtype, seed)}, folder / f"{name}.safetensors")
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_PIECE", max(piece, 4096 * BITS[dtype] // 8))
        found = scanned(paths[0], workers=workers), scanned(*paths, workers=workers)
    assert found == (scanned(paths[0], workers=1), scanned(*paths, workers=1))


def test_results_do_not_depend_on_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        drawn = {dtype: draw(100_000, dtype, seed) for dtype in FLOATS}
        save_file(drawn, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    expected = scanned(paths[0]), scanned(*paths)
    monkeypatch.setattr(TensorFile, "descriptor", None)
    assert (scanned(paths[0]), scanned(*paths)) == expected
    monkeypatch.setattr(backends, "on_cpu", lambda: plain)
    assert (scanned(paths[0]), scanned(*paths)) == expected


def test_pool_is_the_stats_of_all_elements_together() -> None:
    parts = [draw(n, "F32", seed=n) for n in (10, 5_000)]
    pooled = pool_stats([stats_of(part, "F32") for part in parts])
    x = torch.cat(parts).double().numpy()
    assert (pooled.min, pooled.max, pooled.moments.n) == (x.min(), x.max(), 5_010)
    assert pooled.moments.std == pytest.approx(x.std(ddof=1), rel=1e-12)
    assert pool_stats([]).moments == pool([])


def test_error_in_a_thread_is_raised(tmp_path: Path) -> None:
    save_file({"w": draw(1 << 20, "F32")}, tmp_path / "w.safetensors")
    file = TensorFile(tmp_path / "w.safetensors", label="w")
    job = stats_measurement(file, file.header.tensors[0])
    (tmp_path / "w.safetensors").write_bytes(b"cut")
    with pytest.raises(Exception, match="It changed while it was read; run again"):
        scan([job], workers=2, on_bytes=lambda _: None)
    file.close()


def test_error_in_one_thread_stops_the_others(tmp_path: Path) -> None:
    save_file({"w": draw(4096, "F32")}, tmp_path / "w.safetensors")
    file = TensorFile(tmp_path / "w.safetensors", label="w")
    done: list[int] = []

    def measure(_: list[Run]) -> None:
        done.append(1)
        if len(done) == 3:
            raise ValueError("third")

    jobs = [Measurement([(file, file.header.tensors[0])], measure, merge=len) for _ in range(20_000)]
    with pytest.raises(ValueError, match="third"):
        scan(jobs, workers=2, on_bytes=lambda _: None)
    file.close()
    assert len(done) < 10_000
