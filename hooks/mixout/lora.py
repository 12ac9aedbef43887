"""Forward hooks of LoRA's layers that mask the columns of A while a layer runs, one mask for all of its adapters.

W_mix = W0 + s B (A diag(m)) / (1 - p) is Mixout of W = W0 + s B A toward W0 with one mask value for each input feature.
"""

from typing import Any

import torch
from torch import nn

from surgery.errors import SettingError
from surgery.live.zero3 import size_of

from ..marks import put
from ..regularizer import Handle
from ..weights.lora import LoraWeight
from ..weights.target import own_weight
from .masks import Chance, draw_mask
from .mixed_weight import Passes
from .mixing import shadow
from .settings import Mixout
from .shadowing import MIXED, Shadowed, put_before, refuse_copy, reveal_left


class MixedLora(Shadowed):
    """The weight of one LoRA layer, and its mask.

    Args:
        lora: the weight.
        settings: of Mixout.
        passes: of the model.
    """

    is_torn = False
    uncalled: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    used: tuple[str, ...] = ()

    def __init__(self, lora: LoraWeight, settings: Mixout, passes: Passes) -> None:
        super().__init__()
        self.lora = lora
        self.settings = settings
        self.is_traced = False
        self._is_called = False
        self._is_used = False
        self._passes = passes
        if lora.is_trainable:
            self._refuse_settings()

    @property
    def name(self) -> str:
        return self.lora.name

    @property
    def names(self) -> tuple[str, ...]:
        """Those of W0, A and B."""
        return self.lora.name, *self.lora.names

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        return (self.lora.module,)

    @property
    def is_trainable(self) -> bool:
        return self.lora.is_trainable

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What an optimizer changes."""
        return self.lora.parameters

    @property
    def elements(self) -> int:
        """How many of the model's trainable elements are mixed in it."""
        return sum(map(size_of, self.parameters))

    @property
    def is_called(self) -> bool:
        """The layer has run in training mode."""
        return self._is_called or self.is_traced

    @property
    def is_used(self) -> bool:
        """It was mixed for a gradient."""
        return self._is_used or self.is_traced

    def begin(self) -> None:
        """Start or end a forward pass of the model: every call draws a mask of its own."""

    def attach(self) -> list[Handle]:
        """Have the layer mixed whenever it runs in training mode."""
        module = self.lora.module
        marks = [put(factor, Shadowed("weight")) for factor in self.lora.modules]
        # first of the forward hooks: FSDP's put sharded weights back in theirs
        reveal = module.register_forward_hook(reveal_factors, prepend=True, always_call=True)
        return [put(module, self), *marks, module.register_forward_pre_hook(shadow_factors), reveal]

    def reveal(self) -> None:
        """Take away what an interrupted forward has left."""
        reveal_left(self.lora.modules)

    def mix(self) -> None:
        """Put A diag(m) / (1 - p) before the A of each active adapter."""
        active = self.lora.active
        if not active:
            return
        self._refuse_settings()
        self._note_call()
        chance = Chance(self.settings.p)
        first = self._own("lora_A", active[0])
        mask = draw_mask((1, first.shape[1], *(1,) * (first.dim() - 2)), 1, chance, first)
        for adapter in active:
            self._mix(adapter, mask, chance)

    def _mix(self, adapter: str, mask: torch.Tensor, chance: Chance) -> None:
        a = self._own("lora_A", adapter)
        masked = mask_columns(a, mask, chance)
        if (start := self.lora.starts.get(adapter)) is not None:
            # w_pre = W0 + s0 B0 A0, of which the masked columns get what W_mix = w_pre + (W - w_pre) m / (1 - p) leaves
            b = self._own("lora_B", adapter)
            a0, b0 = start.a(a), start.b(b) * (start.scaling / self.lora.module.scaling[adapter])
            masked = torch.cat([masked, a0 - mask_columns(a0, mask, chance)])
            self._put("lora_B", adapter, b, torch.cat([b, b0], 1))
        self._put("lora_A", adapter, a, masked)

    def _own(self, factor: str, adapter: str) -> torch.Tensor:
        name = f"{self.lora.path}.{factor}.{adapter}.weight"
        return own_weight(name, getattr(self.lora.module, factor)[adapter])

    def _put(self, factor: str, adapter: str, w: torch.Tensor, mixed: torch.Tensor) -> None:
        is_traced = torch.compiler.is_compiling()
        put_before(getattr(self.lora.module, factor)[adapter], "weight", w, mixed if is_traced else shadow(mixed, w))

    def _note_call(self) -> None:
        if torch.compiler.is_compiling():
            self.is_traced = True
            if not self._passes.is_open:
                self._passes.is_hidden = True
        else:
            self._is_called = True
            self._is_used |= torch.is_grad_enabled()
            self._passes.uses += torch.is_grad_enabled()

    def _refuse_settings(self) -> None:
        if self.settings.granularity == "element":
            raise SettingError(
                f"granularity: expected neuron for LoRA ({self.name}), got element: W0 + s (B A) * m / (1 - p) with a "
                "mask value for each element is no product of two factors, and takes a matrix of the size of W0 at "
                "each call. Leave granularity out, or name LoRA's layers in exclude."
            )
        if self.settings.gradient == "official":
            raise SettingError(
                f"gradient: expected exact for LoRA ({self.name}), got official, which is that of a layer without "
                "adapters. Leave gradient out, or name LoRA's layers in exclude."
            )


def mask_columns(a: torch.Tensor, mask: torch.Tensor, chance: Chance) -> torch.Tensor:
    """Return A diag(m) / (1 - p) in the dtype of A, for a mask as draw_mask makes it."""
    if mask.dtype == torch.bool:
        return torch.where(mask, a * chance.scale, 0)
    return (a * mask).to(a.dtype)


def shadow_factors(module: nn.Module, args: Any) -> None:  # noqa: ARG001
    """Have the layer compute with W_mix; a forward pre-hook."""
    own: MixedLora = getattr(module, MIXED)
    own.reveal()  # a KeyboardInterrupt runs no hooks
    if not module.training:
        return
    if not own.is_trainable:
        return
    refuse_copy(own, own.name)
    if torch.is_grad_enabled():
        own.lora.refuse_merged()
    own.mix()


def reveal_factors(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    """Take A diag(m) away again; a forward hook that is also called when forward raises."""
    own: MixedLora = getattr(module, MIXED)
    own.reveal()
