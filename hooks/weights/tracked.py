"""A live parameter and its w_pre, which is taken when the model is patched, or when a frozen one is unfrozen."""

import torch

from surgery.errors import SourceError

from .offload import Offload
from .pretrained import Pretrained, keep, values_of
from .target import Target


class Tracked:
    """One weight that methods act on, with its w_pre.

    Args:
        target: the weight, with the modules that use it.
        offload: fetches w_pre from the CPU's memory; None: w_pre lies beside the weight.
    """

    def __init__(self, target: Target, offload: Offload | None) -> None:
        self.target = target
        self.pretrained: Pretrained | None = None  # as long as the weight is frozen
        self._version = target.weight._version
        self._offload = offload

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def weight(self) -> torch.Tensor:
        """The live parameter."""
        return self.target.weight

    @property
    def values(self) -> torch.Tensor | None:
        """w_pre, dense or a DTensor; None if it has not been taken yet, or has stayed behind a pickle."""
        return self.pretrained.values if self.pretrained is not None else None

    def take(self, values: torch.Tensor, *, is_own: bool = False) -> None:
        """Make w_pre of `values`: of a copy, unless they are nobody else's."""
        self.pretrained = keep(self.name, self.weight, values, self._offload, is_own=is_own)

    def follow(self, former: "Tracked") -> None:
        """Go on watching a weight that was frozen when it was first patched."""
        self._version = former._version

    def ready(self, w: torch.Tensor) -> Pretrained:
        """Return w_pre; take it now if `w` was frozen until now.

        Raises:
            SourceError: it has been written to while it was frozen, and so may not be pretrained any more.
        """
        if self.pretrained is None:
            if w is not self.weight or w._version != self._version:
                raise SourceError(
                    f"{self.name}: expected a weight as it was when it was frozen, got one that has been written to "
                    "since patch_model. Call patch_model(model, w_pre=...) after unfreezing it."
                )
            self.take(values_of(w))
        assert self.pretrained is not None
        return self.pretrained
