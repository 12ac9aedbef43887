"""rowwise.py on the GPU: one Triton program for each row of both passes, in float32, two sweeps forward, one back.

TRITON_INTERPRET=1 runs the same code on CPU tensors.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

_LIMIT = tl.constexpr(torch.finfo(torch.float32).max / 4)
_BLOCK = 4096  # columns at once


@triton.jit
def _base(x, row, inner, stride_n, stride_d):
    return x + (row // inner) * stride_n + (row % inner) * stride_d


@triton.jit
def _difference(log_p, log_q):
    """Return d: 0 where both are -inf, and finite, so that 0 * d is 0."""
    d = log_p - log_q
    both = (log_p == float("-inf")) & (log_q == float("-inf"))
    d = tl.where(both, 0.0, d)
    d = tl.where(d > _LIMIT, _LIMIT, d)
    return tl.where(d < -_LIMIT, -_LIMIT, d)


@triton.jit
def _add(x, m, total):
    """Take a block into the running maximum of each lane, and its sum of exp(x - m)."""
    higher = tl.maximum(m, x)
    at = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(m - at) + tl.exp(x - at)


@triton.jit
def _close(m, total):
    """Join the lanes: the row's maximum, and log sum exp(x - maximum)."""
    highest = tl.max(m, axis=0)
    return highest, tl.log(tl.sum(total * tl.exp(m - highest), axis=0))


@triton.jit
def _rows(
    a, b, out, n_rows, columns, inner, a_n, a_c, a_d, b_n, b_c, b_d, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a, b = _base(a, row, inner, a_n, a_d), _base(b, row, inner, b_n, b_d)
    lane = tl.arange(0, block).to(tl.int64)
    lowest = float("-inf")
    m_a = tl.full([block], lowest, tl.float32)
    m_b = tl.full([block], lowest, tl.float32)
    total_a = tl.zeros([block], tl.float32)
    total_b = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        c = start + lane
        x = tl.load(a + c * a_c, mask=c < columns, other=lowest).to(tl.float32)
        y = tl.load(b + c * b_c, mask=c < columns, other=lowest).to(tl.float32)
        m_a, total_a = _add(x, m_a, total_a)
        m_b, total_b = _add(y, m_b, total_b)
    m_a, log_a = _close(m_a, total_a)
    m_b, log_b = _close(m_b, total_b)
    mean_p = tl.zeros([block], tl.float32)
    s = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        c = start + lane
        x = tl.load(a + c * a_c, mask=c < columns, other=lowest).to(tl.float32) - m_a - log_a
        y = tl.load(b + c * b_c, mask=c < columns, other=lowest).to(tl.float32) - m_b - log_b
        d = _difference(x, y)
        p, q = tl.exp(x), tl.exp(y)
        mean_p += p * d
        s += (p - q) * d
    tl.store(out + row, m_a)
    tl.store(out + n_rows + row, log_a)
    tl.store(out + 2 * n_rows + row, m_b)
    tl.store(out + 3 * n_rows + row, log_b)
    tl.store(out + 4 * n_rows + row, tl.sum(mean_p, axis=0))
    tl.store(out + 5 * n_rows + row, tl.sum(s, axis=0) * 0.5)


@triton.jit
def _gradients(
    a, b, rows, weights, target, to_a, to_b, n_rows, columns, inner, a_n, a_c, a_d, b_n, b_c, b_d, to_a_n, to_a_c,
    to_a_d, to_b_n, to_b_c, to_b_d, has_target: tl.constexpr, has_a: tl.constexpr, has_b: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a, b = _base(a, row, inner, a_n, a_d), _base(b, row, inner, b_n, b_d)
    to_a, to_b = _base(to_a, row, inner, to_a_n, to_a_d), _base(to_b, row, inner, to_b_n, to_b_d)
    m_a, log_a = tl.load(rows + row), tl.load(rows + n_rows + row)
    m_b, log_b = tl.load(rows + 2 * n_rows + row), tl.load(rows + 3 * n_rows + row)
    mean_p, s = tl.load(rows + 4 * n_rows + row), tl.load(rows + 5 * n_rows + row)
    w, k = tl.load(weights + row), tl.load(weights + n_rows + row)
    shift_p, shift_q = w + k - k * mean_p, w + k + k * (mean_p - 2 * s)
    y_row = tl.full([], -1, tl.int64)
    if has_target:
        y_row = tl.load(target + row)
    lane = tl.arange(0, block).to(tl.int64)
    for start in range(0, columns, block):
        c = start + lane
        x = tl.load(a + c * a_c, mask=c < columns, other=0.0).to(tl.float32) - m_a - log_a
        y = tl.load(b + c * b_c, mask=c < columns, other=0.0).to(tl.float32) - m_b - log_b
        d = _difference(x, y)
        p, q = tl.exp(x), tl.exp(y)
        onehot = tl.where(c == y_row, w, 0.0)
        if has_a:
            tl.store(to_a + c * to_a_c, p * (k * d + shift_p) - k * q - onehot, mask=c < columns)
        if has_b:
            tl.store(to_b + c * to_b_c, q * (shift_q - k * d) - k * p - onehot, mask=c < columns)


def rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return max a, log sum exp(a - max a), the same of b, E_p d and S: float32, (6, N) or (6, N, D)."""
    out = torch.empty(6, len(a), *a.shape[2:], dtype=torch.float32, device=a.device)
    n = out[0].numel()
    if n:
        with _on(a):
            _rows[(n,)](a, b, out, n, a.shape[1], _inner(a), *_strides(a), *_strides(b), **_how(a))
    return out


def gradients(halves: Any, target: torch.Tensor | None, rows: torch.Tensor, weights: torch.Tensor, into: Any) -> None:
    """Fill into, where it is not None, with the gradients of the halves."""
    a, b = halves
    to_a, to_b = (a if grad is None else grad for a, grad in zip(halves, into, strict=True))
    n = rows[0].numel()
    target = rows if target is None else target.contiguous()
    if n:
        with _on(a):
            _gradients[(n,)](
                a, b, rows, weights.contiguous(), target, to_a, to_b, n, a.shape[1], _inner(a), *_strides(a),
                *_strides(b), *_strides(to_a), *_strides(to_b), has_target=target is not rows,
                has_a=into[0] is not None, has_b=into[1] is not None, **_how(a),
            )  # fmt: skip


def _inner(a: torch.Tensor) -> int:
    return a.shape[2] if a.dim() == 3 else 1


def _strides(a: torch.Tensor) -> tuple[int, int, int]:
    return a.stride(0), a.stride(1), a.stride(2) if a.dim() == 3 else 0


def _how(a: torch.Tensor) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(a.shape[1]))
    return {"block": block, "num_warps": 8 if block >= 2048 else 4}


def _on(a: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(a.device) if a.is_cuda else nullcontext()
