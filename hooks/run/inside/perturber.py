"""class Perturber: adds noise once an optimizer has the weights, before fully_shard, and again after a late load."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SurgeryError, some
from surgery.recipe import TensorRecord

from ...refusals import handled
from ...stepped import parameters_of
from ..messages import LOADED_OVER, NOISE_OFF, RESUMED_WITHOUT
from ..options import NOISYTUNE, Options
from .adapters import LoadedValues, advise, has_adapter, refuse_unrepeatable
from .filters import Filters
from .loads import Loads
from .models import Model
from .noise import Noise
from .owners import find_tops
from .reporter import Reporter
from .snapshots import Snapshots
from .weakset import WeakSet

LAM, SEED = "surgery_lam", "surgery_seed"
"""Keys of an optimizer's param_groups."""


class Perturber:
    """Adds noise to the models of a process; does nothing if none is asked for.

    Args:
        options: what was asked for.
        filters: what leaves models and parameters out.
        loads: what load_state_dict has brought.
        reporter: is told what was refused.
    """

    def __init__(self, options: Options, filters: Filters, loads: Loads, reporter: Reporter) -> None:
        self._options = options
        self._filters = filters
        self._loads = loads
        self._reporter = reporter
        self._resumed_without = WeakSet()  # what goes on from a run that had no noise
        self._deferred = WeakSet()
        self._marked: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()  # the ids of groups
        self._loaded = LoadedValues()
        self._noise: Noise | None = None
        if options.noisytune is not None:
            self._noise = Noise(options.noisytune, options.noise_seed, loads.overwritten)

    @property
    def is_asked(self) -> bool:
        return self._noise is not None

    @property
    def original(self) -> Snapshots | None:
        """The weights from before the noise, None if none is asked for."""
        return self._noise.original if self._noise is not None else None

    def defer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add noise to these no sooner than their model is called: it may be the new head of another one."""
        self._deferred.add(parameters)

    def perturb(self, top: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Add noise to the pretrained parts of a model that hold one of these parameters."""
        if self._noise is None:
            return
        try:
            with handled():
                if not self._noise.has_any(top.parameters()):
                    refuse_unrepeatable(top, self._loaded)
                self._noise.add(top, trained, list(self._loads.filled), *self._filters.parameter_globs(top))
        except SurgeryError as error:
            self._reporter.refuse([NOISYTUNE], top, str(error))
            return
        if has_adapter(top):
            self._reporter.add_note(f"{type(top).__name__}: {advise(top, self._noise.recipes(top))}")

    def keep_loaded(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note what was loaded into these."""
        if self._noise is not None:
            self._loaded.keep(parameters)

    def before_fully_shard(self, module: nn.Module) -> None:
        """Perturb what fully_shard is about to split, which is too late for it then."""
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if self._noise is None or self._noise.has_seen(trainable):
            return
        for top, parameters in find_tops(trainable):
            if not any(parameter.is_meta for parameter in top.parameters()) and self._filters.is_included(top):
                self.perturb(top, parameters)

    def after_load(self, loaded: Sequence[nn.Parameter], models: Iterable[Model]) -> None:
        """Report a load that has taken the noise off a model that is trained, as between the folds of a loop."""
        self.keep_loaded(loaded)
        for model in models:
            own = [one for one in loaded if model.holds([one])]
            self._report_noise_off(model, own)

    def at_end(self, models: Iterable[Model]) -> None:
        """Report weights that are again what they were before the noise, whoever wrote them."""
        for model in models:
            if (root := model.root) is not None:
                self._report_noise_off(model, list(root.parameters()))
            self._report_unread(model)

    def _report_unread(self, model: Model) -> None:
        """Report noise that has no effect."""
        if not (unread := model.unread):
            return
        what = f"noise on {len(unread)} weights ({some(unread)}) has no effect, for no gradient has come to them."
        if model.has_read_noise:
            self._reporter.add_note(f"noisytune: {model.name}: {what}")
        else:
            model.acts.discard(NOISYTUNE)
            self._reporter.add_fault(f"noisytune: {model.name}: {what}")

    def _report_noise_off(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        if self._noise is not None and self._noise.probes.is_any_as_before(parameters):
            model.acts.discard(NOISYTUNE)
            self._noise.note_off(parameters)
            self._reporter.add_fault(f"noisytune: {model.name}: {NOISE_OFF}")

    def mark(self, optimizer: Optimizer) -> None:
        """Have an optimizer's state_dict say which noise its weights have, for a later run to know what it resumes.

        Not before its first step: accelerate loads an optimizer's own state_dict into it, which resumes nothing.
        """
        marked = self._marked.setdefault(optimizer, set())
        if self._noise is None or marked.issuperset(map(id, optimizer.param_groups)):
            return
        for group, parameters in parameters_of(optimizer):
            if parameters:  # else it is a group that ZeRO steps later
                marked.add(id(group))
            if LAM not in group and self._noise.has_any(parameters):
                group.update(self._marks)

    def on_optimizer_state_loaded(self, optimizer: Optimizer, groups: Iterable[Mapping[str, Any]]) -> None:
        """Take in which noise the run had that an optimizer goes on with."""
        if self._noise is None:
            return
        held = list(parameters_of(optimizer))
        late = [one for _, parameters in held for one in parameters if one in self._deferred]
        for top, parameters in find_tops(one for one in late if one not in self._loads.without_noise):
            self.perturb(top, parameters)  # to be taken off again, as from all that had it when it was saved
        for (_, parameters), saved in zip(held, groups, strict=False):
            marks = {name: saved.get(name) for name in self._marks}
            if marks[LAM] is None:
                self._resumed_without.add(parameters)
            elif marks != self._marks and self._noise.has_any(parameters):
                self._noise.note_other(parameters, saved[LAM], saved[SEED])
                self._reporter.add_note(
                    f"noisytune: resumed with lam {self._marks[LAM]:g} and seed {self._marks[SEED]}, but the run began "
                    f"with lam {marks[LAM]:g} and seed {marks[SEED]}: its noise is what the weights have."
                )

    @property
    def _marks(self) -> dict[str, Any]:
        return {LAM: self._options.noisytune, SEED: self._options.noise_seed}

    def before_patch(self, root: nn.Module, *, has_stepped: bool) -> None:
        """Add noise to what came after the optimizer; take it off again if it was added to a resumed run's weights.

        Args:
            has_stepped: the weights have been trained since, so that the noise cannot be looked for in them.
        """
        parameters = list(root.parameters())
        if not self._loads.is_resumed(parameters):
            self._loads.treat_as_pretrained(parameters)
        if self._noise is not None and self._loads.without_noise.has_any(parameters):
            self._noise.forget(parameters)
            self.perturb(root, parameters)
        elif self._deferred.has_any(parameters):
            self.perturb(root, parameters)
        if self._loads.is_pretrained_unknown(parameters):
            self._reporter.add_note(
                f"{type(root).__name__}: resumed, without the pretrained weights in sight: w_pre is what the weights "
                "were then, and noise is what the run began with."
            )
            if self._noise is not None:
                self._noise.undo(parameters)
        if self._noise is not None and not has_stepped:
            self._check_noise(self._noise, root, parameters)

    def _check_noise(self, noise: Noise, root: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Make sure that weights which are about to be trained have their noise; report those that have not."""
        if self._loads.is_resumed(parameters):
            if self._resumed_without.has_any(parameters):
                self._refuse(noise, root, parameters, RESUMED_WITHOUT)
            return
        lost, probed = noise.probes.lost(parameters)
        if lost and lost == probed and not self._loads.overwritten.has(parameters):
            noise.forget(parameters)  # they were written to in place, after the optimizer was made
            self.perturb(root, parameters)
        elif lost and lost == probed:
            self._refuse(noise, root, parameters, LOADED_OVER)
        elif lost:
            text = f"{lost} of {probed} weights have other values than the noise gave them: they were written to since."
            self._reporter.add_note(f"noisytune: {type(root).__name__}: {text}")

    def _refuse(self, noise: Noise, root: nn.Module, parameters: Sequence[nn.Parameter], reason: str) -> None:
        self._loads.overwritten.replace(parameters, noise.original)  # w_pre is without noise, as the weights are
        noise.forget(parameters)
        self._reporter.refuse([NOISYTUNE], root, reason)

    def after_patch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep these weights from before the noise no longer, but for frozen ones of which they will be w_pre."""
        if self._noise is not None:
            is_wanted = self._options.w_pre == "original"
            self._noise.original.drop(one for one in parameters if one.requires_grad or not is_wanted)

    def records(self, root: nn.Module) -> list[TensorRecord]:
        """Return what was done to the tensors of a model."""
        return self._noise.records(root) if self._noise is not None else []

    def noisy(self, root: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a model that have noise, by name."""
        named = root.named_parameters()
        return {name: w for name, w in named if self._noise is not None and self._noise.probes.has(w)}

    def is_undone(self, root: nn.Module) -> bool:
        """Tell whether the noise was taken off a part of a model again."""
        return self._noise is not None and self._noise.is_undone(root)

    def move(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Follow parameters that were replaced by others of their names."""
        if self._noise is not None:
            self._noise.move(before, after)
