"""class Patcher: patch_model with the options of a run, on the weights that a model has now or had before a load."""

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SurgeryError

from ...checks import is_compiled, take_root
from ...lifecycle import Patch
from ...patch import find_patch, put_patch
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

    def patch(self, module: nn.Module, root: nn.Module) -> Patch | None:
        """Patch a model; None if it is refused, or nothing but noise is asked for.

        Args:
            module: what the script calls, which may be compiled or a wrapper.
            root: the model in it.
        """
        if not self.is_asked:
            return None
        options = self._options
        globs = self._filters.parameter_globs(root) if options.acts_on_weights else (None, None)
        try:
            take_root(module, may_be_compiled=True)
            with self._pretrained.restored(root.parameters()):
                put_patch(root, options.methods, include=globs[0], exclude=globs[1])
        except SurgeryError as error:
            self._reporter.refuse("patch_model", root, error)
        patch = find_patch(root)
        if patch is not None and self.open_step is not None:
            patch.before_step(self.open_step, is_closure=True)
        if any(map(is_compiled, module.modules())):
            torch.compiler.reset()  # graphs made before know nothing of the patch
        return patch
