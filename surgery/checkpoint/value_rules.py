"""Buffers told from their values, where nothing but a name says what a tensor is: masks, tables, vectors of length 1.

Rules are rare and sure: none holds for values that training leaves, nor for a few elements. A few values are read of
each tensor, and the rest of those that fit a rule.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from surgery.checkpoint.tensorfile import Tensor
from surgery.checkpoint.weight_file import WeightFile
from surgery.dtypes import storage, to_numbers
from surgery.errors import some
from surgery.escapes import get_logger
from surgery.roles import NAME, VALUE, Role

Read = Callable[[int, int], np.ndarray]
"""Return a tensor's elements from the first index to before the second, in float64."""

_log = get_logger(__name__)
_LEAST, _PIECE = 32, 1 << 18
_SAMPLE = 256
_PARAMETERS = re.compile(
    r"(?:weight|bias)(?:_[ih]h_l\d+(?:_reverse)?)?|gamma|beta|A_log|dt_bias|time_(?:decay|first|faaaa|ma[ax]\w*|mix_\w+)"
)
"""Last names of parameters, some of which models start in order."""


def find_suspects(
    tensors: Mapping[str, Sequence[Tensor]], roles: Mapping[str, Role], open_source: Callable[[str], WeightFile]
) -> dict[str, Role]:
    """Return the roles of tensors whose values are those of a buffer, and whose names alone told nothing of it.

    Args:
        tensors: those of floating point, by weight file.
        roles: as names and class have it.
        open_source: opens a weight file by its name.
    """
    found: dict[str, Role] = {}
    for file, all_of_it in tensors.items():
        asked = [t for t in all_of_it if is_asked(t.name, t.shape, roles[t.name])]
        if asked:
            source = open_source(file)
            try:
                judged = {t.name: judge(t.shape, _reader(source, t)) for t in asked}
            finally:
                source.close()
            found |= {name: Role(True, VALUE, what) for name, what in judged.items() if what}
    return found


def _reader(source: WeightFile, tensor: Tensor) -> Read:
    width = tensor.nbytes // tensor.size

    def read(start: int, stop: int) -> np.ndarray:
        data = bytearray((stop - start) * width)
        source.read_into(tensor, start * width, memoryview(data))
        return to_numbers(storage(memoryview(data), tensor.dtype), tensor.dtype)[0].astype(np.float64)

    return read


def warn_of_suspects(roles: Mapping[str, Role]) -> None:
    """Name what is left alone for its values: that is a guess."""
    left = [f"{name} ({role.what})" for name, role in roles.items() if role.known == VALUE and role.is_buffer]
    if left:
        _log.warning("taken for buffers by their values, and left alone: %s; --include NAME overrules", some(left))


def is_asked(name: str, shape: Sequence[int], role: Role) -> bool:
    """Tell whether a tensor's values are asked what it is."""
    is_open = role == Role(False, NAME) and not _PARAMETERS.fullmatch(name.rpartition(".")[2])
    return is_open and math.prod(shape) >= _LEAST


def judge(shape: Sequence[int], read: Read) -> str | None:
    """Say what a tensor of at least 32 elements is by its values; None if they are those of a parameter."""
    size = math.prod(shape)
    sample = read(0, min(size, _SAMPLE))
    if _is_binary(sample) and all(_is_binary(piece) for piece in _pieces(size, read)):
        return _mask(shape, read)
    if size != max(shape) or size > _PIECE:
        return None
    values = sample if size <= _SAMPLE else read(0, size)
    if not np.isfinite(values).all():
        return None
    return _table(values) or ("a vector of length 1" if _is_unit(values) else None)


def _pieces(size: int, read: Read) -> Iterator[np.ndarray]:
    return (read(start, min(start + _PIECE, size)) for start in range(0, size, _PIECE))


def _is_binary(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _mask(shape: Sequence[int], read: Read) -> str | None:
    """Leave out what is all 0 or all 1, and the identity, which parameters start from."""
    size = math.prod(shape)
    ones = sum(int(piece.sum()) for piece in _pieces(size, read))
    is_identity = len(shape) > 1 and shape[-1] == shape[-2] and ones * shape[-1] == size
    return None if ones in (0, size) or is_identity else "a mask: only 0 and 1"


def _table(values: np.ndarray) -> str | None:
    """Tell values in order: a table. Those that 16 bits made equal to the one before may be a few."""
    steps = np.diff(values)
    if not ((steps >= 0).all() or (steps <= 0).all()) or np.count_nonzero(steps) < 0.5 * steps.size:
        return None
    spread = np.ptp(values)
    is_even = np.allclose(values, np.linspace(values[0], values[-1], values.size), rtol=0, atol=1e-4 * spread)
    return "a table: in equal steps" if is_even else "a table: in order"


def _is_unit(values: np.ndarray) -> bool:
    return bool(abs(np.linalg.norm(values) - 1) < 1e-6)
