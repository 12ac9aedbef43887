"""Tensors that carry their twin from the model's other pass to a loss function that is called outside of the model."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel.distributed import _DDPSink
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from surgery.errors import SourceError

from ..compiling import eagerly
from .loss_calls import SUPPORTED, UNSUPPORTED, LossCall, any_requires_grad, read_call
from .outputs import map_output
from .transparent import Plain

_log = logging.getLogger(__name__)
Join = Callable[[LossCall | None, LossCall, Callable[[], None]], torch.Tensor]
"""Makes one loss of the calls in both passes; says so when it has."""


@dataclass(eq=False)
class Ticket:
    """One training forward of two passes, whose twins have to meet in a loss function.

    Args:
        join: makes one loss of the calls of both passes, or of one call on a doubled batch.
        fire: is told once that it has.
        unjoined: names of the losses that R-Drop has no formula for, over all forwards of the model.
        before: tickets of the forwards whose outputs this one was given, such as a hidden state.
        is_reached: it has been called.
        stray: those of this forward.
    """

    join: Join
    fire: Callable[[], None]
    unjoined: set[str]
    before: frozenset["Ticket"] = frozenset()
    is_reached: bool = False
    stray: tuple[str, ...] = ()

    def meet(self, first: LossCall | None, second: LossCall) -> torch.Tensor:
        """Return the loss."""
        return self.join(first, second, self.reach)

    def pass_by(self, name: str) -> None:
        """Note a loss that is not known."""
        self.stray += (name,)
        if name not in self.unjoined:
            _log.warning("rdrop: no formula for %s: it is taken from the second pass, as it is.", name)
        self.unjoined.add(name)

    def reach(self) -> None:
        """Note that the loss has R-Drop in it, and so have the gradients that go back to forwards before."""
        waiting = [self]
        while waiting:
            ticket = waiting.pop()
            if not ticket.is_reached:
                ticket.fire()
            ticket.is_reached = True
            waiting += ticket.before
            ticket.before = frozenset()

    def check(self, grad: torch.Tensor) -> None:  # noqa: ARG002
        """Refuse a gradient that does not come from R-Drop's loss; a hook of the logits."""
        if not self.is_reached:
            raise SourceError(self.complaint())

    def complaint(self) -> str:
        """Say that the loss is not known."""
        unmet = (
            "a loss that calls none of them, or something in between that loses a pass, as an autograd function does"
        )
        met = f"got {' and '.join(dict.fromkeys(self.stray)) or unmet}"
        return (
            "rdrop: expected a loss by cross_entropy, nll_loss, log_softmax, binary_cross_entropy or mse_loss of "
            f"torch, {met}. Train without rdrop, or with one of these."
        )


@dataclass(eq=False)
class Edge:
    """A Twin's own place in the graph: only what does not ask the Twin gets there, and it loses the first pass."""

    tickets: frozenset[Ticket]
    is_known: bool = False

    def notice(self, grads: tuple[torch.Tensor | None, ...]) -> None:
        """Note that a gradient has come this way, beside one of R-Drop's loss; a hook of the Twin's node."""
        if self.is_known or all(grad is None for grad in grads):
            return
        for ticket in self.tickets:
            if ticket.is_reached:
                ticket.pass_by("an autograd function on the outputs, or the like")


class Twin(Plain):
    """The result of the second pass, with that of the first as `other`: what is done to one is done to both.

    Only as long as there is a gradient to be had: what is detached, compared or printed is an ordinary tensor.
    """

    second: torch.Tensor | None
    """The result as an ordinary tensor, which is what is worked on; None: not in the graph yet."""
    other: torch.Tensor
    edge: Edge
    tickets: frozenset[Ticket]

    @staticmethod
    def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply_to_both(func, args, kwargs)


def pair(second: Any, first: Any, ticket: Ticket) -> Any:
    """Pair the outputs of two passes, tensor by tensor, in a copy of the structure of the second.

    Where there is nothing to pair with, a gradient that comes along raises unless the ticket is reached.
    """
    return map_output(lambda b, a: _pair_tensors(b, a, ticket), second, first)


def _pair_tensors(second: Any, first: Any, ticket: Ticket) -> Any:
    is_output = isinstance(second, torch.Tensor) and second.requires_grad and not second.is_leaf
    if not is_output or (ticket.is_reached and second.dim() == 0):
        return second
    if not ticket.is_reached:
        second.register_hook(ticket.check)
    is_fit = isinstance(first, torch.Tensor) and first.requires_grad and first.shape == second.shape
    return _twin(second, first, frozenset([ticket])) if is_fit and type(second) is torch.Tensor else second


def _twin(second: torch.Tensor, first: torch.Tensor, tickets: frozenset[Ticket]) -> Twin:
    twin = second.as_subclass(Twin)
    twin.second = second if second.requires_grad else None
    twin.other, twin.tickets = first, tickets
    _watch_edge(twin)
    return twin


def _watch_edge(twin: Twin) -> None:
    twin.edge = Edge(twin.tickets)
    with torch._C.DisableTorchFunctionSubclass():
        # not a hook of the tensor, which would stay where it was when the tensor is written to
        if twin.grad_fn is not None and twin.numel() > 1:  # a scalar may be the whole loss
            twin.grad_fn.register_prehook(twin.edge.notice)


def part(tree: Any) -> tuple[Any, Any]:
    """Return the first and the second pass's share of arguments that may hold twins."""
    if not any(isinstance(leaf, Twin) for leaf in tree_iter(tree)):
        return tree, tree  # the script may look into what it has given
    return tree_map_only(Twin, lambda twin: twin.other, tree), tree_map_only(Twin, _second, tree)


def _second(twin: Twin) -> torch.Tensor:
    if twin.second is None:
        twin.second = twin.as_subclass(torch.Tensor)
    return twin.second


def tickets_of(tree: Any) -> frozenset[Ticket]:
    """Return the tickets of the twins in arguments."""
    return frozenset().union(*(leaf.tickets for leaf in tree_iter(tree) if isinstance(leaf, Twin)))


@eagerly  # a function that is compiled as a whole runs these one by one
def _apply_to_both(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in SUPPORTED and any_requires_grad([*args, *kwargs.values()]):
        return _join(func, args, kwargs)
    (others, other_kwargs), (seconds, second_kwargs) = part((args, kwargs))
    if func is _BASE:
        return func(*seconds)
    tickets = tickets_of((args, kwargs))
    if func in UNSUPPORTED and any_requires_grad([*args, *kwargs.values()]):
        for ticket in tickets:
            ticket.pass_by(func.__name__)
    if func is torch.Tensor.backward:
        for ticket in tickets:
            ticket.check(args[0])
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    versions = [_version(tensor) for tensor in tensors]
    twins = {id(tensor.second): tensor for tensor in tensors if isinstance(tensor, Twin)}
    result = tree_map(lambda leaf: twins.get(id(leaf), leaf), func(*seconds, **second_kwargs))
    written = [tensor for tensor, version in zip(tensors, versions, strict=True) if _version(tensor) != version]
    if any(tensor.requires_grad and not isinstance(tensor, Twin) for tensor in written):
        return result  # a plain tensor has taken in a twin: to do it twice would count it twice
    for twin in written:
        if isinstance(twin, Twin):
            _watch_edge(twin)
    is_sink = func is torch.Tensor.clone and not torch.is_grad_enabled() and _is_in_sink()
    if is_sink:
        args[0].edge.is_known = True
    is_paired = torch.is_grad_enabled() and any(_is_twinnable(leaf) for leaf in tree_iter(result))
    if not (written or is_sink or is_paired):
        return result
    with torch.set_grad_enabled(torch.is_grad_enabled() or is_sink):
        other = func(*others, **other_kwargs)
    if not (is_sink or is_paired):
        return result
    return tree_map(
        lambda b, a: _twin(b, a, tickets) if _is_twinnable(b) or (is_sink and type(b) is torch.Tensor) else b,
        result,
        other,
    )


def _is_in_sink() -> bool:
    """Tell whether DistributedDataParallel is cloning the outputs, in an autograd function that changes nothing."""
    frame = sys._getframe(1)
    for _ in range(12):
        if frame.f_code is _SINK:
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


_SINK = _DDPSink.forward.__code__
_BASE = torch.Tensor._base.__get__  # type: ignore[union-attr]


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_twinnable(leaf: Any) -> bool:
    return type(leaf) is torch.Tensor and leaf.requires_grad


def _join(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tickets = tickets_of((args, kwargs))
    (first_args, first_kwargs), (second_args, second_kwargs) = part((args, kwargs))

    def reach() -> None:
        for ticket in tickets:
            ticket.reach()

    join = next(iter(tickets)).join
    return join(read_call(func, first_args, first_kwargs), read_call(func, second_args, second_kwargs), reach)
