"""The models that a run has changed, by weak reference, and their entries of the report, which outlive them."""

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.live.parts import NEW
from surgery.recipe import TensorRecord

from ...lifecycle import Patch
from ...refusals import handled
from ...registry import METHODS
from ...stepped import StepCount, Stepped
from ..options import NOISYTUNE
from .history import History
from .weakset import WeakSet


class Model:
    """One model of a run. It does not keep it alive.

    Args:
        root: what the script calls, as far as is known.
        noise: what NoisyTune did to its tensors.
        patch: what else was done to it.
        noisy: its parameters that have noise, by name.
        is_resumed: it goes on from weights that NoisyTune was applied to when the run began.
    """

    def __init__(
        self,
        root: nn.Module,
        noise: Sequence[TensorRecord],
        patch: Patch | None,
        *,
        noisy: Mapping[str, nn.Parameter],
        is_resumed: bool,
    ) -> None:
        self.steps = 0
        """Optimizer steps with a gradient of one of its weights."""
        self.methods = {one.name for one in patch.settings} if patch is not None else set()
        """Those of the registry that are at work on it."""
        self.is_resumed = is_resumed
        self.acts: set[str] = {NOISYTUNE} if is_resumed else set()
        """The regularizers that have had an effect on it."""
        self.remarks: list[str] = []
        """What should be known of them at the end."""
        self._noisy: set[str] = set()
        self._without_gradient: dict[str, weakref.ref[nn.Parameter]] = {}
        self._root = weakref.ref(root)
        self._patch = weakref.ref(patch) if patch is not None else None
        parameters = dict(root.named_parameters())
        new = {tensor.name for tensor in noise if tensor.copied == NEW}
        if patch is not None and patch.weights is not None:
            new = patch.weights.fresh
        self.parameters = WeakSet(parameters.values())
        self.waiting = WeakSet(one for one in parameters.values() if not one.requires_grad)
        """Frozen parameters, which may be trained later."""
        self._entry: dict[str, Any] = {
            "class": type(root).__name__,
            "parameters": len(parameters),
            "perturbed": 0,
            "new": sorted(new & parameters.keys()),
            "w_pre_bytes": 0,
            "steps": 0,
            **{name: idle for kind in METHODS for name, idle in kind.idle_report.items()},
            "distance": None,
        }
        self._history = History()
        self._count = StepCount()
        self._take_noise(noise, noisy)
        # it keeps the layers, not the root, which may therefore go; a root that is a layer would stay
        owners = patch.weights.owners if patch is not None and patch.weights is not None else ()
        if patch is not None and not any(module is root for module in owners):
            weakref.finalize(root, self._measure, patch, is_last=True).atexit = False

    def _take_noise(self, noise: Sequence[TensorRecord], noisy: Mapping[str, nn.Parameter]) -> None:
        added = {name: w for name, w in noisy.items() if name not in self._noisy}
        self._noisy |= added.keys()
        self._without_gradient |= {name: weakref.ref(w) for name, w in added.items() if w.requires_grad}
        self._entry["perturbed"] = sum(tensor.copied is None for tensor in noise)
        if self._entry["perturbed"]:
            self.acts.add(NOISYTUNE)

    @property
    def name(self) -> str:
        return str(self._entry["class"])

    @property
    def root(self) -> nn.Module | None:
        """The model, while the script keeps it."""
        return self._root()

    @property
    def patch(self) -> Patch | None:
        """What was put on it, as long as it is."""
        return self._patch() if self._patch is not None else None

    @property
    def is_alive(self) -> bool:
        return self._root() is not None

    def holds(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Tell whether one of these is the model's own."""
        return self.is_alive and self.parameters.has_any(parameters)

    def stop_waiting(
        self,
        parameters: Iterable[nn.Parameter],
        noise: Sequence[TensorRecord],
        noisy: Mapping[str, nn.Parameter],
    ) -> None:
        """Take in that parameters are trained, and what NoisyTune has done to its tensors by now."""
        self.waiting.remove(parameters)
        self._take_noise(noise, noisy)

    @property
    def unread(self) -> list[str]:
        """Names of the trainable weights that have noise, but that no gradient has come to."""
        return list(self._without_gradient) if self.steps else []

    @property
    def has_read_noise(self) -> bool:
        """Some of its noise has an effect, as far as is known."""
        return len(self.unread) < len(self._noisy)

    def on_gradients(self, changed: Sequence[Stepped]) -> None:
        """Count an optimizer's step, if one of the parameters that it changes is the model's own."""
        if self.holds(one.w for one in changed):
            self.steps += self._count.is_another(changed)
            waiting = self._without_gradient.items()
            ids = {id(of()) for _, of in waiting}
            reached = {id(one.w) for one in changed if id(one.w) in ids and one.is_reached}
            self._without_gradient = {
                name: of for name, of in waiting if id(of()) not in reached and not _is_read_or_frozen(of())
            }

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        self.parameters.move(before, after)
        self.waiting.move(before, after)
        new = {id(w): after[name] for name, w in before.items() if name in after}
        for name, of in self._without_gradient.items():
            if id(of()) in new:
                self._without_gradient[name] = weakref.ref(new[id(of())])

    def is_complete(self, asked: Collection[str]) -> bool:
        """Tell whether it has all regularizers that are asked for."""
        return {*asked} <= self.methods | ({NOISYTUNE} & self.acts)

    def entry(self, *, is_last: bool) -> dict[str, Any]:
        """Return the model's entry of the report, with its figures over time as `history`.

        Args:
            is_last: measure the distance as well, which reads all weights.
        """
        patch = self.patch
        if patch is not None:
            self._measure(patch, is_last=is_last)
            self._add_to_history(patch)
        perturbed = self._entry["perturbed"] - len(self.unread)
        return self._entry | {"steps": self.steps, "perturbed": perturbed, "history": self._history.rows}

    def _add_to_history(self, patch: Patch) -> None:
        distance = partial(patch.weights.distance, is_whole=False) if patch.weights is not None else None
        figures = {name: self._entry[name] for kind in METHODS for name in kind.idle_report if name in self._entry}
        known = {name: value for name, value in figures.items() if value is not None}
        self._history.add({"steps": self.steps, **known}, distance)

    def _measure(self, patch: Patch, *, is_last: bool) -> None:
        for settings, regularizer in zip(patch.settings, patch.regularizers, strict=True):
            self._entry |= regularizer.report()
            if regularizer.has_acted:
                self.acts.add(settings.name)
        self.remarks = [text for one in patch.regularizers for text in one.remarks()]
        if patch.weights is None:
            return
        self._entry["w_pre_bytes"] = patch.weights.nbytes
        if is_last:
            with handled(), suppress(SurgeryError):  # another tool has taken the weights away
                self._entry["distance"] = patch.weights.distance(is_whole=False)


def _is_read_or_frozen(w: nn.Parameter | None) -> bool:
    return w is not None and (w.grad is not None or not w.requires_grad)


class Models:
    """The models of a process that something was done to, in the order in which it was."""

    def __init__(self) -> None:
        self._models: list[Model] = []

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models)

    def add(self, model: Model) -> None:
        self._models.append(model)

    def hold(self, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter is one of a model's own."""
        return any(model.holds([parameter]) for model in self._models)

    def act_on_gradients(self) -> None:
        """Have the methods on all that is alive act in backward passes, on what is trainable by now."""
        for model in self._models:
            if (patch := model.patch) is not None and model.is_alive:
                patch.act_on_gradients()

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters of all that have a gradient."""
        roots = [root for model in self._models if (root := model.root) is not None]
        return [one for root in roots for one in root.parameters() if one.grad is not None]

    def count_step(self, changed: Sequence[Stepped]) -> None:
        """Count an optimizer's step for the models of these parameters."""
        for model in self._models:
            model.on_gradients(changed)

    def is_any_complete(self, asked: Collection[str]) -> bool:
        """Tell whether one of them has all regularizers that are asked for."""
        return any(model.is_complete(asked) for model in self._models)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        for model in self._models:
            model.move(before, after)
