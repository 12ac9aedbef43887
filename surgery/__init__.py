"""model-surgery: published regularizers for any checkpoint and any training script."""

import os.path
from importlib import import_module

TYPE_CHECKING = False  # typing takes milliseconds to import, in which Ctrl-C would be a traceback
if TYPE_CHECKING:
    from typing import Any

    from surgery.errors import OutputError as OutputError
    from surgery.errors import SettingError as SettingError
    from surgery.errors import SourceError as SourceError
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.hooks import Anchor as Anchor
    from surgery.hooks import Mixout as Mixout
    from surgery.hooks import RDrop as RDrop
    from surgery.hooks import RecAdam as RecAdam
    from surgery.hooks import SurgeryCallback as SurgeryCallback
    from surgery.hooks import describe as describe
    from surgery.hooks import patch_model as patch_model
    from surgery.hooks import patched as patched
    from surgery.hooks import stats as stats
    from surgery.hooks import unpatch_model as unpatch_model
    from surgery.inspect.diff import diff_checkpoints as diff_checkpoints
    from surgery.inspect.inspection import inspect_checkpoint as inspect_checkpoint
    from surgery.live.perturb import perturb_model as perturb_model
    from surgery.live.perturb import perturb_state_dict as perturb_state_dict
    from surgery.perturb.execute import perturb_checkpoint as perturb_checkpoint
    from surgery.perturb.materialize import materialize_checkpoint as materialize_checkpoint
    from surgery.perturb.verify import Verification as Verification
    from surgery.perturb.verify import verify_checkpoint as verify_checkpoint
    from surgery.push.push import Pushed as Pushed
    from surgery.push.push import push_checkpoint as push_checkpoint
    from surgery.recipe import Recipe as Recipe

    __version__: str

_HOMES = {
    "Anchor": "surgery.hooks",
    "Mixout": "surgery.hooks",
    "OutputError": "surgery.errors",
    "Pushed": "surgery.push.push",
    "RDrop": "surgery.hooks",
    "RecAdam": "surgery.hooks",
    "Recipe": "surgery.recipe",
    "SettingError": "surgery.errors",
    "SourceError": "surgery.errors",
    "SurgeryCallback": "surgery.hooks",
    "SurgeryError": "surgery.errors",
    "Verification": "surgery.perturb.verify",
    "describe": "surgery.hooks",
    "diff_checkpoints": "surgery.inspect.diff",
    "inspect_checkpoint": "surgery.inspect.inspection",
    "materialize_checkpoint": "surgery.perturb.materialize",
    "patch_model": "surgery.hooks",
    "patched": "surgery.hooks",
    "perturb_checkpoint": "surgery.perturb.execute",
    "perturb_model": "surgery.live.perturb",
    "perturb_state_dict": "surgery.live.perturb",
    "push_checkpoint": "surgery.push.push",
    "stats": "surgery.hooks",
    "unpatch_model": "surgery.hooks",
    "verify_checkpoint": "surgery.perturb.verify",
}
__all__ = sorted(_HOMES)
_MODULE_NAMES = ("__all__", "__doc__", "__file__", "__name__", "__path__", "__version__")

# In a source checkout hooks/ lies beside this package, in an installation inside it: Python started in the checkout's
# root finds this folder first, whatever is installed.
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # noqa: PTH120
if os.path.isfile(f"{_CHECKOUT}/pyproject.toml") and os.path.isdir(f"{_CHECKOUT}/hooks"):  # noqa: PTH112, PTH113
    __path__.append(_CHECKOUT)


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> "Any":
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        if name == "__version__":
            from importlib.metadata import version

            return version("model-surgery")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULE_NAMES])
