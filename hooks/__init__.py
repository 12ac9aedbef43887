"""Methods on a torch model while it trains: patch_model in a script, `surgery run` around one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anchor.settings import Anchor as Anchor
    from .description import Description as Description
    from .description import describe as describe
    from .description import stats as stats
    from .mixout.settings import Mixout as Mixout
    from .patch import patch_model as patch_model
    from .patch import patched as patched
    from .patch import unpatch_model as unpatch_model
    from .rdrop.settings import RDrop as RDrop
    from .recadam.settings import RecAdam as RecAdam
    from .trainer import SurgeryCallback as SurgeryCallback

_HOMES = {
    "Anchor": "anchor.settings",
    "Description": "description",
    "Mixout": "mixout.settings",
    "RDrop": "rdrop.settings",
    "RecAdam": "recadam.settings",
    "SurgeryCallback": "trainer",
    "describe": "description",
    "patch_model": "patch",
    "patched": "patch",
    "stats": "description",
    "unpatch_model": "patch",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch with it, only then: `surgery run` must not import torch before the script."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
