"""The noise contract: published test vectors, pinned values, and the kernels' words against the reference."""

import numpy as np
import pytest
import reference

from surgery.kernels import plain
from surgery.noise import key

# Random123, tests/kat_vectors, philox4x32 10
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(("counter", "k", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_reference_gives_the_published_vectors(counter, k, expected):
    assert tuple(reference.philox(np.array([counter], np.uint32), k)[0]) == expected


def test_kernel_gives_the_published_vector():
    assert tuple(plain.words(0, 1, 0, (0, 0))[::1024]) == KNOWN_ANSWERS["zeros"][2]


@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("block", [0, 1, 1023, 2**22 - 1, 2**22, 2**22 + 5, 2**40], ids=lambda b: f"block{b}")
def test_kernel_equals_reference(block, stream):
    k = reference.key(7, "a.weight")
    expected = reference.words(7, "a.weight", 4096, stream=stream, first=block * 4096)
    assert np.array_equal(plain.words(block, 1, stream, k), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("name", ["w", "", "encoder.layer.0.weight", "größe.权重", "x" * 10_000], ids=len)
def test_key_equals_reference(seed, name):
    assert key(seed, name) == reference.key(seed, name)


def test_key_and_words_are_pinned():
    """A change here breaks every recipe there is: it needs a new CONTRACT."""
    assert key(0, "embeddings.word_embeddings.weight") == (837310289, 4105233846)
    assert [int(w) for w in reference.words(0, "embeddings.word_embeddings.weight", 3)] == [
        411998317,
        4222997926,
        3488111050,
    ]
