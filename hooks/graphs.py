"""Keep torch.compile from running a graph without hooks for a model that has them."""

import torch


def guard_hooks() -> None:
    """Have compiled graphs check a module's hooks, and forget those that do not.

    By default torch.compile leaves these checks out, so that of two models of one class, the second one to be compiled
    runs the graph of the first: a patched one would not be mixed, in silence. The setting stays for the process.
    """
    from torch._dynamo import config  # not with surgery: it takes a second, that an optimizer takes anyway

    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
