"""Counter of torch.optim steps, for R-Drop to act on each `every`-th one only."""

from collections.abc import Iterator

from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SourceError

from ..stepped import Stepped, about_to_change
from ..steps import StepWatch


class Schedule:
    """Counts the steps of the optimizers that have weights of a model in their groups.

    Args:
        every: the last of so many steps is due.
    """

    def __init__(self, every: int) -> None:
        self.steps = 0
        self._every = every
        self._has_stepped = False
        self._is_stepping = False
        self._watch = StepWatch()
        self._parameter_dicts: list[dict[str, nn.Parameter | None]] = []

    @property
    def is_due(self) -> bool:
        return (self.steps + 1) % self._every == 0

    def find_weights(self, root: nn.Module) -> list[nn.Parameter]:
        """Keep the modules' _parameters, whose values fully_shard keeps replacing; return the trainable ones."""
        self._parameter_dicts = [module._parameters for module in root.modules() if module._parameters]
        return [
            w for parameters in self._parameter_dicts for w in parameters.values() if w is not None and w.requires_grad
        ]

    def begin_forward(self, root: nn.Module) -> None:
        """Count a step if an optimizer has stepped since the last forward; steps of several optimizers count once.

        Raises:
            SourceError: steps cannot be counted: the weights change without one.
        """
        self.steps += self._has_stepped
        self._has_stepped = False
        weights = self.find_weights(root)
        if self._is_stepping:  # LBFGS moves the weights between the forwards of a step
            return
        if self._every > 1 and weights and self._watch.is_missed(weights[0], self.steps):
            raise SourceError(
                "every: expected steps of a torch.optim.Optimizer to count, got weights that change without one. "
                "Use such an optimizer, built from the model's own parameters, or every=1."
            )

    def resume(self, steps: int) -> None:
        """Go on counting as after so many steps, with a training that is resumed."""
        self.steps = steps
        self._has_stepped = False

    def begin_step(self, optimizer: Optimizer, *, is_closure: bool) -> None:
        self._is_stepping = True
        if not is_closure:
            self._note_step(optimizer)

    def end_step(self, optimizer: Optimizer) -> None:
        self._is_stepping = False
        self._note_step(optimizer)

    def _note_step(self, optimizer: Optimizer) -> None:
        """Note a step that has gradients: before it, for it may clear them, and after it, for a closure brings them."""
        self._has_stepped = self._has_stepped or next(self.held(optimizer), None) is not None

    def held(self, optimizer: Optimizer) -> Iterator[Stepped]:
        """Yield the weights that an optimizer is about to change."""
        return about_to_change(optimizer, (w for parameters in self._parameter_dicts for w in parameters.values()))
