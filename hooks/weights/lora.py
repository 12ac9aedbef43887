"""PEFT's LoRA layers, W = W0 + s B A, told without importing peft: which can be acted on, and how far W is from w_pre.

w_pre is the frozen W0, of which no copy is needed. Where the initialization has moved part of the pretrained weight
into B and A, it is what the layer computes at the start: B0 and A0 are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import SourceError
from surgery.live.foreign import is_zero3_shard

from .layers import is_read_by_attention
from .offload import Offload
from .peft_layers import is_wrapper
from .pretrained import Pretrained, is_distributed, keep, refuse_not_finite

REWRITING = ("olora", "pissa", "corda", "loftq", "lora_ga")
"""What init_lora_weights begins with where LoRA takes its start out of the base."""

_DORA = "DoRA: its norm ||W0 + s B A|| is of the whole weight, and changes with a mask of A"
_VARIANT = "{}, a variant of LoRA that computes more than W0 + s B A"
_KIND = "LoRA of {}, which is not mixed"
_NESTED = "LoRA on top of another adapter"
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Start:
    """What an adapter was when the base was moved for it: s B A as it was first."""

    a: Pretrained
    b: Pretrained
    scaling: float


class LoraWeight:
    """The weight W = W0 + s B A of one layer, summed over its active adapters.

    Args:
        path: the layer's name.
        module: PEFT's layer.
        moved: names of the adapters whose start was taken out of the base.
    """

    def __init__(self, path: str, module: Any, moved: Sequence[str]) -> None:
        self.module = module
        self.path = path
        self.moved = tuple(moved)
        self.starts: dict[str, Start] = {}
        self._factors: tuple[Any, Any] = (module.lora_A, module.lora_B)
        self._known: dict[str, nn.Module] = dict(module.lora_A)
        self.modules: tuple[nn.Module, ...] = tuple(held[one] for one in self._known for held in self._factors)
        """Those that hold A and B."""

    @property
    def name(self) -> str:
        """The name of W0; of a quantized layer that has no such parameter, the layer's."""
        has_weight = self.module.base_layer._parameters.get("weight") is not None
        return _join(self.path, "base_layer.weight") if has_weight else self.path

    @property
    def names(self) -> tuple[str, ...]:
        """The names of A and B."""
        factors = ("lora_A", "lora_B")
        return tuple(_join(self.path, f"{factor}.{adapter}.weight") for adapter in self._known for factor in factors)

    @property
    def base(self) -> torch.Tensor | None:
        """W0."""
        w: torch.Tensor | None = self.module.base_layer._parameters.get("weight")
        return w

    @property
    def active(self) -> list[str]:
        """The adapters that are added to W0 now.

        Raises:
            SourceError: one of them has been added since the model was patched.
        """
        active = self._active
        if added := [one for one in active if self._known.get(one) is not self.module.lora_A[one]]:
            raise SourceError(
                f"{self.path}: expected the adapters that patch_model has seen, got {added[0]!r}, which was added "
                "since. Call patch_model again."
            )
        return active

    @property
    def _active(self) -> list[str]:
        if self.module.disable_adapters:
            return []
        return [one for one in self.module.active_adapters if one in self.module.lora_A]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Those of A and B that are trainable and at work. None where W0 is trainable, and acted on itself."""
        if self.base is not None and self.base.requires_grad:
            return []
        held = (held[adapter]._parameters.get("weight") for adapter in self._active for held in self._factors)
        return [w for w in held if w is not None and w.requires_grad]

    @property
    def is_trainable(self) -> bool:
        return bool(self.parameters)

    def refuse_merged(self) -> None:
        """Raise where an adapter is merged into W0, so that the layer computes with W0 alone."""
        if self.is_trainable and self.module.merged:
            raise SourceError(
                f"{self.path}: expected adapters beside their base, got {self.module.merged_adapters[0]!r} merged into "
                "it, where nothing regularizes it. Call unmerge_adapter before training."
            )

    def take_start(self, former: "LoraWeight | None", offload: Offload | None) -> None:
        """Keep the start of adapters that the base was moved for, or that which a former patch has kept."""
        for adapter in self.moved:
            if former is not None and adapter in former.starts:
                self.starts[adapter] = former.starts[adapter]
                continue
            a, b = (
                keep(self.name, held[adapter].weight, held[adapter].weight, offload, is_own=False)
                for held in self._factors
            )
            self.starts[adapter] = Start(a, b, float(self.module.scaling[adapter]))

    def refuse_split(self) -> None:
        """Raise where ZeRO-3 has split A and B: each is put together for a layer of its own, and not for both."""
        if any(map(is_zero3_shard, self.parameters)):
            raise SourceError(
                f"{self.path}: expected LoRA's factors whole, got some that ZeRO-3 has split. Use ZeRO 1 or 2, or name "
                "LoRA's layers in exclude."
            )

    def refuse_not_finite(self) -> None:
        for name, module in zip(self.names, self.modules, strict=True):
            refuse_not_finite(name, module.weight)  # type: ignore[arg-type]

    @property
    def kept(self) -> list[Pretrained]:
        """What is kept of w_pre."""
        return [one for start in self.starts.values() for one in (start.a, start.b)]

    @property
    def is_lost(self) -> bool:
        """What was kept has stayed behind a pickle."""
        return any(one.values is None for one in self.kept)

    def square_of_distance(self) -> torch.Tensor:
        """Return ||W - w_pre||_F^2 as a scalar in float64, without a matrix of the size of W."""
        left, right = self.difference(torch.float64)
        return ((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0)

    def difference(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W - w_pre as two factors of the adapters' ranks: (groups, out, R) and (groups, R, in)."""
        left, right = [], []
        for adapter in self.active:
            scaling = self.module.scaling[adapter]
            a, b = self.pair(adapter, dtype)
            if (start := self.starts.get(adapter)) is None:
                left.append(b * scaling)
                right.append(a)
                continue
            live_a, live_b = (dense(held[adapter].weight) for held in self._factors)
            a0, b0 = self._as_pair(adapter, start.a(live_a), start.b(live_b), dtype)
            left += [b * scaling - b0 * start.scaling, b0 * start.scaling]
            right += [a, a - a0]
        return torch.cat(left, 2), torch.cat(right, 1)

    def pair(self, adapter: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A as (groups, rank, in) and B as (groups, out, rank), the taps of a convolution among the inputs."""
        a, b = (dense(held[adapter].weight.detach()) for held in self._factors)
        return self._as_pair(adapter, a, b, dtype)

    def _as_pair(
        self, adapter: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = getattr(self.module.lora_B[adapter], "groups", 1)
        flat = (one.detach().to(dtype).flatten(1) for one in (a, b))
        a, b = (one.reshape(groups, -1, one.shape[1]) for one in flat)
        return a, b


def dense(w: torch.Tensor) -> torch.Tensor:
    """Return the whole of what fully_shard has split, which every rank must ask for."""
    return w.full_tensor() if is_distributed(w) else w  # type: ignore[attr-defined]


def find_lora(model: nn.Module) -> tuple[list[LoraWeight], dict[str, str]]:
    """Find the weights of LoRA layers, and why others cannot be acted on, by the path of the layer."""
    moved = _moved_of(model)
    found, unfit = [], {}
    for path, module in model.named_modules():
        if not _is_lora(module):
            continue
        if reason := _unfit(module):
            unfit[path] = reason
        else:
            found.append(LoraWeight(path, module, [one for one in module.lora_A if one in moved.get(module, ())]))
    return found, unfit


def _is_lora(module: Any) -> bool:
    """Tell a layer of PEFT's LoRA by its classes: AdaLoRA, which inherits from it, keeps parameters as its factors."""
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and any(
        kind.__name__ == "LoraLayer" and kind.__module__.startswith("peft.") for kind in type(module).__mro__
    )


def _unfit(module: Any) -> str | None:
    """Return why what a LoRA layer computes is not W0 + s B A of one layer that can be mixed."""
    if any(module.use_dora.values()):
        return _DORA
    if module.lora_variant:
        return _VARIANT.format(type(next(iter(module.lora_variant.values()))).__name__.removesuffix("Variant"))
    if is_wrapper(module.base_layer):
        return _NESTED
    caller = getattr(module.forward, "__self__", module)
    if caller is not module and type(caller).__module__.startswith("peft."):
        return _VARIANT.format(type(caller).__name__)
    factors = [*module.lora_A.values(), *module.lora_B.values()]
    is_unknown = type(module).__name__ in ("MultiheadAttention", "ParamWrapper") or not factors
    is_unknown |= not all(isinstance(one, _KINDS) for one in factors)
    if is_unknown or is_read_by_attention(module.base_layer):
        return _KIND.format(type(module.base_layer).__name__)
    return None


def _moved_of(model: nn.Module) -> Mapping[nn.Module, set[str]]:
    """Return which adapters of each module began with a part of the base."""
    found: dict[nn.Module, set[str]] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            moved = {name for name, config in configs.items() if _is_rewriting(config)}
            found |= dict.fromkeys(module.modules(), moved)
    return found


def _is_rewriting(config: Any) -> bool:
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(REWRITING)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")
