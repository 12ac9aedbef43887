"""Decay of W = W0 + s B A toward w_pre by its factors, along the gradient of 1/2 ||W - w_pre||_F^2.

With D = W - w_pre = s B A, or s B A - s B0 A0 where the base was moved: dA = s B^T D and dB = s D A^T, both of the
factors before the step. D is never made: it is a product of factors itself.
"""

from collections.abc import Mapping

import torch

from ..stepped import Stepped
from ..weights.lora import LoraWeight
from ..weights.pretrained import distributed_like, is_distributed, local


def decay(lora: LoraWeight, rates: Mapping[Stepped, float]) -> None:
    """Take the factors of one weight a step along the gradient.

    Args:
        rates: how far, for each A and B to change.
    """
    module = lora.module
    dtype = torch.promote_types(next(iter(rates)).values.dtype, torch.float32)
    stepped = {one.w: one for one in rates}
    left, right = lora.difference(dtype)
    moves = []
    for adapter in lora.active:
        a, b = lora.pair(adapter, dtype)
        scaling = module.scaling[adapter]
        live_a, live_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if live_a in stepped:
            moves.append((stepped[live_a], (b.mT @ left) @ right * scaling))
        if live_b in stepped:
            moves.append((stepped[live_b], left @ (right @ a.mT) * scaling))
    for one, slope in moves:
        _move(one, slope.reshape(one.w.shape), rates[one])


def _move(stepped: Stepped, slope: torch.Tensor, rate: float) -> None:
    part = local(distributed_like(stepped.w, slope)) if is_distributed(stepped.w) else slope
    part = stepped.slice_of(part)
    stepped.values.copy_(stepped.values.to(part.dtype).sub(part, alpha=rate))
