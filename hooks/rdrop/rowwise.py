"""torch.autograd.Function for NLL and symmetric KL of two logits, row by row: in closed form, to save memory and time.

With d = log p - log q and E_p the mean under p, for each row:

    nll = -1/2 (log p[y] + log q[y]),   S = 1/2 sum (p - q) d = 1/2 [KL(p||q) + KL(q||p)]
    dS/da = 1/2 [p (d - E_p d) + p - q],   dS/db = 1/2 [-q (d - E_q d) - (p - q)]

Kept for the backward pass: the logits, and six numbers for each row. Forming the gradient in the forward pass saves a
fifth of the time, but rounds half precision twice, loses it before GradScaler scales, and is wrong the second time that
a graph is retained.
"""

from collections.abc import Iterator
from typing import Any

import torch

from surgery.kernels.backends import has_triton

_CPU_CHUNK = 2**18  # elements of each of the four temporaries: 1 MB of float32, which stays in the CPU's cache
_GPU_CHUNK = 2**24  # without Triton: large enough to occupy the GPU

_Passes = tuple[torch.Tensor, torch.Tensor]


def compare_rows(
    a: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor | None, *, valid: torch.Tensor, is_log: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nll and S of each row, differentiable once; 0 in rows that are not valid, and nll 0 without a target.

    Classes of probability 0 in both contribute nothing. One that only one of them rules out makes S as large as the
    dtype lets gradients be (about 1e37 p in float32), where the formula says infinity.

    Args:
        a, b: logits, (N, C) or (N, C, D), any strides. b None: a is (2N, ...), the two one after the other.
        target: class indices, int64, (N) or (N, D).
        valid: bool, likewise. Targets of other rows may be anything.
        is_log: a and b are log-probabilities, each element a variable of its own.
    Returns:
        Two tensors of the shape of valid: float64 for float64, else float32.
    """
    if target is not None:
        target = torch.where(valid, target.long(), 0)
    nll, s = _CompareRows.apply(a, b, target, is_log)  # type: ignore[no-untyped-call]
    return torch.where(valid, nll, 0), torch.where(valid, s, 0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to accumulate in."""
    return dtype if dtype == torch.float64 else torch.float32


def uses_triton(a: torch.Tensor) -> bool:
    """Tell whether the Triton kernel takes these logits."""
    return a.is_cuda and a.dtype != torch.float64 and has_triton()


class _CompareRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor | None, target: torch.Tensor | None, is_log: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = _passes_of(a, b)
        rows = row_statistics(left, right, is_log=is_log)
        ctx.save_for_backward(a, b, target, rows)
        ctx.is_log = is_log
        s = rows[5].clone()
        return torch.zeros_like(s) if target is None else nll_of_rows(left, right, target, rows), s

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor, grad_s: torch.Tensor) -> Any:
        refuse_create_graph()
        a, b, target, rows = ctx.saved_tensors
        grads = [
            torch.empty_like(x) if needed else None for x, needed in zip((a, b), ctx.needs_input_grad, strict=False)
        ]
        grad_passes = _passes_of(*grads) if b is None else grads
        weights = torch.stack([0.5 * grad_nll, 0.5 * grad_s])
        row_gradients(_passes_of(a, b), target, rows, weights, grad_passes, is_log=ctx.is_log)
        return *grads, None, None


def refuse_create_graph() -> None:
    """Raise in a backward pass that is to be differentiated: its formulas are differentiable once.

    once_differentiable would leave a gradient penalty without effect, and say nothing.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "rdrop: expected create_graph=False, got True. Train without a gradient penalty, or without rdrop."
        )


def _passes_of(a: Any, b: Any) -> Any:
    """Return a and b; without b, the two halves of a doubled batch."""
    return (a, b) if b is not None else (a[: len(a) // 2], a[len(a) // 2 :])


def _gather_target(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return x.gather(1, target.unsqueeze(1)).squeeze(1)


def nll_of_rows(a: torch.Tensor, b: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return -1/2 (log p[y] + log q[y]) of each row, from its statistics."""
    m_a, log_a, m_b, log_b, _, _ = rows
    log_p = _gather_target(a, target).to(rows.dtype) - m_a - log_a
    log_q = _gather_target(b, target).to(rows.dtype) - m_b - log_b
    mean: torch.Tensor = -0.5 * (log_p + log_q)
    return mean


def row_statistics(a: torch.Tensor, b: torch.Tensor, *, is_log: bool = False) -> torch.Tensor:
    """Return for each row max a, log sum exp(a - max a), the same of b, E_p d and S: (6, N) or (6, N, D)."""
    if not is_log and uses_triton(a):
        from . import triton_rowwise

        found: torch.Tensor = triton_rowwise.row_statistics(a, b)
        return found
    rows = a.new_zeros(6, len(a), *a.shape[2:], dtype=accumulation_dtype(a.dtype))
    workspace = _Workspace(a)
    for at, row in _chunks(a):
        x, y, p, q = workspace.views_like(a[at])
        _softmax_into(a[at], rows[0][row], rows[1][row], x, p, is_log=is_log)
        _softmax_into(b[at], rows[2][row], rows[3][row], y, q, is_log=is_log)
        d = _log_ratio(x, y)
        rows[4][row] = torch.mul(p, d, out=y).sum(1)
        rows[5][row] = torch.sub(p, q, out=y).mul_(d).sum(1).mul_(0.5)
    return rows


def _softmax_into(
    a: torch.Tensor, m: torch.Tensor, log: torch.Tensor, x: torch.Tensor, p: torch.Tensor, *, is_log: bool
) -> None:
    """Write the maximum to m, log sum exp(a - m) to log, and to the temporaries x = log p and p."""
    if is_log:
        torch.exp(x.copy_(a), out=p)
        return
    m.copy_(a.amax(1))
    torch.exp(torch.sub(a, m.unsqueeze(1), out=x), out=p)
    total = p.sum(1, keepdim=True)
    log.copy_(total.log().squeeze(1))
    x.sub_(log.unsqueeze(1))
    p.mul_(total.reciprocal_())


def _log_ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return log p - log q in place of x: 0 where both are -inf, and finite, so that 0 * d is 0."""
    limit = torch.finfo(x.dtype).max / 4
    return x.sub_(y).nan_to_num_(0.0, limit, -limit)


def row_gradients(
    passes: _Passes,
    target: torch.Tensor | None,
    rows: torch.Tensor,
    weights: torch.Tensor,
    grads: Any,
    *,
    is_log: bool = False,
) -> None:
    """Write to grads: p (w + k (1 + d - E_p d)) - k q - w onehot for a, where w and k are the rows' halved weights.

    The passes may be written over by their own gradients.
    """
    a, b = passes
    if not is_log and uses_triton(a):
        from . import triton_rowwise

        triton_rowwise.row_gradients(passes, target, rows, weights, grads)
        return
    workspace = _Workspace(a)
    for at, row in _chunks(a):
        x, y, p, q = workspace.views_like(a[at])
        m_a, log_a, m_b, log_b, mean_p, s = (value[row].unsqueeze(1) for value in rows)
        w, k = (value[row].unsqueeze(1) for value in weights)
        torch.exp(torch.sub(a[at], m_a, out=x).sub_(log_a), out=p)
        torch.exp(torch.sub(b[at], m_b, out=y).sub_(log_b), out=q)
        d = _log_ratio(x, y)
        shift_p, shift_q = (k, k) if is_log else (w + k - k * mean_p, w + k + k * (mean_p - 2 * s))
        for grad, slope, shift, mine, other in ((grads[0], k, shift_p, p, q), (grads[1], -k, shift_q, q, p)):
            if grad is None:
                continue
            out = grad[at] if grad.dtype == y.dtype else y
            torch.mul(d, slope, out=out).add_(shift).mul_(mine).addcmul_(other, k, value=-1)
            if target is not None:
                out.scatter_add_(1, target[row].unsqueeze(1), -w)
            if out is y:
                grad[at].copy_(y)


def _chunks(a: torch.Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Cut (N, C) or (N, C, D) along N, and along D where one N is too much: yield the index in a, and in the rows."""
    size = (_CPU_CHUNK if a.device.type == "cpu" else _GPU_CHUNK) // max(1, a.shape[1])
    if torch.compiler.is_compiling():
        size = a.numel()  # a loop would be unrolled
    inner = a.shape[2] if a.dim() == 3 else 1
    for n in _slices(len(a), size // max(1, inner)):
        if a.dim() == 2:
            yield (n,), (n,)
        else:
            for d in _slices(inner, size):
                yield (n, slice(None), d), (n, d)


def _slices(length: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


class _Workspace:
    """Four temporaries, allocated once: new ones for each chunk would be new pages of memory each time."""

    def __init__(self, a: torch.Tensor) -> None:
        size = max([0, *(a[at].numel() for at, _ in _chunks(a))])
        self.flat = a.new_empty(4, size, dtype=accumulation_dtype(a.dtype))

    def views_like(self, chunk: torch.Tensor) -> Iterator[torch.Tensor]:
        return (flat[: chunk.numel()].view(chunk.shape) for flat in self.flat)
