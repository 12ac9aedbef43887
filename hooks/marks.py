"""What a patch leaves on the modules of a model, and what becomes of it in a copy of a part of the model."""

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lifecycle import Patch


class Mark:
    """Something that a Patch leaves on a module: an orphan without one, until a Patch adopts it.

    deepcopy and pickle take a module's marks along. If the whole model went, its Patch did as well and adopts them; if
    a part did, nobody would ever take them off again.
    """

    _patch: "weakref.ref[Patch] | None" = None

    def adopt(self, patch: "Patch") -> None:
        self._patch = weakref.ref(patch)

    @property
    def is_copy(self) -> bool:
        """It was copied or unpickled without its Patch."""
        return self._patch is None

    @property
    def is_orphan(self) -> bool:
        """It is a copy, or its Patch is gone with its model."""
        return self._patch is None or self._patch() is None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_patch"}
