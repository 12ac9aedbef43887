"""Which training steps R-Drop takes part in, a step being an optimizer's."""

from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SourceError

from .optimizers import StepWatch


class Schedule:
    """Counts the steps of the optimizers that hold a model's weights.

    Args:
        every: of so many steps, the last one is due.
    """

    def __init__(self, every: int) -> None:
        self.steps = 0
        self._every = every
        self._has_stepped = False
        self._is_stepping = False
        self._watch = StepWatch()
        self._weights: set[int] = set()

    @property
    def is_due(self) -> bool:
        return (self.steps + 1) % self._every == 0

    def know(self, root: nn.Module) -> list[nn.Parameter]:
        """Look up the trainable weights, which fully_shard replaces."""
        weights = [parameter for parameter in root.parameters() if parameter.requires_grad]
        self._weights = set(map(id, weights))
        return weights

    def count(self, root: nn.Module) -> None:
        """Begin another step if an optimizer has stepped since the last forward; several of them make one step.

        Raises:
            SourceError: no step can be counted, as the weights change without one.
        """
        self.steps += self._has_stepped
        self._has_stepped = False
        weights = self.know(root)
        if self._is_stepping:  # LBFGS moves the weights between the forwards of a step
            return
        if self._every > 1 and weights and self._watch.is_missed(weights[0], self.steps):
            raise SourceError(
                "every: expected steps of a torch.optim.Optimizer to count, got weights that change without one. "
                "Use such an optimizer, built from the model's own parameters, or every=1."
            )

    def resume(self, steps: int) -> None:
        """Go on as after so many steps."""
        self.steps = steps
        self._has_stepped = False

    def begin_step(self) -> None:
        self._is_stepping = True

    def end_step(self, optimizer: Optimizer) -> None:
        self._is_stepping = False
        self._has_stepped = self._has_stepped or self.holds(optimizer)

    def has_gradient(self, optimizer: Optimizer) -> bool:
        """Tell whether one of its gradients is not 0, as all of them are where somebody only wants its state made."""
        return any(
            w.grad is not None and bool(w.grad.any()) for group in optimizer.param_groups for w in group["params"]
        )

    def holds(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer is about to change one of the weights."""
        return any(
            id(w) in self._weights and w.grad is not None for group in optimizer.param_groups for w in group["params"]
        )
