"""Triton kernels of rowwise.py: one program for each row of both passes, in float32; two sweeps forward, one backward.

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
def _row_pointer(x, row, inner, stride_n, stride_d):
    return x + (row // inner) * stride_n + (row % inner) * stride_d


@triton.jit
def _log_ratio(log_p, log_q):
    """Return d: 0 where both are -inf, and finite, so that 0 * d is 0."""
    d = log_p - log_q
    both = (log_p == float("-inf")) & (log_q == float("-inf"))
    d = tl.where(both, 0.0, d)
    d = tl.where(d > _LIMIT, _LIMIT, d)
    return tl.where(d < -_LIMIT, -_LIMIT, d)


@triton.jit
def _update_logsumexp(x, m, total):
    """Add a block to the running maximum m of each lane, and to its sum of exp(x - m)."""
    higher = tl.maximum(m, x)
    at = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(m - at) + tl.exp(x - at)


@triton.jit
def _reduce_logsumexp(m, total):
    """Reduce the lanes to the row's maximum, and log sum exp(x - maximum)."""
    highest = tl.max(m, axis=0)
    return highest, tl.log(tl.sum(total * tl.exp(m - highest), axis=0))


@triton.jit
def _row_statistics_kernel(
    a, b, out, n_rows, columns, inner, a_n, a_c, a_d, b_n, b_c, b_d, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a, b = _row_pointer(a, row, inner, a_n, a_d), _row_pointer(b, row, inner, b_n, b_d)
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
        m_a, total_a = _update_logsumexp(x, m_a, total_a)
        m_b, total_b = _update_logsumexp(y, m_b, total_b)
    m_a, log_a = _reduce_logsumexp(m_a, total_a)
    m_b, log_b = _reduce_logsumexp(m_b, total_b)
    mean_p = tl.zeros([block], tl.float32)
    s = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        c = start + lane
        x = tl.load(a + c * a_c, mask=c < columns, other=lowest).to(tl.float32) - m_a - log_a
        y = tl.load(b + c * b_c, mask=c < columns, other=lowest).to(tl.float32) - m_b - log_b
        d = _log_ratio(x, y)
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
def _row_gradients_kernel(
    a, b, rows, weights, target, grad_a, grad_b, n_rows, columns, inner, a_n, a_c, a_d, b_n, b_c, b_d, grad_a_n,
    grad_a_c, grad_a_d, grad_b_n, grad_b_c, grad_b_d, has_target: tl.constexpr, has_a: tl.constexpr,
    has_b: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a, b = _row_pointer(a, row, inner, a_n, a_d), _row_pointer(b, row, inner, b_n, b_d)
    grad_a = _row_pointer(grad_a, row, inner, grad_a_n, grad_a_d)
    grad_b = _row_pointer(grad_b, row, inner, grad_b_n, grad_b_d)
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
        d = _log_ratio(x, y)
        p, q = tl.exp(x), tl.exp(y)
        onehot = tl.where(c == y_row, w, 0.0)
        if has_a:
            tl.store(grad_a + c * grad_a_c, p * (k * d + shift_p) - k * q - onehot, mask=c < columns)
        if has_b:
            tl.store(grad_b + c * grad_b_c, q * (shift_q - k * d) - k * p - onehot, mask=c < columns)


def row_statistics(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return max a, log sum exp(a - max a), the same of b, E_p d and S: float32, (6, N) or (6, N, D)."""
    out = torch.empty(6, len(a), *a.shape[2:], dtype=torch.float32, device=a.device)
    n = out[0].numel()
    if n:
        with _device_guard(a):
            _row_statistics_kernel[(n,)](
                a, b, out, n, a.shape[1], _inner_size(a), *_strides(a), *_strides(b), **_launch_options(a)
            )  # fmt: skip
    return out


def row_gradients(
    passes: Any, target: torch.Tensor | None, rows: torch.Tensor, weights: torch.Tensor, grads: Any
) -> None:
    """Write to grads, where they are not None, the gradients of the passes."""
    a, b = passes
    grad_a, grad_b = (a if grad is None else grad for a, grad in zip(passes, grads, strict=True))
    n = rows[0].numel()
    target = rows if target is None else target.contiguous()
    if n:
        with _device_guard(a):
            _row_gradients_kernel[(n,)](
                a, b, rows, weights.contiguous(), target, grad_a, grad_b, n, a.shape[1], _inner_size(a), *_strides(a),
                *_strides(b), *_strides(grad_a), *_strides(grad_b), has_target=target is not rows,
                has_a=grads[0] is not None, has_b=grads[1] is not None, **_launch_options(a),
            )  # fmt: skip


def _inner_size(a: torch.Tensor) -> int:
    return a.shape[2] if a.dim() == 3 else 1


def _strides(a: torch.Tensor) -> tuple[int, int, int]:
    return a.stride(0), a.stride(1), a.stride(2) if a.dim() == 3 else 0


def _launch_options(a: torch.Tensor) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(a.shape[1]))
    return {"block": block, "num_warps": 8 if block >= 2048 else 4}


def _device_guard(a: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(a.device) if a.is_cuda else nullcontext()
