"""The live-model side: regularizers that are patched into a model, and undone without a trace."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .description import Description as Description
    from .patch import patch_model as patch_model
    from .patch import patched as patched
    from .patch import unpatch_model as unpatch_model
    from .report import describe as describe
    from .report import stats as stats
    from .settings import Anchor as Anchor
    from .settings import Mixout as Mixout
    from .settings import RDrop as RDrop
    from .trainer import SurgeryCallback as SurgeryCallback

_HOMES = {
    "Anchor": "settings",
    "Description": "description",
    "Mixout": "settings",
    "RDrop": "settings",
    "SurgeryCallback": "trainer",
    "describe": "report",
    "patch_model": "patch",
    "patched": "patch",
    "stats": "report",
    "unpatch_model": "patch",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch with it, only then: `surgery run` must not import torch before the script."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
