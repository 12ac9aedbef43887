"""class Patcher: patch_model with the options of a run, on the weights that a model has now or had before a load."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SettingError, SurgeryError, by_reason

from ...checks import is_compiled, take_root
from ...lifecycle import Patch
from ...patch import find_patch, put_patch
from ...refusals import handled
from ...regularizer import Settings
from ...weights.lora import find_lora
from ...weights.selection import excluded
from ..options import Options
from .filters import Filters
from .reporter import Reporter
from .snapshots import Snapshots


class Patcher:
    """Patches models.

    Args:
        options: what was asked for.
        filters: which parameters are left out.
        pretrained: w_pre where it is not what the weights are now.
        reporter: is told what was refused.
    """

    def __init__(self, options: Options, filters: Filters, pretrained: Snapshots, reporter: Reporter) -> None:
        self._options = options
        self._filters = filters
        self._pretrained = pretrained
        self._reporter = reporter
        self.open_step: Optimizer | None = None
        """One whose closure is at work: the step has begun before the patch."""

    @property
    def is_asked(self) -> bool:
        """There is more to do than to add noise."""
        return bool(self._options.methods)

    def patch(self, module: nn.Module, root: nn.Module, *, is_head: bool, is_only: bool) -> Patch | None:
        """Patch a model with what fits it; None if nothing does, or nothing but noise is asked for.

        Args:
            module: what the script calls, which may be compiled or a wrapper.
            root: the model in it.
            is_head: it is new, so that nothing acts on its weights.
            is_only: no other model has all that is asked for. Then what fits is put on also if the refusal of the rest
                ends the run at its first step, for what is refused no sooner than there to be told as well.
        """
        methods = tuple(one for one in self._options.methods if one.acts_on is None or not is_head)
        if not methods:
            return None
        with handled():
            try:
                self._put(module, root, methods)
            except SurgeryError:
                self._put_those_that_fit(module, root, methods, is_wanted=is_only or self._options.allow_inactive)
        patch = find_patch(root)
        for regularizer in patch.regularizers if patch is not None else ():
            regularizer.may_step_aside = self._options.allow_inactive
        if patch is not None and self.open_step is not None:
            patch.before_step(self.open_step, is_closure=True)
        if any(map(is_compiled, module.modules())):
            torch.compiler.reset()  # graphs made before know nothing of the patch
        return patch

    def _put(self, module: nn.Module, root: nn.Module, methods: tuple[Settings, ...]) -> None:
        acts_on_weights = any(one.acts_on is not None for one in methods)
        globs = self._filters.parameter_globs(root) if acts_on_weights else (None, None)
        take_root(module, may_be_compiled=True)
        if self._options.w_pre == "original" and any(one.acts_on == "layers" for one in methods):
            self._refuse_noisy_base(root)
        with self._pretrained.restored(root.parameters()):
            put_patch(root, methods, include=globs[0], exclude=globs[1], may_wait=True)

    def _refuse_noisy_base(self, root: nn.Module) -> None:
        """Refuse w_pre without the noise that LoRA's frozen base has: w_pre is that base, of which no copy is kept."""
        globs = self._filters.parameter_globs(root)
        for one in find_lora(root)[0]:
            is_wanted = one.is_trainable and excluded((one.name, *one.names), *globs) is None
            if is_wanted and isinstance(one.base, nn.Parameter) and self._pretrained.has([one.base]):
                raise SettingError(
                    f"w_pre: expected perturbed for LoRA ({one.name}), whose frozen weight has the noise, got "
                    "original. Leave it out, or name LoRA's layers in exclude."
                )

    def _put_those_that_fit(
        self, module: nn.Module, root: nn.Module, methods: Sequence[Settings], *, is_wanted: bool
    ) -> None:
        """Report the methods that are refused, those of one reason together; put on the others, if they are wanted."""
        fit, reasons = [], []
        for one in methods:
            try:
                self._put(module, root, (one,))
            except SurgeryError as error:
                reasons.append((one.name, str(error)))
            else:
                fit.append(one)
                if patch := find_patch(root):
                    patch.detach(root)  # no unpatch_model, which wants a model between its forwards
        for reason, names in by_reason(reasons).items():
            self._reporter.refuse(names, root, reason)
        if fit and is_wanted:
            self._put(module, root, tuple(fit))

    def take_w_pre(self, root: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Take w_pre of weights that were frozen until now."""
        patch = find_patch(root)
        if patch is not None and patch.weights is not None:
            with self._pretrained.restored(parameters):
                patch.weights.take_late(parameters)
