"""Optimizer hooks that keep weights before a step, then take part of what it did to them and recall them to w_pre."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SettingError, SourceError
from surgery.escapes import get_logger

from ..marks import PATCH
from ..regularizer import Handle, Settings
from ..step_methods import StepRegularizer, held_weights, lr_of
from ..stepped import Stepped
from ..steps import is_captured
from ..weights.chosen import ChosenWeights
from ..weights.pretrained import Pretrained
from .settings import RecAdam

_log = get_logger(__name__)
T = "surgery_recadam_t"
"""The key of an optimizer's param_groups that holds t: it is saved and loaded with the optimizer's state."""


@dataclass(frozen=True)
class _Before:
    """A weight before a step: its w_pre, its values on this rank, and the lr of the step."""

    pretrained: Pretrained
    stepped: Stepped
    values: torch.Tensor
    lr: float

    @property
    def was_stepped(self) -> bool:
        """The step was for this weight: its gradient may be gone by now, or have come from a closure."""
        one = self.stepped
        return one.grad is not None or one.w.grad is not None or not torch.equal(one.values, self.values)


class RecAdamRegularizer(StepRegularizer):
    """RecAdam on one model: all parameters with a pretrained value, as long as they are trainable."""

    def __init__(self, settings: RecAdam, weights: ChosenWeights, others: Sequence[Settings]) -> None:  # noqa: ARG002
        super().__init__(settings.name, weights.of("parameters"))
        self.settings = settings
        self.t = 0
        """Optimizer steps of the model: more than `steps`, in a resumed run."""
        self._stepped: set[int] = set()  # weights that have had step t
        self._is_over = True  # the next step is not t, whatever its weights
        self._is_loaded = False  # load_state_dict has written to the weights since the last step
        self._now = 0  # t of the step that is under way
        self._before: list[_Before] = []
        self._is_told = False
        self._written: WeakKeyDictionary[Optimizer, dict[int, int]] = WeakKeyDictionary()  # t by the group's id

    def attach(self, root: nn.Module) -> list[Handle]:
        """Listen to load_state_dict; the other handle takes t off the optimizers that it was written to."""
        return [_Written(self), root.register_load_state_dict_post_hook(_note_load)]  # type: ignore[no-untyped-call]

    def note_load(self) -> None:
        """Note that load_state_dict has written to the weights: with a new optimizer, another training begins."""
        self._is_loaded = True

    # -- optimizer steps ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        """Keep the weights that this optimizer is about to change, unless lambda(t) is 1."""
        if getattr(optimizer, "found_inf", None):  # a fused optimizer skips by itself the step that GradScaler refuses
            return
        held = list(held_weights(optimizer, self._tracked, is_closure=is_closure))
        if not held or not self._open_step.enter(optimizer):
            return
        if is_captured(one.w for _, one in held):
            raise SourceError(
                "recadam: expected optimizer steps made by Python, got one captured in a CUDA graph, where lambda(t) "
                "would stay what it is. Capture forward and backward alone."
            )
        self._now = self._count_t(optimizer, {id(one.w) for _, one in held})
        self._before = []
        if self.settings.anneal(self._now) == 1:
            return
        for tracked, one in held:
            lr = lr_of("recadam", optimizer, one.group, "the pull is lr * gamma")
            self._check_pull(lr)
            self._before.append(_Before(tracked.ready(one.w), one, one.values.clone(), lr))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:  # noqa: ARG002
        """Take of each change what lambda(t) leaves, and recall the weights; write t down with the optimizer."""
        if not self._open_step.leave(optimizer):
            return
        if self._now != self.t:
            self.t = self._now
            self._stepped.clear()
        self._is_over = self._is_loaded = False
        share = self.settings.anneal(self.t)
        while self._before:
            before = self._before.pop()
            if before.was_stepped:
                pull = before.lr * (1 - share) * self.settings.gamma
                _recall(before, share, pull)
        ours = [one for _, one in held_weights(optimizer, self._tracked, is_closure=True)]
        self.steps += self._count.is_another(ours)
        written = self._written.setdefault(optimizer, {})
        for one in ours:
            one.group[T] = written[id(one.group)] = self.t
        self._stepped |= {id(one.w) for one in ours}

    def _count_t(self, optimizer: Optimizer, ids: set[int]) -> int:
        """Return t of a step: another one if the optimizer has a weight of the last one again.

        An optimizer whose state was loaded goes on where that was; a new one on weights that were loaded begins anew.
        """
        written = self._written.get(optimizer, {})
        saved = {id(group): group[T] for group in optimizer.param_groups if T in group}
        if read := [t for group, t in saved.items() if written.get(group) != t]:
            self.resume(max(read))
        elif not saved and self._is_loaded and self.t:
            _log.warning(
                "recadam: weights were loaded and the optimizer is new: t begins anew, after %d steps.", self.t
            )
            self.resume(0)
        is_another = self._is_over or not ids.isdisjoint(self._stepped)
        return self.t + 1 if is_another else self.t

    def resume(self, steps: int) -> None:
        """Go on with the schedule where a saved run was."""
        self.t = steps
        self._is_over = True

    def _check_pull(self, lr: float) -> None:
        """Refuse a pull that diverges; warn once of one that overshoots."""
        pull = lr * (1 - self.settings.anneal(self._now)) * self.settings.gamma
        got = f"expected an lr * gamma of at most 1, got {lr * self.settings.gamma:.3g} (lr {lr:.3g}"
        if pull > 2:
            raise SettingError(f"recadam: {got}): weights would diverge. Give a smaller gamma.")
        if pull > 1 and not self._is_told:
            self._is_told = True
            _log.warning("recadam: %s): each step overshoots w_pre. Give a smaller gamma.", got)

    # -- what came of it ------------------------------------------------------------------------------------------

    def facts(self, root: nn.Module) -> dict[str, Any]:  # noqa: ARG002
        return {"recalled": self.steps, "recadam_t": self.t}

    def figures(self) -> dict[str, Any]:
        return {"recadam_t": self.t, "recadam_lambda": self.settings.anneal(self.t)}

    def report(self) -> dict[str, Any]:
        return self.figures()

    def remarks(self) -> list[str]:
        if not self.steps or self.settings.anneal(self.t) >= 0.5:
            return []
        return [
            f"recadam: the training ended at step {self.t}, before t0 ({self.settings.t0:g}), so that pretrained "
            "weights were held where they were. Give a t0 of about half the steps."
        ]

    def logs(self, root: nn.Module) -> dict[str, float]:  # noqa: ARG002
        return self.figures()

    def forget_optimizers(self) -> None:
        """Take t off the optimizers that it was written to."""
        for optimizer in list(self._written):
            for group in optimizer.param_groups:
                group.pop(T, None)
        self._written = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        step = {"_before": [], "_stepped": set(), "_is_over": True, "_is_loaded": False}
        return {**self.__dict__, **step, "_written": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._written = WeakKeyDictionary()


@dataclass(frozen=True)
class _Written:
    """The handle of what was written to optimizers."""

    regularizer: RecAdamRegularizer

    def remove(self) -> None:
        self.regularizer.forget_optimizers()


def _note_load(root: nn.Module, incompatible_keys: Any) -> None:  # noqa: ARG001
    own = next(one for one in root.__dict__[PATCH].regularizers if isinstance(one, RecAdamRegularizer))
    own.note_load()


def _recall(before: _Before, share: float, pull: float) -> None:
    """Write w + share * change - pull * (w - w_pre) to a weight, w being what it was before the step.

    In float32 where the weight has half its precision, rounded once.
    """
    wide = torch.promote_types(before.values.dtype, torch.float32)
    old, new = before.values.to(wide), before.stepped.values
    w_pre = before.stepped.w_pre(before.pretrained).to(wide)
    new.copy_(torch.lerp(old, new.to(wide), share).add_(w_pre.sub(old), alpha=pull))
