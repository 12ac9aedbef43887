"""class Noise: what perturb_model has been applied to, so that it is once on each weight, and can be undone."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from multiprocessing import parent_process

from torch import nn

from surgery.errors import SourceError
from surgery.live.applied_noise import forget_noise, note_noise
from surgery.live.parts import NEW, pretrained_parts, unwrap
from surgery.recipe import Recipe, TensorRecord

from ...weights.peft_layers import find_copies
from ...weights.selection import is_match
from ...weights.sources import LOADED
from .probes import Probes
from .snapshots import Snapshots
from .weakset import WeakSet


@dataclass
class _NoisyPart:
    """A part of a model that noise was added to.

    Args:
        parameters: its own.
        recipe: what was done to them.
        module: that has them.
        is_undone: the noise was taken off again.
    """

    parameters: WeakSet
    recipe: Recipe
    module: "weakref.ref[nn.Module]"
    is_undone: bool = False


class Noise:
    """What the noise has been added to.

    Args:
        lam, seed: of the noise.
        pretrained: what loads have overwritten since: the noise is for that.
    """

    def __init__(self, lam: float, seed: int, pretrained: Snapshots) -> None:
        self._lam = lam
        self._seed = seed
        self._pretrained = pretrained
        self._perturbed: list[_NoisyPart] = []
        self.original = Snapshots()
        """What the weights were before."""
        self.probes = Probes()
        """Of the weights that it was added to."""

    def add(
        self,
        top: nn.Module,
        trained: Iterable[nn.Parameter],
        loaded: Sequence[nn.Module],
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        """Perturb the pretrained parts of a model that are trained; the whole model if it has no pretrained part.

        Args:
            trained: parameters; a part without any, such as a teacher or a body under a new head, is left alone.
            loaded: modules that load_state_dict has filled.
            include, exclude: globs of the model's parameters.
        Raises:
            SurgeryError: as perturb_model, or other processes have the same weights. No part is half perturbed.
        """
        from surgery.live.perturb import perturb_model, refuse_flattened  # imports kernels

        refuse_flattened(top)  # its parts do not show it
        for path, part in _parts(top, set(map(id, trained)), loaded):
            parameters = list(part.parameters())
            if any(one.parameters.has_any(parameters) for one in self._perturbed):
                continue
            _refuse_shared(parameters)
            self.original.keep(parameters)
            with self._pretrained.restored(parameters, is_updating=True):
                if self._pretrained.has(parameters):
                    self.original.drop(parameters)
                    self.original.keep(parameters)
                names = _excluded_names(part, path, include, exclude)
                with self.probes.taken(parameters):
                    recipe = perturb_model(part, lam=self._lam, seed=self._seed, exclude=names, again=True)
            self._perturbed.append(_NoisyPart(WeakSet(parameters), recipe, weakref.ref(part)))

    def has_any(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Tell whether one of these is in a part that was perturbed."""
        return any(one.parameters.has_any(parameters) for one in self._perturbed)

    def has_seen(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Tell whether all of these are in parts that were perturbed."""
        return all(any(parameter in one.parameters for one in self._perturbed) for parameter in parameters)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        self.original.move(before, after)
        self.probes.move(before, after)
        for one in self._perturbed:
            one.parameters.move(before, after)

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let noise be added to these once more: they have got other values."""
        self.original.drop(parameters)
        self.probes.drop(parameters)
        self.note_off(parameters)
        for one in self._perturbed:
            if one.parameters.has_any(parameters):
                one.parameters.clear()

    def note_off(self, parameters: Sequence[nn.Parameter]) -> None:
        """Have trackers told of no noise on these: it is not in them any more."""
        for one in self._perturbed:
            if one.parameters.has_any(parameters) and (module := one.module()) is not None:
                forget_noise(module)

    def note_other(self, parameters: Sequence[nn.Parameter], lam: float, seed: int) -> None:
        """Have trackers told of the noise that these have from the run that they go on from."""
        for one in self._perturbed:
            if one.parameters.has_any(parameters) and (module := one.module()) is not None:
                note_noise(module, replace(one.recipe.settings, lam=lam, seed=seed))

    def undo(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the noise off again."""
        self.original.restore(parameters)
        self.probes.drop(parameters)
        for one in self._perturbed:
            one.is_undone = one.is_undone or one.parameters.has_any(parameters)

    def is_undone(self, root: nn.Module) -> bool:
        """Tell whether it was taken off a part of a model again."""
        return any(one.is_undone and one.parameters.has_any(root.parameters()) for one in self._perturbed)

    def recipes(self, root: nn.Module) -> list[Recipe]:
        """Return what was done to the parts of a model."""
        parameters = list(root.parameters())
        return [one.recipe for one in self._perturbed if not one.is_undone and one.parameters.has_any(parameters)]

    def records(self, root: nn.Module) -> list[TensorRecord]:
        """Return what was done to the tensors of a model; to one that PEFT keeps a copy of, once."""
        named = ({tensor.name: tensor for tensor in recipe.tensors} for recipe in self.recipes(root))
        return [tensor for tensors in named for tensor in tensors.values()]


def _refuse_shared(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse weights in memory that the process which started this one has as well: each of its children adds noise."""
    if parent_process() is not None and any(one.device.type == "cpu" and one.is_shared() for one in parameters):  # type: ignore[no-untyped-call]
        raise SourceError(
            "weights: expected some of this process alone, got some shared with others, each of which would add noise. "
            "Call surgery perturb on the checkpoint, and leave noisytune out."
        )


def _parts(top: nn.Module, trained: Set[int], loaded: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield what is pretrained and trained of a model, with its path. What is new beside pretrained parts is none."""
    parts = list(pretrained_parts(top)) or _filled_parts(top, loaded) or [("", top)]
    yield from ((path, part) for path, part in parts if _is_trained(part, trained) or _has_prompt(top, path, trained))


def _is_trained(module: nn.Module, trained: Set[int]) -> bool:
    return not trained.isdisjoint(map(id, module.parameters()))


def _has_prompt(top: nn.Module, path: str, trained: Set[int]) -> bool:
    """Tell whether PEFT trains something for a part beside it, such as a prompt."""
    names = path.split(".")
    around = [top.get_submodule(".".join(names[:count])) for count in range(len(names))] if path else []
    return any(hasattr(one, "peft_config") and _is_trained(one, trained) for one in around)


def _filled_parts(top: nn.Module, loaded: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    filled = {id(unwrap(module)) for module in loaded}
    parts: list[tuple[str, nn.Module]] = []
    for path, module in top.named_modules():
        if id(module) in filled and not any(f"{path}.".startswith(f"{outer}.".lstrip(".")) for outer, _ in parts):
            parts.append((path, module))
    return parts


def _excluded_names(part: nn.Module, path: str, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the checkpoint's names of what is not to be perturbed."""
    parameters = dict(part.named_parameters(remove_duplicate=False))
    is_marked = any(hasattr(parameter, LOADED) for parameter in parameters.values())
    originals = find_copies(part)
    left = set()
    for name in parameters:
        live = f"{path}.{name}".lstrip(".")
        is_new = is_marked and not hasattr(parameters[originals.get(name, name)], LOADED)
        is_out = any(is_match(glob, live) for glob in exclude)
        if is_new or is_out or (include and not any(is_match(glob, live) for glob in include)):
            left.add(name)
    if not left:
        return []
    from surgery.live.names import find_names  # imports all that reads checkpoints

    names = find_names(part, None)
    return sorted({names.canonical[name] for name in left if names.copied.get(name) != NEW})
