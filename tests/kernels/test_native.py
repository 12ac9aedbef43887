"""The compiled kernels against NumPy's, bit for bit: every dtype, noise and rounding, instruction set and compiler."""

import os
import shutil
import subprocess
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from surgery.kernels import backends, cpu, native, plain
from surgery.kernels.native import LEVELS, Native
from surgery.kernels.sums import compare_files, summarize_file
from surgery.noise import BLOCK

SOURCE = Path(native.__file__).with_name("native.c")
EXACT = ("-ffp-contract=off", "-fno-math-errno")
BUILDS = {
    "cc -O0": ("cc", "-O0", *EXACT),
    "cc -O3": ("cc", "-O3", *EXACT),
    "clang -O0": ("clang", "-O0", *EXACT),
    "clang -O3": ("clang", "-O3", *EXACT),
}
SIZES = (1, 2, 1023, 1024, 1025, 4095, 4096, 4097, 70_000)
NOISES = ((0, 0.0123), (15, 1e-9), (2**22 - 1, 0.15), (2**33, 3e4))
PATTERN = {8: np.uint64, 4: np.uint32, 2: np.uint16}


def build(command: tuple[str, ...], folder: Path) -> Path:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    path = folder / "kernels.so"
    for step in (
        (*command, "-fPIC", "-c", str(SOURCE), "-o", f"{path}.o"),
        ("cc", "-shared", f"{path}.o", "-o", str(path)),
    ):
        subprocess.run(step, check=True)
    return path


def weights(dtype: str, n: int) -> np.ndarray:
    """Draw finite storage with subnormals and both zeros."""
    x = np.random.default_rng(n).normal(0, 0.05, n)
    x[1::7] *= 1e-5
    x[2::11] *= 1e-8
    x[3::97] = -0.0
    if dtype == "F64":
        return x
    if dtype == "F32":
        return x.astype(np.float32)
    return x.astype(np.float16).view(np.uint16) if dtype == "F16" else plain.narrow(x.astype(np.float32), "BF16")


def wild(dtype: str, n: int) -> np.ndarray:
    """Draw bits: NaN and Inf among them, and values of any size."""
    w = weights(dtype, n)
    bits = w.view(PATTERN[w.itemsize])
    bits[::3] = np.random.default_rng(n).integers(0, 2 ** (8 * w.itemsize) - 1, bits[::3].size, np.uint64)
    inf = plain.INF[dtype]
    bits[: min(n, 4)] = np.array([inf, inf + 1, 0, 5], np.uint64)[: min(n, 4)]
    return w


@pytest.fixture(
    scope="module", params=["installed", *(pytest.param(b, marks=[pytest.mark.sweep] * ("3" in b)) for b in BUILDS)]
)
def library(request, tmp_path_factory) -> Path:
    if request.param != "installed":
        return build(BUILDS[request.param], tmp_path_factory.mktemp("build"))
    path = native.find()
    if path is None:
        pytest.skip("model-surgery was installed without a C compiler")
    return path


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def kernels(library, request) -> Native:
    kernels = Native(library, request.param)
    if request.param > kernels.highest:
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    return kernels


def add_noise(kernels, dtype: str, n: int, turn: int, is_normal: bool, is_stochastic: bool) -> tuple[bytes, bytes]:
    first_block, scale = NOISES[turn % len(NOISES)]
    noisy, out = weights(dtype, n), np.empty((-(-n // BLOCK), 4))
    scale = scale if dtype == "F64" else float(np.float32(scale))
    kernels.add_noise(noisy, dtype, first_block, (123456789, 3456789012), scale, is_normal, is_stochastic, out)
    return noisy.tobytes(), out.tobytes()


def sums(kernels, dtype: str, n: int, make) -> list[bytes]:
    w, v, blocks = make(dtype, n), weights(dtype, n), -(-n // BLOCK)
    moments, found, pairs = np.empty((blocks, 2)), np.empty((blocks, 2)), np.empty((blocks, 4))
    largest = np.iinfo(f"i{w.itemsize}").max
    keys, counts, changes = np.array([largest, ~largest]), np.zeros(2, np.int64), np.zeros(3, np.int64)
    kernels.moments(v, dtype, 0.25, moments)
    kernels.summarize(w, dtype, 0.25, found, keys, counts)
    kernels.compare(v, w, dtype, pairs, changes)
    return [part.tobytes() for part in (moments, found, pairs, keys, counts, changes)]


NOISE_CASES = [
    (*case, turn, *how)
    for turn, case in enumerate(product(cpu.STORAGE, SIZES))
    for turn, how in enumerate(product((False, True), (False, True)), turn)
]
SUM_CASES = list(product(cpu.STORAGE, SIZES, (weights, wild)))
plain_noise, plain_sums = cache(partial(add_noise, plain)), cache(partial(sums, plain))


def test_noise_has_the_bits_of_numpy(kernels):
    assert [case for case in NOISE_CASES if add_noise(kernels, *case) != plain_noise(*case)] == []


def test_sums_have_the_bits_of_numpy(kernels):
    assert [case for case in SUM_CASES if sums(kernels, *case) != plain_sums(*case)] == []


def open_files(folder: Path, *contents: bytes) -> list[BinaryIO]:
    for i, content in enumerate(contents):
        (folder / f"{i}").write_bytes(content)
    return [(folder / f"{i}").open("rb", buffering=0) for i in range(len(contents))]


def test_sums_of_files_have_the_bits_of_numpy(kernels, tmp_path):
    for dtype, n in product(cpu.STORAGE, (1, 4097, 200_001)):
        a, b = wild(dtype, n), weights(dtype, n)
        b[::5] = a[::5]
        blocks = -(-n // BLOCK)
        alone, sums, expected = ((np.zeros((blocks, 2)), np.array([9, -9]), np.zeros(2, np.int64)) for _ in range(3))
        pairs, expected_pairs = ((np.zeros((blocks, 4)), np.zeros(3, np.int64)) for _ in range(2))
        plain.summarize(a, dtype, 0.5, *expected)
        plain.compare(a, b, dtype, *expected_pairs)
        one, other = open_files(tmp_path, b"odd" + a.tobytes(), b.tobytes())
        with one, other:
            assert kernels.summarize_file((one.fileno(), 3), n, dtype, 0.5, *alone)
            assert kernels.compare_files((one.fileno(), 3), (other.fileno(), 0), n, dtype, 0.5, sums, pairs)
        for found in (alone, sums):
            assert [part.tobytes() for part in found] == [part.tobytes() for part in expected]
        assert [part.tobytes() for part in pairs] == [part.tobytes() for part in expected_pairs]


def test_sums_of_a_file_that_is_too_short_are_none(tmp_path):
    if not isinstance(backends.on_cpu(), Native):
        pytest.skip("needs the compiled kernels")
    short, long = open_files(tmp_path, bytes(100_000), bytes(200_000))
    with short, long:
        assert summarize_file((long.fileno(), 0), 50_000, "F32", 0.0)
        assert summarize_file((short.fileno(), 0), 50_000, "F32", 0.0) is None
        assert summarize_file((short.fileno(), 200_000), 1, "F32", 0.0) is None
        for a, b in ((short, long), (long, short)):
            assert compare_files((a.fileno(), 0), (b.fileno(), 0), 50_000, "F32", 0.0) is None
        closed = os.dup(long.fileno())
    os.close(closed)
    assert summarize_file((closed, 0), 1, "F32", 0.0) is None


def masked(kernels, kind: str, n: int, threshold: int) -> list[bytes]:
    w, w_pre = np.random.default_rng(n).standard_normal((2, n)).astype(kind)
    mask, mixed, gated = np.empty(n, bool), np.empty_like(w), np.empty_like(w)
    kernels.draw_mask(2**64 - n, threshold, mask)
    kernels.mix(w, w_pre, 2**64 - n, threshold, 10 / 3, mixed)
    kernels.gate(w, 2**64 - n, threshold, 10 / 3, gated)
    return [part.tobytes() for part in (mask, mixed, gated)]


def test_masks_have_the_bits_of_numpy(kernels):
    cases = list(product(("f4", "f8"), SIZES, (0, 2**30, 2**32 - 1)))
    assert [case for case in cases if masked(kernels, *case) != masked(plain, *case)] == []


def test_storage_need_not_be_aligned(kernels):
    for dtype in cpu.STORAGE:
        w = weights(dtype, 5000)
        room = np.zeros(w.nbytes + 1, np.uint8)
        shifted = room[1:].view(w.dtype)
        results = []
        for where in (w.copy(), shifted):
            where[:] = w
            out = np.empty((2, 4))
            kernels.add_noise(where, dtype, 0, (1, 2), 0.125, False, False, out)
            results.append((where.tobytes(), out.tobytes()))
        assert results[0] == results[1]
    for kind in ("f4", "f8"):
        room = np.zeros((5000 + 1) * np.dtype(kind).itemsize, np.uint8)
        w, out, shifted = (
            np.arange(5000, dtype=kind),
            np.empty(5000, kind),
            room[1 : 1 - np.dtype(kind).itemsize].view(kind),
        )
        kernels.mix(w, -w, 1, 2**31, 2.0, out)
        shifted[:] = w
        kernels.mix(shifted, -w, 1, 2**31, 2.0, shifted)
        assert shifted.tobytes() == out.tobytes()


def test_both_pass_the_probe(kernels):
    assert native.is_exact(kernels)
    assert native.is_exact(plain)


@pytest.fixture
def afresh():
    """Choose the kernels anew, in the test and after it."""
    backends._on_cpu.cache_clear()
    yield
    backends._on_cpu.cache_clear()


@pytest.mark.usefixtures("afresh")
def test_inexact_build_gives_way_to_numpy(tmp_path, monkeypatch, caplog):
    if native.find() is None or not Native(native.find()).highest:
        pytest.skip("needs a processor with FMA")
    path = build(("cc", "-O2", "-ffast-math", "-mfma"), tmp_path)
    monkeypatch.setattr(native, "find", lambda: path)
    assert backends.on_cpu() is plain
    assert backends.on_cpu() is plain
    (record,) = caplog.records
    assert f"got {path}, of another version or built with flags that change the bits." in record.getMessage()


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("content", [b"", b"\x7fELF", None], ids=["empty", "cut", "none"])
def test_missing_or_foreign_library_gives_way_to_numpy(content, tmp_path, monkeypatch, caplog):
    path = tmp_path / "_native.abi3.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(native, "find", lambda: path if content is not None else None)
    assert backends.on_cpu() is plain
    (record,) = caplog.records
    assert record.getMessage().startswith("kernels: expected a compiled library, got ")
    assert "install a C compiler" in record.getMessage()
