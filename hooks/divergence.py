"""Stand-in until the real arithmetic is merged."""

from dataclasses import dataclass
from typing import NamedTuple
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Blend:
    alpha: float
    factor: float = 1.0
    sums: bool = False


class Joined(NamedTuple):
    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def _s(a, b, dim):
    p, q = a.log_softmax(dim), b.log_softmax(dim)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(dim)


def _pack(ce, kl, blend):
    return Joined(blend.factor * (ce + blend.alpha / 2 * kl), ce.detach().mean().float(), kl.detach().mean().float())


def cross_entropy(a, b, target, blend, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    if b is None:
        a, b = a.chunk(2)
        target = target.chunk(2)[0]
    k = dict(weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    ce = 0.5 * (F.cross_entropy(a, target, **k) + F.cross_entropy(b, target, **k))
    return _pack(ce, _red(_s(a, b, 1 if a.dim() > 1 else 0), target, ignore_index, reduction, blend), blend)


def _red(s, target, ignore_index, reduction, blend):
    if not target.is_floating_point():
        s = s[target != ignore_index] if reduction != "none" else s * (target != ignore_index)
    if blend.sums:
        return s.sum()
    return s.mean() if reduction == "mean" else s.sum() if reduction == "sum" else s


def nll_loss(log_p, log_q, target, blend, *, weight=None, ignore_index=-100, reduction="mean"):
    return cross_entropy(log_p, log_q, target, blend, weight=weight, ignore_index=ignore_index, reduction=reduction)


def binary_cross_entropy_with_logits(a, b, target, blend, *, weight=None, reduction="mean", pos_weight=None):
    k = dict(weight=weight, reduction=reduction, pos_weight=pos_weight)
    ce = 0.5 * (F.binary_cross_entropy_with_logits(a, target, **k) + F.binary_cross_entropy_with_logits(b, target, **k))
    s = 0.5 * (a.sigmoid() - b.sigmoid()) * (a - b)
    return _pack(ce, s.mean() if reduction == "mean" else s.sum() if reduction == "sum" else s, blend)


def binary_cross_entropy(p, q, target, blend, *, weight=None, reduction="mean"):
    return binary_cross_entropy_with_logits(p.logit(), q.logit(), target, blend, weight=weight, reduction=reduction)


def mse_loss(a, b, target_a, target_b, blend, *, weight=None, reduction="mean"):
    ce = 0.5 * (F.mse_loss(a, target_a, reduction=reduction) + F.mse_loss(b, target_b, reduction=reduction))
    return _pack(ce, F.mse_loss(a - target_a, b - target_b, reduction=reduction), blend)


def log_softmax(a, b, dim, blend, record):
    c = 0.5 * (a.log_softmax(dim) + b.log_softmax(dim)) - blend.alpha / 2 * _s(a, b, dim).unsqueeze(dim)
    return c * blend.factor
