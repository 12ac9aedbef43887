"""torch.autograd.Functions for NLL and symmetric KL of two passes' hidden states, which never hold all their logits.

A chunk of tokens is taken through the head in both passes, measured as rowwise.py has it, and let go. Its gradient is
written over its logits, and goes from there into those of the hidden states and of the head's weight.

FusedRows gives each token's values, whose weights its backward pass learns: that makes the logits once more, as TRL and
cut-cross-entropy do. FusedSum knows the weights and so forms the gradients with the logits, as Liger does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .rowwise import accumulation_dtype, nll_of_rows, refuse_create_graph, row_gradients, row_statistics

CPU_LOGITS = 2**24  # elements of one pass's chunk: 64 MB of float32
GPU_LOGITS = 2**27  # 256 MB of bfloat16, in products large enough for the GPU


@dataclass(frozen=True)
class Scaling:
    """What a head does to y = x w^T + bias: z = softcap * tanh(scale * y / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self == Scaling()

    def apply(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z and dz/dy, of float32 at least."""
        y = y.to(accumulation_dtype(y.dtype)) * self.scale
        if self.softcap is None:
            return y / self.temperature, y.new_tensor(self.scale / self.temperature)
        t = torch.tanh(y / self.softcap)
        return t * (self.softcap / self.temperature), (1 - t * t) * (self.scale / self.temperature)


@dataclass(frozen=True)
class Pass:
    """What the head is given in one pass.

    Args:
        hidden: (N, H), the tokens that are scored.
        weight: (V, H).
        bias: (V), or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


def fused_rows(first: Pass, second: Pass, target: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nll = -1/2 (log p[y] + log q[y]) and S of each token, differentiable once.

    Args:
        first, second: the passes.
        target: class indices, int64, (N).
        scaling: of the logits.
    Returns:
        Two tensors (N): float64 for float64, else float32.
    """
    nll, s = FusedRows.apply(*_inputs(first, second), target, scaling)  # type: ignore[no-untyped-call]
    return nll, s


def fused_sum(
    first: Pass, second: Pass, target: torch.Tensor, scaling: Scaling, kl_weight: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sum(nll + kl_weight * S), differentiable once, and nll and S of each token without a gradient."""
    total, nll, s = FusedSum.apply(*_inputs(first, second), target, scaling, kl_weight)  # type: ignore[no-untyped-call]
    return total, nll, s


def _inputs(first: Pass, second: Pass) -> tuple[torch.Tensor | None, ...]:
    return first.hidden, second.hidden, first.weight, second.weight, first.bias, second.bias


class FusedRows(torch.autograd.Function):
    """nll and S of each token; their gradients are formed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_a: torch.Tensor, hidden_b: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor,
        bias_a: torch.Tensor | None, bias_b: torch.Tensor | None, target: torch.Tensor, scaling: Scaling,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx.scaling, ctx.dtype, ctx.is_shared = scaling, _compute_dtype(hidden_a), weight_a is weight_b
        inputs = (hidden_a, hidden_b, weight_a, weight_b, bias_a, bias_b)
        nll, rows = _Head(inputs, target, scaling, ctx.dtype).measure()
        ctx.save_for_backward(*inputs, target, rows)
        return nll, rows[5].clone()

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor, grad_s: torch.Tensor) -> Any:
        refuse_create_graph()
        *inputs, target, rows = ctx.saved_tensors
        head = _Head(inputs, target, ctx.scaling, ctx.dtype)
        gradients = _Gradients(inputs, ctx.needs_input_grad, ctx.dtype, is_shared=ctx.is_shared)
        head.differentiate(rows, torch.stack([0.5 * grad_nll, 0.5 * grad_s]), gradients)
        return *_cast_as(inputs, gradients.found), None, None


class FusedSum(torch.autograd.Function):
    """sum(nll + kl_weight * S); its gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_a: torch.Tensor, hidden_b: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor,
        bias_a: torch.Tensor | None, bias_b: torch.Tensor | None, target: torch.Tensor, scaling: Scaling,
        kl_weight: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        inputs, dtype = (hidden_a, hidden_b, weight_a, weight_b, bias_a, bias_b), _compute_dtype(hidden_a)
        gradients = _Gradients(inputs, ctx.needs_input_grad, dtype, is_shared=weight_a is weight_b)
        nll, rows = _Head(inputs, target, scaling, dtype).measure_and_differentiate(kl_weight, gradients)
        ctx.save_for_backward(*inputs, *gradients.found)
        s = rows[5].clone()
        ctx.mark_non_differentiable(nll, s)
        is_plain = isinstance(kl_weight, float) and not kl_weight  # 0 times an infinite S would be NaN
        return (nll if is_plain else nll + kl_weight * s).sum(), nll, s

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        refuse_create_graph()
        inputs, found = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        return *_cast_as(inputs, [None if one is None else one * grad for one in found]), None, None, None


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype of the head's products: autocast has a say in it."""
    device = hidden.device.type
    is_cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else hidden.dtype


class _Head:
    """Both passes' logits, chunk by chunk.

    Args:
        inputs: hidden, weight and bias, each of both passes.
        dtype: of the products.
    """

    def __init__(self, inputs: Any, target: torch.Tensor, scaling: Scaling, dtype: torch.dtype) -> None:
        hidden_a, hidden_b, weight_a, weight_b, bias_a, bias_b = inputs
        self.hidden = hidden_a, hidden_b
        self.weight = [weight_a.to(dtype)] * 2 if weight_b is weight_a else [weight_a.to(dtype), weight_b.to(dtype)]
        self.bias = [None if bias is None else bias.to(dtype) for bias in (bias_a, bias_b)]
        self.target, self.scaling, self.dtype = target, scaling, dtype
        size = CPU_LOGITS if hidden_a.device.type == "cpu" else GPU_LOGITS
        self._step = min(max(1, size // max(1, len(weight_a))), max(1, len(hidden_a)))
        # allocated once: new ones for each chunk would be new pages of memory each time
        self._logits = [hidden_a.new_empty(self._step, len(weight_a), dtype=dtype) for _ in range(2)]

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's nll, (N), and the statistics of rowwise.py, (6, N)."""
        nll, rows = self._empty_rows()
        for _ in self._chunks(nll, rows):
            pass
        return nll, rows

    def measure_and_differentiate(
        self, kl_weight: float | torch.Tensor, gradients: "_Gradients"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure as `measure`, and form the gradients of sum(nll + kl_weight * S)."""
        nll, rows = self._empty_rows()
        weights = torch.stack([torch.full_like(nll, 0.5), torch.full_like(nll, 0.5) * kl_weight])
        for at, z, slopes in self._chunks(nll, rows):
            self._add(at, z, slopes, rows, weights, gradients)
        return nll, rows

    def differentiate(self, rows: torch.Tensor, weights: torch.Tensor, gradients: "_Gradients") -> None:
        """Form the gradients for the tokens' halved weights, (2, N), of nll and of S."""
        for at, z, slopes in self._chunks():
            self._add(at, z, slopes, rows, weights, gradients)

    def _empty_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.hidden[0].new_empty(7, len(self.target), dtype=accumulation_dtype(self.dtype))
        return rows[6], rows[:6]

    def _chunks(
        self, nll: torch.Tensor | None = None, rows: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, list[torch.Tensor], list[torch.Tensor | None]]]:
        """Yield the place of a chunk, its logits and their slopes; write its measures to nll and rows."""
        for start in range(0, len(self.target), self._step):
            at = slice(start, start + self._step)
            made = [self._make_logits(which, at) for which in range(2)]
            z, slopes = [one[0] for one in made], [one[1] for one in made]
            if nll is not None and rows is not None:
                rows[:, at] = row_statistics(z[0], z[1])
                nll[at] = nll_of_rows(z[0], z[1], self.target[at], rows[:, at])
            yield at, z, slopes

    def _make_logits(self, which: int, at: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, bias = self._hidden(which, at), self.bias[which]
        y = torch.mm(x, self.weight[which].t(), out=self._logits[which][: len(x)])
        if bias is not None:
            y += bias
        return (y, None) if self.scaling.is_identity else self.scaling.apply(y)

    def _hidden(self, which: int, at: slice) -> torch.Tensor:
        hidden: torch.Tensor = self.hidden[which][at]
        return hidden.to(self.dtype)

    def _add(
        self, at: slice, z: list[torch.Tensor], slopes: list[torch.Tensor | None], rows: torch.Tensor,
        weights: torch.Tensor, gradients: "_Gradients",
    ) -> None:  # fmt: skip
        row_gradients((z[0], z[1]), self.target[at], rows[:, at], weights[:, at], z)
        for which, (grad, slope) in enumerate(zip(z, slopes, strict=True)):
            grad = grad if slope is None else grad.mul_(slope).to(self.dtype)
            gradients.add(which, at, grad, self._hidden(which, at), self.weight[which])


class _Gradients:
    """The gradients of the head's inputs, to which each chunk of logits adds its own.

    Those of weight and bias are summed in float32 at least: products that are rounded before they are added up would
    pull the training to one side.
    """

    def __init__(self, inputs: Any, needed: Any, dtype: torch.dtype, *, is_shared: bool) -> None:
        # filled token by token, and so of the dtype that the one product of each has
        self._hidden = [torch.empty_like(x, dtype=dtype) if needed[i] else None for i, x in enumerate(inputs[:2])]
        self._weight = [_zeros(x) if needed[2 + i] else None for i, x in enumerate(inputs[2:4])]
        self._bias = [_zeros(x) if needed[4 + i] else None for i, x in enumerate(inputs[4:])]
        self._is_shared = is_shared
        if is_shared:
            self._weight[1] = self._weight[0]

    def add(self, which: int, at: slice, grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        """Add what a chunk's gradient, of its logits before they were scaled, gives."""
        if (of_hidden := self._hidden[which]) is not None:
            torch.mm(grad, weight, out=of_hidden[at])
        if (of_weight := self._weight[which]) is not None:
            _add_product(of_weight, grad.t(), hidden)
        if (of_bias := self._bias[which]) is not None:
            of_bias += grad.sum(0, dtype=of_bias.dtype)

    @property
    def found(self) -> list[torch.Tensor | None]:
        """Those of the inputs, one after the other."""
        return [*self._hidden, self._weight[0], None if self._is_shared else self._weight[1], *self._bias]


def _cast_as(inputs: Any, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if grad is None else grad.to(x.dtype) for x, grad in zip(inputs, gradients, strict=True)]


def _zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b, without rounding it to their dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
