"""The functions of native.c, called through ctypes, which lets go of the GIL; `is_exact` tells whether to trust them.

They fill the arrays that they are given, as those of `plain` do, and with the same bits.
"""

import ctypes
import hashlib
from pathlib import Path
from types import ModuleType

import numpy as np

from surgery.noise import BLOCK

Place = tuple[int, int]
"""A file's descriptor, and where in it elements begin, in bytes."""
_CODES = {"F64": 0, "F32": 1, "F16": 2, "BF16": 3}
_WIDE = {8: _CODES["F64"], 4: _CODES["F32"]}
_INT, _LONG, _DOUBLE, _ARRAY = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_TYPES = {
    "moments": [_INT, _INT, _ARRAY, _LONG, _DOUBLE, _ARRAY],
    "summarize": [_INT, _INT, _ARRAY, _LONG, _DOUBLE, _ARRAY, _ARRAY, _ARRAY],
    "compare": [_INT, _INT, _ARRAY, _ARRAY, _LONG, _ARRAY, _ARRAY],
    "add_noise": [
        _INT, _INT, _ARRAY, _LONG, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, _DOUBLE, _INT, _INT, _ARRAY,
    ],
    "draw_mask": [_INT, ctypes.c_uint64, ctypes.c_uint32, _LONG, _ARRAY],
    "mix": [_INT, _INT, _ARRAY, _ARRAY, ctypes.c_uint64, ctypes.c_uint32, _DOUBLE, _LONG, _ARRAY],
    "gate": [_INT, _INT, _ARRAY, ctypes.c_uint64, ctypes.c_uint32, _DOUBLE, _LONG, _ARRAY],
    "summarize_file": [_INT, _INT, _INT, _LONG, _LONG, _DOUBLE, _ARRAY, _ARRAY, _ARRAY],
    "compare_files": [
        _INT, _INT, _INT, _LONG, _INT, _LONG, _LONG, _DOUBLE, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY,
    ],
}  # fmt: skip
_TELLING = ("summarize_file", "compare_files")
LEVELS = ("baseline", "AVX2", "AVX-512")
"""The instruction sets that the functions are compiled for; on other processors than x86-64 the first alone."""
_PROBE = "91f9799bc92e41bf5fcc7d77e3490930"


class Native:
    """The compiled kernels.

    Args:
        path: of the library.
        level: which of LEVELS to use; default: the highest that this processor has.
    Raises:
        OSError: the library cannot be loaded.
        AttributeError: it is not ours.
    """

    def __init__(self, path: Path, level: int | None = None) -> None:
        library = ctypes.CDLL(str(path))
        self.highest = int(library.surgery_level())
        self.level = self.highest if level is None else level
        for name, types in _TYPES.items():
            function = getattr(library, f"surgery_{name}")
            function.argtypes, function.restype = types, _INT if name in _TELLING else None
        self._library = library

    def moments(self, w: np.ndarray, dtype: str, shift: float, out: np.ndarray) -> None:
        self._library.surgery_moments(self.level, _CODES[dtype], _at(w), w.size, shift, _at(out))

    def summarize(
        self, w: np.ndarray, dtype: str, shift: float, out: np.ndarray, keys: np.ndarray, counts: np.ndarray
    ) -> None:
        arrays = _at(out), _at(keys), _at(counts)
        self._library.surgery_summarize(self.level, _CODES[dtype], _at(w), w.size, shift, *arrays)

    def compare(self, a: np.ndarray, b: np.ndarray, dtype: str, out: np.ndarray, counts: np.ndarray) -> None:
        arrays = _at(a), _at(b), a.size, _at(out), _at(counts)
        self._library.surgery_compare(self.level, _CODES[dtype], *arrays)

    def summarize_file(
        self, place: Place, n: int, dtype: str, shift: float, out: np.ndarray, keys: np.ndarray, counts: np.ndarray
    ) -> bool:
        """As `summarize`, of n elements of a file; tells whether they could be read."""
        arrays = _at(out), _at(keys), _at(counts)
        return bool(self._library.surgery_summarize_file(self.level, _CODES[dtype], *place, n, shift, *arrays))

    def compare_files(
        self,
        a: Place,
        b: Place,
        n: int,
        dtype: str,
        shift: float,
        sums: tuple[np.ndarray, np.ndarray, np.ndarray],
        pairs: tuple[np.ndarray, np.ndarray],
    ) -> bool:
        """As `summarize` of a, with `sums` to fill, and `compare`, with `pairs`, of n elements of two files."""
        arrays = map(_at, (*sums, *pairs))
        return bool(self._library.surgery_compare_files(self.level, _CODES[dtype], *a, *b, n, shift, *arrays))

    def add_noise(
        self,
        w: np.ndarray,
        dtype: str,
        first_block: int,
        key: tuple[int, int],
        scale: float,
        is_normal: bool,
        is_stochastic: bool,
        out: np.ndarray,
    ) -> None:
        noise = first_block, *key, scale, is_normal, is_stochastic
        self._library.surgery_add_noise(self.level, _CODES[dtype], _at(w), w.size, *noise, _at(out))

    def draw_mask(self, seed: int, threshold: int, out: np.ndarray) -> None:
        self._library.surgery_draw_mask(self.level, seed, threshold, out.size, _at(out))

    def mix(self, w: np.ndarray, w_pre: np.ndarray, seed: int, threshold: int, scale: float, out: np.ndarray) -> None:
        mask = seed, threshold, scale
        self._library.surgery_mix(self.level, _WIDE[w.itemsize], _at(w), _at(w_pre), *mask, w.size, _at(out))

    def gate(self, grad: np.ndarray, seed: int, threshold: int, scale: float, out: np.ndarray) -> None:
        mask = seed, threshold, scale
        self._library.surgery_gate(self.level, _WIDE[grad.itemsize], _at(grad), *mask, grad.size, _at(out))


def _at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def find() -> Path | None:
    """Return the library that setup.py builds beside this file, or None where there was no compiler."""
    return next((path for path in Path(__file__).parent.glob("_native.*") if path.suffix in (".so", ".pyd")), None)


def is_exact(kernels: ModuleType | Native) -> bool:
    """Tell whether kernels give the contract's bits for some of everything: flags for a compiler may have changed them.

    Takes 1 to 3 milliseconds in C.
    """
    digest = hashlib.blake2b(digest_size=16)
    pattern = (np.arange(BLOCK + 300, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.uint16)[::4].copy()
    for dtype, finite, kind in (("BF16", 0xBFFF, "u2"), ("F16", 0xBBFF, "u2"), ("F32", 0, "f4"), ("F64", 0, "f8")):
        w = pattern & np.uint16(finite) if finite else pattern.view(np.int16).astype(kind)
        for is_normal, is_stochastic in ((False, False), (True, True)):
            sums, noisy = np.empty((2, 4)), w.copy()
            kernels.add_noise(noisy, dtype, 15, (1, 2), float(np.float32(0.1)), is_normal, is_stochastic, sums)
            digest.update(noisy.tobytes() + sums.tobytes())
        moments, found, both = np.empty((2, 2)), np.empty((2, 2)), np.empty((2, 4))
        keys, counts, pairs = np.array([2**62, -(2**62)]), np.zeros(2, np.int64), np.zeros(3, np.int64)
        kernels.moments(w, dtype, 1.0, moments)
        kernels.summarize(pattern if finite else w, dtype, 1.0, found, keys, counts)
        kernels.compare(noisy, w, dtype, both, pairs)
        digest.update(b"".join(part.tobytes() for part in (moments, found, both, keys, counts, pairs)))
    for kind in ("f4", "f8"):
        w = pattern.view(np.int16).astype(kind)
        mixed, gated = np.empty_like(w), np.empty_like(w)
        kernels.mix(w, w[::-1].copy(), 3, 2**30, 4 / 3, mixed)
        kernels.gate(w, 3, 2**30, 4 / 3, gated)
        digest.update(mixed.tobytes() + gated.tobytes())
    return digest.hexdigest() == _PROBE
