"""The noise contract, version 1: seed, tensor name and element index give the noise, and nothing else does.

Noise is a pure function, so the same seed gives the same bytes with any number of threads or shards, on the CPU and
on the GPU, today and after an upgrade. A change to anything below is a new CONTRACT.

- generator: Philox4x32-10 (Salmon et al., SC 2011), key (k0, k1) from `key(seed, name)`.
- element e, row-major: block = e // BLOCK, r = e % BLOCK, word = r // LANES;
  counter = block * LANES + r % LANES, as (low 32 bits, high 32 bits, stream, 0).
- uniform: u = (word >> 8) * 2^-24 - 0.5, exact in float32, in [-0.5, 0.5); stream 0.
- normal: x = (word0 * 2^20 + (word1 >> 12) + 0.5) * 2^-52 with word0 from stream 0 and word1 from stream 1, through
  the inverse normal CDF (Wichura 1988, algorithm AS 241, PPND16) in float64, times 1/sqrt(12); float32 for all but
  float64 tensors.
- stochastic rounding: bits of stream 2.
- scale = lam * std, the product in float64, rounded to float32 for all but float64 tensors.
- w' = w + u * scale in float32 (float64 for float64 tensors), multiplied then added, never fused, rounded once.
- std: unbiased, over the whole tensor. With d = float64(w) - float64(first element), each block of BLOCK elements is
  padded with zeros and summed as ((row0 + row1) + (row2 + row3)) over its four rows of LANES, then by halves
  (t[:h] + t[h:2h], h = 512 ... 1), once for d and once for d * d. The block sums are added exactly (math.fsum):
  s1, s2; std = sqrt((s2 - s1 * s1 / n) / (n - 1)).
"""

import hashlib

CONTRACT = "surgery-noise-1"
BLOCK = 4096
LANES = 1024
NOISE_STREAM, SECOND_STREAM, ROUNDING_STREAM = 0, 1, 2
SAMPLED_BLOCKS = 16
"""What the noise did is measured on the first LANES elements of every 16th block: the sums cost more than the noise."""
UNIT_STD = 12**-0.5
"""Standard deviation of u, for both kinds of noise: that of the uniform distribution on [-0.5, 0.5)."""


def key(seed: int, name: str) -> tuple[int, int]:
    """Derive the Philox key of one tensor from the run's seed and the tensor's canonical name.

    Args:
        seed: in [0, 2^64).
        name: the tensor's name in the checkpoint file.
    Returns:
        (k0, k1), the low and high 32 bits of BLAKE2b-64 over contract, seed and name.
    """
    message = CONTRACT.encode() + seed.to_bytes(8, "little") + name.encode()
    digest = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    return digest & 0xFFFFFFFF, digest >> 32
