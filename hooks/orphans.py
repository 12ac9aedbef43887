"""Parts of a patched model that were copied, pickled or kept without it: what to find there, and take off."""

from torch import nn

from .marks import Mark
from .mixout.dropout import RATES, restore_rates
from .mixout.site import SITE, reveal_weight, shadow_weight


def find_orphans(root: nn.Module) -> list[nn.Module]:
    """Return the modules that bear the mark of a patch which is in no model any more."""
    return [module for module in root.modules() if any(mark.is_orphan for mark in _marks(module))]


def release(module: nn.Module) -> None:
    """Take hooks and marks off a module, and restore its dropout rates."""
    if SITE in module.__dict__:
        reveal_weight(module, None, None)
        del module.__dict__[SITE]
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (shadow_weight, reveal_weight)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    restore_rates(module)


def _marks(module: nn.Module) -> list[Mark]:
    return [module.__dict__[name] for name in (SITE, RATES) if name in module.__dict__]
