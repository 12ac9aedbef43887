"""Which tensors of a model or state_dict get noise, drawn for which name, and which of them are one."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.checkpoint.pickles import DTYPES, ties
from surgery.checkpoint.tied_names import LEAST, is_embedding, order
from surgery.checkpoint.value_rules import is_asked, judge, warn_of_suspects
from surgery.errors import SourceError
from surgery.live.foreign import packed_class, unreadable_share
from surgery.live.zero3 import shape_of, size_of, stored_in, whole
from surgery.noisytune import FLOATS, Effect, Moments, NoisyTune
from surgery.recipe import TensorRecord
from surgery.roles import VALUE, Role


@dataclass
class LiveTensor:
    """One tensor, under its canonical name, and why it is left as it is, or None if it is perturbed.

    Args:
        drawn_for: the name that its noise is drawn for: another one's where it repeats that.
    """

    name: str
    tensor: torch.Tensor
    dtype: str
    copied: str | None
    known: str | None = None
    drawn_for: str = ""
    moments: Moments | None = None
    effect: Effect | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(shape_of(self.tensor))

    @property
    def record(self) -> TensorRecord:
        std = self.moments.std if self.moments else None
        return TensorRecord(self.name, self.dtype, self.shape, std, self.copied, self.effect, self.known)


def find_targets(
    found: Mapping[str, torch.Tensor],
    canonical: Mapping[str, str],
    new: Mapping[str, str],
    roles: Mapping[str, Role],
    settings: NoisyTune,
    repeating: Collection[str] = (),
) -> tuple[list[LiveTensor], dict[str, str]]:
    """Settle what happens to every tensor, as far as that is known without reading it.

    Args:
        found: by live name, in the model's order.
        canonical: the name to draw noise for, by live name.
        new: why a tensor that is not in the checkpoint is left as it is, by live name.
        roles: what each tensor is, by live name.
        repeating: canonical names that a class ties to others.
    Returns:
        One target for each group of tied tensors, and the canonical names of the others with that of their target.
    """
    parameters = {name: tensor for name, tensor in found.items() if not roles[name].is_buffer}
    dtypes = {name: _dtype(name, tensor) for name, tensor in parameters.items()}
    dtypes |= {name: DTYPES.get(found[name].dtype, str(found[name].dtype)) for name in found.keys() - parameters.keys()}
    groups: dict[str, list[str]] = {name: [name] for name in found}
    stored = {name: stored_in(tensor) for name, tensor in parameters.items() if dtypes[name] in FLOATS}
    for name, first in ties(stored, "model").items():
        groups[first] += groups.pop(name)
    targets: list[LiveTensor] = []
    tied: dict[str, str] = {}
    told: dict[str, Role] = {}
    for members in groups.values():
        old = [member for member in members if member not in new]
        name = min(old, key=lambda member: order(canonical[member], repeating), default=members[0])
        tensor, dtype = found[name], dtypes[name]
        role = told[canonical[name]] = _by_values(canonical[name], tensor, roles[name], settings)
        reason = new.get(name) or settings.reason_to_copy(canonical[name], dtype, shape_of(tensor), role)
        targets.append(LiveTensor(canonical[name], tensor, dtype, reason, role.known))
        tied |= {canonical[other]: canonical[name] for other in members if canonical[other] != canonical[name]}
    warn_of_suspects(told)
    return targets, tied


def _by_values(name: str, tensor: torch.Tensor, role: Role, settings: NoisyTune) -> Role:
    """Return the role of a tensor, which its values may tell where only its name has."""
    if not tensor.is_floating_point() or not is_asked(name, shape_of(tensor), role):
        return role
    with whole(tensor) as w:
        flat = w.detach().reshape(-1)
        what = judge(w.shape, lambda start, stop: flat[start:stop].double().cpu().numpy())
    return settings.overrule(name, Role(True, VALUE, what)) if what else role


def _dtype(name: str, tensor: torch.Tensor) -> str:
    """Return the dtype in safetensors' names; refuse what is not simply elements in memory."""
    packed = packed_class(tensor) or (type(tensor) if tensor.is_quantized else None)
    fault = None
    if tensor.is_meta:
        fault, remedy = "one on the meta device", "Load the model without offloading."
    elif packed or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
        fault, remedy = (
            f"{(packed or type(tensor)).__name__} of {tensor.dtype}",
            "Perturb the checkpoint before quantizing or sharding.",
        )
    elif share := unreadable_share(tensor):
        fault, remedy = share, "Perturb the checkpoint."
    elif tensor.layout is not torch.strided:
        fault, remedy = f"{tensor.layout}", "Make it dense."
    elif any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        fault, remedy = "an expanded view", "Replace it by a .clone()."
    if fault:
        raise SourceError(f"{name}: expected a dense tensor in memory, got {fault}. {remedy}")
    return DTYPES.get(tensor.dtype, str(tensor.dtype))


def tie_equal(targets: Iterable[LiveTensor], repeating: Collection[str]) -> dict[str, str]:
    """Have equal tensors draw one noise, as `surgery perturb` does; return which of them repeats which."""
    alike: dict[Any, list[LiveTensor]] = defaultdict(list)
    for target in targets:
        is_large = size_of(target.tensor) >= LEAST or is_embedding(target.name) or target.name in repeating
        if target.copied is None and is_large:
            alike[target.dtype, target.shape, target.moments].append(target)
    tied = {}
    for rest in alike.values():
        rest.sort(key=lambda target: (*order(target.name, repeating), target.name))
        while rest:
            first, *others = rest
            with whole(first.tensor) as w:
                equal = [other for other in others if _are_equal(w, other.tensor)]
            for other in equal:
                tied[other.name] = other.drawn_for = first.name
            rest = [other for other in others if not other.drawn_for]
    return tied


def _are_equal(one: torch.Tensor, tensor: torch.Tensor) -> bool:
    with whole(tensor) as other:
        return one.device == other.device and bool((one == other).all() and (one.signbit() == other.signbit()).all())
