"""The noise contract and the paper's formula again, in plain numpy, sharing no code with surgery."""

import hashlib

import numpy as np

CONTRACT = b"surgery-noise-1"


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 as Salmon et al. (SC 2011) write it. counter: uint32, shape (n, 4); returns the same shape."""
    c = counter.astype(np.uint64).T.copy()
    k0, k1 = key
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = np.stack(
            [
                (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
                p1 & mask,
                (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
                p0 & mask,
            ]
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c.T.astype(np.uint32)


def key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(CONTRACT + seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words(seed: int, name: str, n: int, *, stream: int = 0, first: int = 0) -> np.ndarray:
    """Words of elements first ... first + n - 1, one at a time by the contract's index arithmetic."""
    e = np.arange(first, first + n, dtype=np.uint64)
    block, r = e // 4096, e % 4096
    word, counter = r // 1024, block * 1024 + r % 1024
    counters = np.stack(
        [counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32), np.full_like(e, stream), np.zeros_like(e)], axis=1
    )
    return philox(counters, key(seed, name))[np.arange(n), word.astype(np.int64)]


def uniform(seed: int, name: str, n: int, *, first: int = 0) -> np.ndarray:
    """u in float64: exact, since the contract's float32 arithmetic is."""
    return (words(seed, name, n, first=first) >> 8).astype(np.float64) * 2.0**-24 - 0.5


def normal(seed: int, name: str, n: int) -> np.ndarray:
    """u for noise="normal" in float64, by scipy's inverse normal CDF."""
    from scipy.special import ndtri

    high, low = words(seed, name, n).astype(np.uint64), words(seed, name, n, stream=1).astype(np.uint64)
    x = ((high << np.uint64(20)) + (low >> np.uint64(12))).astype(np.float64) + 0.5
    return ndtri(x * 2.0**-52) / np.sqrt(12.0)
