"""torch.Tensor subclass that carries the first pass's tensor along, for a loss function called outside of forward.

Every torch function of a PairedTensor is applied to the tensors of both passes; a loss function gets both results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from surgery.escapes import get_logger

from ..compiling import eagerly
from .fused_calls import HeadCall
from .loss_calls import (
    LEAVE_OUT,
    PAIRWISE,
    SUPPORTED,
    UNSUPPORTED,
    LossCall,
    any_requires_grad,
    read_call,
)
from .outputs import map_output
from .transparent import TransparentTensor, is_clone_in_ddp_sink

_log = get_logger(__name__)
MakeLoss = Callable[[LossCall | HeadCall | None, LossCall | HeadCall, Callable[[], None]], Any]
"""Returns one loss for the calls in both passes, and calls the function it was given as soon as there is one."""


@dataclass(eq=False)
class PairedForward:
    """One training forward of two passes, and whether a loss of R-Drop was made of its outputs.

    Args:
        make_loss: makes one loss of the calls of both passes, or of one call on a doubled batch.
        on_first_loss: is called once, with the first such loss.
        refuse: is called with the reason where the outputs have no loss of R-Drop; raises it, or lets the loss be.
        unjoined: names of the losses that R-Drop has no formula for, over all forwards of the model.
        upstream: the forwards whose outputs this one was given, such as a hidden state.
        has_loss: a loss of R-Drop was made.
        unjoined_here: those of this forward.
        pairwise: the function of a loss of pairs that was applied to the outputs.
    """

    make_loss: MakeLoss
    on_first_loss: Callable[[], None]
    refuse: Callable[[str], None]
    unjoined: set[str]
    upstream: frozenset["PairedForward"] = frozenset()
    has_loss: bool = False
    unjoined_here: tuple[str, ...] = ()
    pairwise: str | None = None

    def loss(self, first: LossCall | HeadCall | None, second: LossCall | HeadCall) -> Any:
        """Return the loss of both passes; first is None for a doubled batch."""
        return self.make_loss(first, second, self.mark_loss)

    def note_unjoined(self, name: str) -> None:
        """Note a loss function without a formula, and warn of it once."""
        self.unjoined_here += (name,)
        if name not in self.unjoined:
            _log.warning("rdrop: no formula for %s: it is taken from the second pass, as it is.", name)
        self.unjoined.add(name)

    def mark_loss(self) -> None:
        """Note that the loss has the KL in it, and so do the gradients that flow back to the upstream forwards."""
        waiting = [self]
        while waiting:
            forward = waiting.pop()
            if not forward.has_loss:
                forward.on_first_loss()
            forward.has_loss = True
            waiting += forward.upstream
            forward.upstream = frozenset()

    def check_gradient(self, grad: torch.Tensor) -> None:  # noqa: ARG002
        """Refuse a gradient that does not come from a loss of R-Drop; a hook of the outputs."""
        if not self.has_loss:
            self.refuse(self.unknown_loss_message())

    def unknown_loss_message(self) -> str:
        """Say which losses were called, none of which has a formula."""
        if self.pairwise and not self.unjoined_here:
            return f"rdrop: expected a loss with a formula, got one by {self.pairwise}: {LEAVE_OUT}"
        unmet = (
            "a loss that calls none of them, or something in between that loses a pass, as an autograd function does"
        )
        met = f"got {' and '.join(dict.fromkeys(self.unjoined_here)) or unmet}"
        return (
            "rdrop: expected a loss by cross_entropy, nll_loss, log_softmax, binary_cross_entropy or mse_loss of "
            f"torch, {met}. Train without rdrop, or with one of these."
        )


@dataclass(eq=False)
class BypassHook:
    """Prehook of a PairedTensor's own grad_fn, which runs only for what bypasses __torch_function__.

    An autograd.Function, for instance, gets the second pass only, and its gradient comes back this way.

    Args:
        forwards: those of the tensor.
        is_expected: whoever bypasses it pairs its result again.
    """

    forwards: frozenset[PairedForward]
    is_expected: bool = False

    def on_gradient(self, grads: tuple[torch.Tensor | None, ...]) -> None:
        """Note a gradient that came beside that of R-Drop's loss; without one, check_gradient raises."""
        if self.is_expected or all(grad is None for grad in grads):
            return
        for forward in self.forwards:
            if forward.has_loss:
                forward.note_unjoined("an autograd function on the outputs, or the like")


class PairedTensor(TransparentTensor):
    """The result of the second pass, with that of the first as `first`: torch functions are applied to both.

    That goes on only while gradients are recorded: what is detached, compared or printed is an ordinary tensor.

    Args:
        second: the result as an ordinary tensor, to which functions are applied; None until it is needed, where that of
            the second pass was no part of the graph.
        first: that of the first pass.
        bypass: the hook of this tensor's grad_fn.
        forwards: those that it comes from.
    """

    second: torch.Tensor | None
    first: torch.Tensor
    bypass: BypassHook
    forwards: frozenset[PairedForward]

    @staticmethod
    def apply_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _apply_to_both(func, args, kwargs)


def pair_outputs(second: Any, first: Any, forward: PairedForward) -> Any:
    """Pair the outputs of two passes, tensor by tensor, in a copy of the structure of the second.

    A tensor without a counterpart stays as it is; its gradient raises unless the forward has a loss of R-Drop.
    """
    return map_output(lambda b, a: _pair_tensors(b, a, forward), second, first)


def _pair_tensors(second: Any, first: Any, forward: PairedForward) -> Any:
    is_output = isinstance(second, torch.Tensor) and second.requires_grad and not second.is_leaf
    if not is_output or (forward.has_loss and second.dim() == 0):
        return second
    if not forward.has_loss:
        second.register_hook(forward.check_gradient)
    is_fit = isinstance(first, torch.Tensor) and first.requires_grad and first.shape == second.shape
    return _make_paired(second, first, frozenset([forward])) if is_fit and type(second) is torch.Tensor else second


def _make_paired(second: torch.Tensor, first: torch.Tensor, forwards: frozenset[PairedForward]) -> PairedTensor:
    paired = second.as_subclass(PairedTensor)
    paired.second = second if second.requires_grad else None
    paired.first, paired.forwards = first, forwards
    _hook_bypass(paired)
    return paired


def _hook_bypass(paired: PairedTensor) -> None:
    paired.bypass = BypassHook(paired.forwards)
    with torch._C.DisableTorchFunctionSubclass():
        # not a hook of the tensor, which would stay where it was when the tensor is written to
        if paired.grad_fn is not None and paired.numel() > 1:  # a scalar may be the whole loss
            paired.grad_fn.register_prehook(paired.bypass.on_gradient)


def split_passes(tree: Any) -> tuple[Any, Any]:
    """Return the first and the second pass's version of arguments that may hold PairedTensors."""
    if not any(isinstance(leaf, PairedTensor) for leaf in tree_iter(tree)):
        return tree, tree  # not a copy: the script may look into what it has given
    return tree_map_only(PairedTensor, lambda paired: paired.first, tree), tree_map_only(PairedTensor, _second_of, tree)


def _second_of(paired: PairedTensor) -> torch.Tensor:
    if paired.second is None:
        paired.second = paired.as_subclass(torch.Tensor)
    return paired.second


def forwards_in(tree: Any) -> frozenset[PairedForward]:
    """Return the forwards that the PairedTensors in arguments come from."""
    return frozenset().union(*(leaf.forwards for leaf in tree_iter(tree) if isinstance(leaf, PairedTensor)))


@eagerly  # a function that is compiled as a whole runs these one by one
def _apply_to_both(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in SUPPORTED and any_requires_grad([*args, *kwargs.values()]):
        return _loss_of_both(func, args, kwargs)
    (firsts, first_kwargs), (seconds, second_kwargs) = split_passes((args, kwargs))
    if func is _GET_BASE:
        return func(*seconds)
    forwards = forwards_in((args, kwargs))
    _note_backward_or_unsupported(func, args, kwargs, forwards)
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    versions = [_version(tensor) for tensor in tensors]
    paired_by_second = {id(tensor.second): tensor for tensor in tensors if isinstance(tensor, PairedTensor)}
    result = tree_map(lambda leaf: paired_by_second.get(id(leaf), leaf), func(*seconds, **second_kwargs))
    written = [tensor for tensor, version in zip(tensors, versions, strict=True) if _version(tensor) != version]
    if any(tensor.requires_grad and not isinstance(tensor, PairedTensor) for tensor in written):
        return result  # an ordinary tensor was written to: to do it for the first pass too would do it twice
    for paired in written:
        if isinstance(paired, PairedTensor):
            _hook_bypass(paired)
    is_ddp_sink = is_clone_in_ddp_sink(func)
    if is_ddp_sink:
        args[0].bypass.is_expected = True
    is_paired = torch.is_grad_enabled() and any(_is_pairable(leaf) for leaf in tree_iter(result))
    if not (written or is_ddp_sink or is_paired):
        return result
    with torch.set_grad_enabled(torch.is_grad_enabled() or is_ddp_sink):
        first = func(*firsts, **first_kwargs)
    if not (is_ddp_sink or is_paired):
        return result
    return tree_map(
        lambda b, a: (
            _make_paired(b, a, forwards) if _is_pairable(b) or (is_ddp_sink and type(b) is torch.Tensor) else b
        ),
        result,
        first,
    )


def _note_backward_or_unsupported(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], forwards: frozenset[PairedForward]
) -> None:
    if func in UNSUPPORTED and any_requires_grad([*args, *kwargs.values()]):
        for forward in forwards:
            forward.note_unjoined(func.__name__)
    if func in PAIRWISE:
        for forward in forwards:
            forward.pairwise = PAIRWISE[func]
    if func is torch.Tensor.backward:
        for forward in forwards:
            forward.check_gradient(args[0])


_GET_BASE = torch.Tensor._base.__get__  # type: ignore[union-attr]


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_pairable(leaf: Any) -> bool:
    return type(leaf) is torch.Tensor and leaf.requires_grad


def _loss_of_both(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forwards = forwards_in((args, kwargs))
    (first_args, first_kwargs), (second_args, second_kwargs) = split_passes((args, kwargs))

    def on_loss() -> None:
        for forward in forwards:
            forward.mark_loss()

    make_loss = next(iter(forwards)).make_loss
    return make_loss(read_call(func, first_args, first_kwargs), read_call(func, second_args, second_kwargs), on_loss)
