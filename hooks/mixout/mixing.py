"""W_mix = w_pre + (w - w_pre) * m / (1 - p) as a tensor whose gradient is exact, made again in the backward pass."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from .masks import Chance, Draw

Pretrained = Callable[[torch.Tensor], torch.Tensor]
"""Gives w_pre, dense, on the device and in the dtype of the weight that it is handed."""


def mix(w: torch.Tensor, w_pre: torch.Tensor, mask: torch.Tensor | Draw, *, chance: Chance) -> torch.Tensor:
    """Return w_pre + (w - w_pre) * m / (1 - p): w_pre where the mask is 0, also for p = 1.

    Mixout, Lee et al., arXiv 1909.11299, eq. 5. One fused pass in float32 and float64. In float16 and bfloat16 two
    passes, which compute in float32 and round once. Autograd's derivative of it is exact, and keeps the mask only.

    Args:
        w, w_pre: floating point, of one shape, dtype and device.
        mask: as draw_mask makes it for w, which broadcasts over w; or what makes it, without a derivative.
    """
    if isinstance(mask, Draw):
        if mask.is_fused(w, w_pre):
            return mask.mix(w, w_pre)
        mask = mask.mask(w)
    if mask.dtype != torch.bool:
        return torch.lerp(w_pre, w, mask)
    return torch.where(mask, torch.lerp(w_pre, w, chance.scale), w_pre)


@dataclass(frozen=True)
class Rule:
    """How one weight is mixed: the odds, and whether the derivative is the authors', without 1 / (1 - p)."""

    chance: Chance
    is_official: bool


class _Mix(torch.autograd.Function):
    """Mix with a backward of its own: with the authors' derivative, grad * m, or with a mask that is drawn again."""

    @staticmethod
    def forward(w: torch.Tensor, w_pre: torch.Tensor, mask: torch.Tensor | Draw, rule: Rule) -> torch.Tensor:
        return mix(w, w_pre, mask, chance=rule.chance)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG004
        _, _, mask, ctx.rule = inputs
        ctx.draw = mask if isinstance(mask, Draw) else None
        if ctx.draw is None:
            ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _slope(grad, ctx.draw or ctx.saved_tensors[0], ctx.rule), None, None, None


def _slope(grad: torch.Tensor, mask: torch.Tensor | Draw, rule: Rule) -> torch.Tensor:
    """Return dL/dw of dL/dW_mix."""
    scale = 1.0 if rule.is_official else rule.chance.scale
    if isinstance(mask, Draw):
        is_followed = torch.is_grad_enabled() and grad.requires_grad  # by a second derivative
        if mask.is_fused(grad) and not is_followed:
            return mask.gate(grad, scale)
        mask = mask.mask(grad)
    if rule.is_official:
        return torch.where(mask.bool(), grad, 0)
    if mask.dtype == torch.bool:
        return torch.where(mask, grad * scale, 0)
    slope: torch.Tensor = grad * mask
    return slope


def mixed_weight(
    w: torch.Tensor, pretrained: Pretrained, mask: torch.Tensor | Draw, rule: Rule, *, is_traced: bool
) -> torch.Tensor:
    """Mix in a way that autograd follows; W_mix is not kept for the backward pass where this can be helped.

    Args:
        w: the trainable weight.
        pretrained: gives w_pre.
        mask: the mask of this call, or the draw that makes it.
        is_traced: torch.compile is looking: its partitioner decides by itself to recompute W_mix.
    Returns:
        W_mix. Eager, it is a Shadow, and where it can be a MixedWeight: a tensor that whatever function it is passed to
        saves as a recipe.
    """
    mixed: torch.Tensor
    if isinstance(mask, Draw) or rule.is_official:
        mixed = _Mix.apply(w, pretrained(w), mask, rule)  # type: ignore[no-untyped-call]
    else:
        mixed = mix(w, pretrained(w), mask, chance=rule.chance)
    if is_traced or not torch.is_grad_enabled() or not _may_hook():
        return mixed if is_traced else shadow(mixed, w)
    _keep_in_no_linear()
    return MixedWeight.of(mixed, _Again(w, w._version, pretrained, mask, rule.chance), w)


def _keep_in_no_linear() -> None:
    """Have torch's F.linear take W_mix where ZeRO-3 has put its own, which would keep it for the backward pass."""
    theirs = F.linear
    if not theirs.__module__.startswith("deepspeed."):
        return

    @wraps(theirs)
    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        of = torch._C._nn.linear if isinstance(weight, MixedWeight) else theirs
        return of(input, weight, bias)

    linear.__module__ = __name__
    F.linear = linear


def shadow(mixed: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return W_mix as a Shadow of the weight `w`; as it is where torch.func is at work, which knows no subclasses."""
    if torch._C._are_functorch_transforms_active():
        return mixed
    shadowing: Shadow = mixed.as_subclass(Shadow)
    shadowing.own = w
    return shadowing


def _may_hook() -> bool:
    """Tell whether saved tensors are nobody else's yet.

    Gradient checkpointing and save_on_cpu have hooks of their own, which would not see what ours take: they look after
    W_mix then. torch.func has none at all.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class Shadow(torch.Tensor):
    """W_mix for one forward pass of a layer. Every function takes it as the plain tensor that it is.

    An interrupted forward leaves it, and another thread may copy or pickle the layer meanwhile: both get the weight
    itself, which the layer's next forward finds before it, and takes away.
    """

    own: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return deepcopy(self.own, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.own,)


def _itself(weight: torch.Tensor) -> torch.Tensor:
    return weight


class MixedWeight(Shadow):
    """One that autograd does not keep for the backward pass.

    In a list, as an RNN hands its weights on, it does: its kernel reads them again at each position.
    """

    again: "_Again"

    @classmethod
    def of(cls, mixed: torch.Tensor, again: "_Again", own: torch.Tensor) -> "MixedWeight":
        """Make one of W_mix or of a view of it, by how to make W_mix again."""
        made = mixed.as_subclass(cls)
        made.again, made.own = again, own
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            mixed = [one for one in (*args, *kwargs.values()) if isinstance(one, MixedWeight)]
            if not mixed or not torch.is_grad_enabled() or not _may_hook():
                return func(*args, **kwargs)
            with saved_tensors_hooks(_Pack({_place(one): one.again for one in mixed}), _unpack):
                made = func(*args, **kwargs)
            # experts are transposed before they are read
            return cls.of(made, mixed[0].again, made) if _is_whole_view(made, mixed[0]) else made


def _is_whole_view(made: Any, of: torch.Tensor) -> bool:
    """Tell whether a function has made another view of all of a tensor's elements."""
    return type(made) is torch.Tensor and made.numel() == of.numel() and _place(made) == _place(of)


@dataclass(frozen=True)
class _Pack:
    """Replace W_mix, or a view of it, by how to make it again; leave all else as autograd would have it.

    Autograd keeps this for as long as what it packed, so it knows W_mix only by the place of its memory.
    """

    again: Mapping[tuple[torch.device, int], "_Again"]

    def __call__(self, saved: torch.Tensor) -> Any:
        again = self.again.get(_place(saved))
        if again is not None and _place(saved)[1] != 0:
            return again, saved.dtype, saved.size(), saved.stride(), saved.storage_offset()
        return saved, saved._version


def _place(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _unpack(packed: Any) -> torch.Tensor:
    if len(packed) > 2:
        again, dtype, size, stride, offset = packed
        made: torch.Tensor = again()
        return made.view(dtype).as_strided(size, stride, offset)
    saved: torch.Tensor = packed[0]
    version: int = packed[1]
    if saved._version != version:
        raise RuntimeError(_stale(saved))
    return saved


@dataclass(frozen=True)
class _Again:
    """All that it takes to make W_mix again, none of it of its size but what lives anyhow."""

    w: torch.Tensor
    version: int
    pretrained: Pretrained
    mask: torch.Tensor | Draw
    chance: Chance

    def __call__(self) -> torch.Tensor:
        if self.w._version != self.version:
            raise RuntimeError(_stale(self.w))
        with torch.no_grad():
            return mix(self.w, self.pretrained(self.w), self.mask, chance=self.chance)


def _stale(tensor: torch.Tensor) -> str:
    """Say what autograd says of a saved tensor; tensors that go through hooks are not its own to check."""
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}]. Run backward before the optimizer's step."
    )
