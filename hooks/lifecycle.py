"""class Patch: attach methods to a model, pass its forwards and optimizer steps on to them, remove them in reverse."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from surgery.errors import SourceError
from surgery.live.parts import find_related, unwrap

from .active_calls import count_active_calls
from .marks import PATCH, Marked, is_ours
from .regularizer import Handle, Regularizer, Settings
from .steps import forget, watch
from .weights.chosen import ChosenWeights
from .weights.sharding import is_sharded, is_zero3, shard_pretrained
from .weights.unready import refuse_unready

_patched: Any = WeakIdKeyDictionary()
"""The models that a patch was attached to, by weak reference."""


@dataclass
class Forwards:
    """The forward passes of a patched model in training mode.

    Args:
        eager: how many were not compiled.
        traced: how many were.
    """

    eager: int = 0
    traced: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @property
    def count(self) -> int:
        return self.eager + int(self.traced)


class Patch:
    """The methods at work on one model. It changes the model in attach, and in nothing else.

    Args:
        settings: what was asked for, in the order of `regularizers`.
        regularizers: the methods, in the order in which they attach.
        weights: those that methods act on; None if none does.
    """

    def __init__(
        self, settings: Sequence[Settings], regularizers: Sequence[Regularizer], weights: ChosenWeights | None
    ) -> None:
        self.settings = tuple(settings)
        self.regularizers = tuple(regularizers)
        self.weights = weights
        self.forwards = Forwards()
        if weights is not None:
            self.forwards.traced = self.forwards.traced.to(weights.device)
        self._handles: list[Handle] = []
        self._thread: int | None = None  # that of the forward which is under way

    # -- put on, take off -----------------------------------------------------------------------------------------

    def attach(self, root: nn.Module) -> None:
        """Put the patch on the model: an attribute, marks on its parts, and what each method changes."""
        root.__dict__[PATCH] = self
        _patched[root] = True
        self._handles = [root.register_forward_pre_hook(_begin)]
        if self.weights is not None:
            self._handles += self.weights.attach()
        for regularizer in self.regularizers:
            self._handles += regularizer.attach(root)
        self._handles.append(root.register_forward_hook(_end, always_call=True))
        self._adopt()

    def detach(self, root: nn.Module) -> None:
        """Take the patch off again, whatever has become of the model meanwhile."""
        forget(self)
        self.abort()
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []
        del root.__dict__[PATCH]
        _patched.pop(root, None)

    def abort(self) -> None:
        """Do away with what an interrupted forward has left."""
        for regularizer in self.regularizers:
            regularizer.abort()

    def _adopt(self) -> None:
        for handle in self._handles:
            if isinstance(handle, Marked):
                handle.mark.adopt(self)
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a copy, in a copy of the whole model."""
        self.__dict__.update(state)
        self._adopt()

    # -- forwards -------------------------------------------------------------------------------------------------

    def begin(self, root: nn.Module) -> None:
        """Open a forward pass of the model."""
        if getattr(root, "_is_replica", False):
            raise SourceError(
                f"{type(root).__name__}: expected the model itself, got a replica by DataParallel. "
                "Use DistributedDataParallel, or one GPU."
            )
        is_counted = root.training and not torch.compiler.is_compiling()
        if is_counted:
            self._enter_thread(root)
            self._look_at_weights(root)
        for regularizer in self.regularizers:
            regularizer.begin_forward(root)
        if is_counted:
            self.forwards.eager += 1
        elif root.training:
            # beside the weights, which may have moved: CUDA graphs take nothing from the CPU
            if self.weights is not None:
                self.forwards.traced = self.forwards.traced.to(self.weights.device)
            self.forwards.traced.add_(1)

    def next_pass(self) -> None:
        """Tell the methods that a second pass of this forward begins."""
        for regularizer in self.regularizers:
            regularizer.next_pass()

    def end(self, root: nn.Module, output: Any) -> None:
        """Close a forward pass.

        Args:
            output: None if forward has raised.
        """
        if self.is_open_elsewhere(root):
            return
        for regularizer in self.regularizers:
            regularizer.end_forward(root, output)

    def _enter_thread(self, root: nn.Module) -> None:
        if self.is_open_elsewhere(root):
            raise SourceError(
                f"{type(root).__name__}: expected one forward in training mode at a time, got one in each of two "
                "threads, which would share masks and losses. Call it under a lock, or use a copy of it in each thread."
            )
        self._thread = threading.get_ident()

    def is_open_elsewhere(self, root: nn.Module) -> bool:
        """Tell whether another thread is amid a forward of the model."""
        if torch.compiler.is_compiling() or self._thread in (None, threading.get_ident()):
            return False
        return count_active_calls(root, thread=self._thread) > 0

    def _look_at_weights(self, root: nn.Module) -> None:
        """See, in the first forward, that weights are here, and in the second one, that w_pre is split as they are."""
        tracked = self.weights.tracked if self.weights is not None else ()
        if self.forwards.eager == 0:
            refuse_unready(tracked)
            if is_sharded(root):
                self._go_first(root)
            elif is_zero3(root):
                for one in self.weights.lora if self.weights is not None else ():
                    one.refuse_split()
                shard_pretrained(tracked)
                _go_last(root)
        elif self.forwards.eager == 1:
            shard_pretrained(tracked)
        if self.weights is not None:
            self.weights.warn_frozen()

    def _go_first(self, root: nn.Module) -> None:
        """Run before FSDP puts the root's weights together, so that the next pass sees all weights split."""
        self._handles[0].remove()
        self._handles[0] = root.register_forward_pre_hook(_begin, prepend=True)

    # -- optimizer steps ------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        for regularizer in self.regularizers:
            regularizer.before_step(optimizer, is_closure=is_closure)

    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        for regularizer in self.regularizers:
            regularizer.after_step(optimizer, is_closure=is_closure)

    def act_on_gradients(self) -> None:
        """Have methods that act in optimizer steps act in backward passes, as far as they can."""
        for regularizer in self.regularizers:
            self._handles += regularizer.act_on_gradients()

    def resume(self, steps: int) -> None:
        """Go on as after so many optimizer steps of a run that is resumed."""
        for regularizer in self.regularizers:
            regularizer.resume(steps)


def _go_last(root: nn.Module) -> None:
    """Have our hooks run after those of ZeRO-3, which put weights together, and take outputs through a function."""
    ordered: list[Any] = [*(module._forward_pre_hooks for module in root.modules()), root._forward_hooks]
    for hooks in ordered:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            hooks.move_to_end(key)


def find_patched(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the patched models that are, or are in, one of these; or else those that hold one of them."""
    models = list(models)
    parts = (module for model in models for module in unwrap(model).modules())
    return list(dict.fromkeys(one for one in parts if PATCH in one.__dict__)) or find_related(models, _patched)


def _begin(root: nn.Module, args: Any) -> None:  # noqa: ARG001
    patch: Patch = getattr(root, PATCH)
    patch.begin(root)


def _end(root: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    patch: Patch = getattr(root, PATCH)
    patch.end(root, output)
