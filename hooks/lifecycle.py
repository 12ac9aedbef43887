"""What a patch changes in a live model, and how all of it is undone."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from surgery.errors import SourceError, some

from .anchor.regularizer import Decay
from .compiling import guard_hooks
from .lookout import MixoutLookout
from .marks import Mark
from .mixout.dropout import Rate, find_rates, replace_rate, restore_rates
from .mixout.site import SITE, Pass, Site, reveal_weight, shadow_weight
from .settings import Anchor, Mixout
from .steps import Listener, forget, watch
from .weights.selection import refuse_unready
from .weights.sharding import is_sharded, shard_pretrained

if TYPE_CHECKING:
    from .rdrop.regularizer import Drop

_log = logging.getLogger(__name__)
PATCH = "_surgery_patch"
"""The attribute of a patched model that holds its Patch."""


class Patch:
    """The regularizers of one model. It changes the model in attach, and in nothing else.

    Args:
        mixout, anchor: what was asked for.
        drop: R-Drop, if that was asked for.
        sites: the weights that mixout and anchor act on as long as they are trainable.
        left: why each other parameter is not, by name.
        fresh: names of the parameters without a pretrained value.
        label: where w_pre comes from.
        forward: shared with the sites.
    """

    def __init__(
        self,
        *,
        mixout: Mixout | None,
        anchor: Anchor | None,
        drop: "Drop | None",
        sites: list[Site],
        left: dict[str, str],
        fresh: set[str],
        label: str,
        forward: Pass,
    ) -> None:
        self.mixout = mixout
        self.anchor = anchor
        self.drop = drop
        self.sites = sites
        self.left = left
        self.fresh = fresh
        self.label = label
        self.replaced: list[Rate] = []
        self.kept: list[Rate] = []
        self.decay = Decay(anchor.weight, sites) if anchor is not None else None
        self.lookout = MixoutLookout(sites, forward) if self.is_mixing else None
        self._forward = forward
        if sites:
            forward.traced = forward.traced.to(sites[0].weight.device)
        self._handles: list[Any] = []
        self._marks: list[Mark] = []
        self._is_checked = False
        self._is_told = False

    @property
    def steps(self) -> int:
        """Forward passes in training mode."""
        return self._forward.count

    @property
    def is_mixing(self) -> bool:
        return self.mixout is not None and self.mixout.p > 0

    @property
    def has_mixed(self) -> bool:
        """A weight has been mixed, whether or not the model's own forward was called for it."""
        return any(site.is_called for site in self.sites)

    def attach(self, root: nn.Module) -> None:
        """Put the patch on the model: hooks, dropout rates, and an attribute for each module that has a hook."""
        root.__dict__[PATCH] = self
        self._marks = [*self.sites]
        self._handles = [root.register_forward_pre_hook(_begin)]
        if self.is_mixing:
            guard_hooks()
        for site in self.sites:
            for module in site.target.owners:
                module.__dict__[SITE] = site
                if self.is_mixing:
                    self._handles += _attach_hooks(module)
        self._handles.append(root.register_forward_hook(_end, always_call=True))
        if self.mixout is not None and self.mixout.replace_dropout:
            mixed = [name for site in self.sites if site.weight.requires_grad for name in site.target.names]
            self.replaced, self.kept = find_rates(root, mixed, self.left)
            self._marks += map(replace_rate, self.replaced)
        self._adopt()
        for listener in self._listeners():
            watch(listener)
        if self.drop is not None:
            self._handles += self.drop.attach(root)

    def detach(self, root: nn.Module) -> None:
        """Take the patch off again, whatever has become of the model meanwhile."""
        for listener in self._listeners():
            forget(listener)
        if self.drop is not None:
            self.drop.close()  # a KeyboardInterrupt has left it open
        for rate in self.replaced:
            restore_rates(rate.module)
        for handle in self._handles:
            handle.remove()
        self.reveal()
        for module in self._owners():
            del module.__dict__[SITE]
        del root.__dict__[PATCH]

    def reveal(self) -> None:
        """Do away with the W_mix that an interrupted forward has left."""
        for module in self._owners():
            reveal_weight(module, None, None)

    def begin(self, root: nn.Module) -> None:
        """Open a forward pass of the model."""
        if getattr(root, "_is_replica", False):
            raise SourceError(
                f"{type(root).__name__}: expected the model itself, got a replica by DataParallel. "
                "Use DistributedDataParallel, or one GPU."
            )
        self._forward.is_open = True
        self.renew()
        if not root.training:
            return
        if torch.compiler.is_compiling():
            # beside the weights, which may have moved: CUDA graphs take nothing from the CPU
            if self.sites:
                self._forward.traced = self._forward.traced.to(self.sites[0].weight.device)
            self._forward.traced.add_(1)
            return
        if self._forward.eager == 0:
            refuse_unready(self.sites)
            if is_sharded(root):
                self._go_first(root)
        elif self._forward.eager == 1:
            shard_pretrained(self.sites)
        if self.decay is not None:
            self.decay.refuse_missed()
        self._warn_frozen()
        self._forward.eager += 1

    def renew(self) -> None:
        """Let tied weights draw a new mask: a pass begins."""
        for site in self.sites:
            site.begin()

    def _warn_frozen(self) -> None:
        if self.sites and not self._is_told and not any(site.weight.requires_grad for site in self.sites):
            self._is_told = True
            _log.warning(
                "%s: expected a trainable weight, got %d frozen since patch_model: nothing is regularized. "
                "Unfreeze them, and add LoRA before patch_model: it freezes what it is added to.",
                self.sites[0].name,
                len(self.sites),
            )

    def _go_first(self, root: nn.Module) -> None:
        """Run before FSDP puts the root's weights together, so that the next pass sees all weights split."""
        self._handles[0].remove()
        self._handles[0] = root.register_forward_pre_hook(_begin, prepend=True)

    def end(self, root: nn.Module, output: Any) -> None:
        """Close a forward pass; after the first one in training that came to its end, say what it did not mix.

        Args:
            output: None if forward has raised.
        """
        self._forward.is_open = False
        torn = [] if torch.compiler.is_compiling() else [site.name for site in self.sites if site.is_torn]
        self.renew()
        if torn:
            raise SourceError(
                f"{some(torn)}: expected one mask for all layers that share it, got some compiled and some not. "
                "Compile the whole model, or name the weight in exclude."
            )
        if torch.compiler.is_compiling() or output is None or self._is_checked or not self.is_mixing:
            return
        # PEFT's wrapper is in training mode around a model that is not
        trained = [site for site in self.sites if site.weight.requires_grad and site.target.owners[0].training]
        if not root.training or not trained:
            return
        self._is_checked = True
        if silent := [site.name for site in trained if not site.is_called]:
            what = f"{some(silent)}: expected a call of the layer in forward, got none"
            if len(silent) == len(trained):
                raise SourceError(f"{what} of any. Patch the model whose forward calls its layers.")
            _log.warning(
                "%s (%d weights): not mixed. Its layer was replaced, or something else reads the weight.",
                what,
                len(silent),
            )

    def uncalled(self) -> list[str]:
        """Return the names of trainable weights whose layers no forward has called, so that they were never mixed."""
        return [site.name for site in self.sites if site.weight.requires_grad and not site.is_called]

    def _listeners(self) -> list[Listener]:
        """Return what is to be told of optimizer steps."""
        return [listener for listener in (self.decay, self.lookout, self.drop) if listener is not None]

    def join_step(self, optimizer: Optimizer) -> None:
        """Take part in a step that is under way already: its closure has just called the model."""
        for listener in self._listeners():
            listener.before_step(optimizer, is_closure=True)

    def _adopt(self) -> None:
        for mark in self._marks:
            mark.adopt(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a copy, in a copy of the whole model."""
        self.__dict__.update(state)
        self._adopt()

    def _owners(self) -> Iterator[nn.Module]:
        return (module for site in self.sites for module in site.target.owners)


def _attach_hooks(module: nn.Module) -> tuple[Any, Any]:
    # first of the forward hooks: FSDP's put the sharded weight back in theirs
    reveal = module.register_forward_hook(reveal_weight, prepend=True, always_call=True)
    return module.register_forward_pre_hook(shadow_weight), reveal


def _begin(root: nn.Module, args: Any) -> None:  # noqa: ARG001
    patch: Patch = getattr(root, PATCH)
    patch.begin(root)


def _end(root: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    patch: Patch = getattr(root, PATCH)
    patch.end(root, output)
