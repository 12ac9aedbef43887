"""perturb_model and perturb_state_dict: NoisyTune on torch tensors in place, measured whole before the first write."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.roles import find_roles
from surgery.errors import SettingError, SourceError
from surgery.escapes import get_logger
from surgery.kernels import tensors as kernels
from surgery.live.applied_noise import find_noise, note_added
from surgery.live.foreign import is_flat, is_fsdp1
from surgery.live.names import find_names
from surgery.live.parts import NEW
from surgery.live.present_noise import measure_share
from surgery.live.targets import LiveTensor, find_targets, tie_equal
from surgery.live.zero3 import size_of, update_master, whole
from surgery.noise import key
from surgery.noisytune import (
    NO_SPREAD,
    Effect,
    NoisyTune,
    as_globs,
    merge_blocks,
    merge_effect,
    pool,
)
from surgery.recipe import FileRecord, Recipe, warn_of_vanished

_log = get_logger(__name__)
HAS_IT = "has this noise already"
"""Why a tensor is left as it is that a former call has perturbed."""
_LEAST_SHARE, _IS_THIS = 0.2, (0.8, 1.25)  # of this noise in the weights
_LARGEST_U = 2.5  # the normal distribution's: its quantile at 2^-53 is 8.3, times 1/sqrt(12)


def perturb_state_dict(
    state_dict: Mapping[str, Any],
    *,
    lam: float = 0.15,
    seed: int = 0,
    noise: str = "uniform",
    scale: str = "matrix",
    rounding: str = "nearest",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> Recipe:
    """Add NoisyTune's noise to a state_dict's tensors, in place.

    w' = w + U(-lam/2, lam/2) * std(w): Wu et al., ACL 2022, arXiv 2202.12024, eq. 1. Everything is measured before the
    first write, so an error leaves all tensors as they were. Tensors that share their storage are perturbed once, under
    the first of their names. What is not a tensor is passed over.

    Args:
        state_dict: its names are those that the noise is drawn for: equal names, seed and values give equal bits.
        lam, seed, noise, scale, rounding, include, exclude: see NoisyTune.
    Returns:
        What was done to every tensor.
    Raises:
        SettingError: a setting is out of range, or would do nothing.
        SourceError: a tensor is quantized, distributed, on the meta device, or holds NaN or Inf.
    """
    settings = NoisyTune(lam, seed, noise, scale, rounding, as_globs("include", include), as_globs("exclude", exclude))
    found = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    roles = {name: settings.overrule(name, role) for name, role in find_roles(shapes).items()}
    targets, tied = find_targets(found, {name: name for name in found}, {}, roles, settings)
    return _perturb(targets, tied, settings, source="state_dict")


def perturb_model(
    model: torch.nn.Module,
    *,
    lam: float = 0.15,
    seed: int = 0,
    noise: str = "uniform",
    scale: str = "matrix",
    rounding: str = "nearest",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    source: str | Path | None = None,
    again: bool = False,
) -> Recipe:
    """Add NoisyTune's noise to a model's parameters, in place: the bits of `surgery perturb` on its checkpoint.

    Parameters stay the same objects, so an optimizer made before still works; gradients, flags, ties and buffers are
    untouched. Everything is measured before the first write, so an error leaves the model as it was. A parameter that
    is not in the checkpoint, such as a new head, is not perturbed.

    Where the weights hold this noise already, as when a cell of a notebook is run twice, a warning says so and nothing
    is done. That is measured: of a model that was trained since, copied, or loaded from a perturbed checkpoint as well.
    Noise of another seed or lam comes on top, with a warning.

    Args:
        model: may be wrapped by torch.compile, DDP, DeepSpeed, PEFT or a module of your own. Of one that ZeRO-3 has
            split, every rank has to call this.
        lam, seed, noise, scale, rounding, include, exclude: see NoisyTune. Globs match the checkpoint's names.
        source: the checkpoint whose names the noise is drawn for: folder, file or Hub id. Default: the one that the
            model was loaded from, if it is on this machine; else the model's own names are used, and `notes` says so.
        again: add the noise even if it is there.
    Returns:
        What was done to every parameter and buffer, with `notes` on names that could not be mapped and on noise that
        was there before.
    Raises:
        SettingError: a setting is out of range, or would do nothing.
        SourceError: the model is quantized, on the meta device, split by fully_shard or FSDP 1, or holds NaN or Inf; or
            `source` is unusable.
    """
    settings = NoisyTune(lam, seed, noise, scale, rounding, as_globs("include", include), as_globs("exclude", exclude))
    _refuse_quantized(model)
    refuse_flattened(model)
    names = find_names(model, source)
    roles = {name: settings.overrule(names.canonical[name], role) for name, role in names.roles.items()}
    new = {name: reason for name, reason in names.copied.items() if reason == NEW}
    targets, tied = find_targets(names.tensors, names.canonical, new, roles, settings, names.repeating)
    recipe = _perturb(
        targets,
        tied,
        settings,
        source=names.source,
        commit=names.commit,
        notes=names.notes,
        repeating=names.repeating,
        former=None if again else [noise for added in find_noise([model]) for noise in added],
    )
    for note in recipe.notes:  # the recipe is easily thrown away
        _log.warning(note)
    if any(tensor.copied is None for tensor in recipe.tensors):
        note_added(model, settings)
    return recipe


def _refuse_quantized(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if getattr(module, "is_quantized", None) is True or getattr(config, "quantization_config", None):
            raise SourceError(
                f"{name or type(model).__name__}: expected unquantized weights, got a quantized model. "
                "Perturb the original checkpoint and quantize the result."
            )


def refuse_flattened(model: torch.nn.Module) -> None:
    """Raise SourceError for a model, or a part of one, whose weights FSDP 1 has flattened: they look like any other."""
    for name, module in model.named_modules():
        if is_fsdp1(module) or any(map(is_flat, module._parameters.values())):
            raise SourceError(
                f"{name or type(model).__name__}: expected whole weights, got FSDP 1, which flattens them. "
                "Perturb the model before FSDP, or use fully_shard after it."
            )


def _perturb(
    targets: list[LiveTensor],
    tied: dict[str, str],
    settings: NoisyTune,
    *,
    source: str,
    commit: str | None = None,
    notes: Iterable[str] = (),
    repeating: Collection[str] = (),
    former: Sequence[NoisyTune] | None = None,
) -> Recipe:
    """Measure everything, check everything, then write.

    Args:
        former: the noise that is known to have been added before; None: whatever is there, add it.
    """
    settings.check_globs([*(target.name for target in targets), *tied] or [""])
    with kernels.workers() as workers, torch.no_grad():
        pooled = _measure(targets, settings, workers)
        tied = tied | tie_equal(targets, repeating)
        _refuse_nothing(targets, settings, source)
        if former is not None:
            notes = [*notes, *_notes_on_noise(targets, settings, pooled, workers, former)]
        todo = [target for target in targets if target.copied is None]
        for target in todo:
            if _may_overflow(target, settings, pooled):
                with whole(target.tensor) as w:
                    _add_noise(target, w.detach().clone(), settings, pooled, workers)
        for target in todo:
            with whole(target.tensor, is_written=True) as w:
                target.effect = _add_noise(target, w, settings, pooled, workers)
            update_master(target.tensor)
    records = tuple(target.record for target in targets)
    recipe = Recipe(
        source=source,
        commit=commit,
        settings=settings,
        files=(FileRecord("", "", "", "", records, tied),),
        pooled_std=pooled,
        notes=tuple(notes),
    )
    warn_of_vanished(recipe)
    return recipe


def _measure(targets: list[LiveTensor], settings: NoisyTune, workers: ThreadPoolExecutor) -> float | None:
    """Take the moments of what is to be perturbed, and set the flat tensors apart; return the std of scale="global"."""
    for target in targets:
        if target.copied is None:
            with whole(target.tensor) as w:
                sums, shift = kernels.moments(w, target.dtype, workers)
            target.moments = merge_blocks(sums, size_of(target.tensor), shift, what=target.name)
            target.copied = None if target.moments.std else NO_SPREAD
    spreads = [target.moments for target in targets if target.moments and target.copied is None]
    return pool(spreads).std if settings.scale == "global" and spreads else None


def _refuse_nothing(targets: list[LiveTensor], settings: NoisyTune, source: str) -> None:
    if settings.lam and all(target.copied for target in targets):
        reasons = "; ".join(sorted({str(target.copied) for target in targets})) or "no tensors"
        raise SettingError(
            f"{source}: expected a tensor to perturb, got {len(targets)} to leave ({reasons}). "
            "Correct include, exclude or source."
        )


def _notes_on_noise(
    targets: list[LiveTensor],
    settings: NoisyTune,
    pooled: float | None,
    workers: ThreadPoolExecutor,
    former: Sequence[NoisyTune],
) -> Iterator[str]:
    """Say what noise there is; where it is this one, leave the tensors as they are.

    Of what is known of former calls, weights tell whether it is there still.
    """
    todo = [target for target in targets if target.copied is None]
    share = measure_share(todo, settings, pooled, workers)
    is_gone = share is not None and abs(share) < _LEAST_SHARE
    others = [noise for noise in dict.fromkeys(former) if not is_gone or noise.seed != settings.seed]
    if settings in others or (share is not None and not others and _IS_THIS[0] < share < _IS_THIS[1]):
        for target in todo:
            target.copied = HAS_IT
        yield f"the weights have this noise already ({_text(settings)}): nothing was done; again=True adds it once more"
        return
    yield from (f"the weights have other noise already ({_text(noise)}): this comes on top of it" for noise in others)
    if share is not None and not is_gone and not others:
        what = f"noise of seed {settings.seed} already, about {share:.2f} times that of lam {settings.lam:g}"
        yield f"the weights have {what}: this comes on top of it"


def _text(settings: NoisyTune) -> str:
    return f"lam {settings.lam:g}, seed {settings.seed}"


def _scale(target: LiveTensor, settings: NoisyTune, pooled: float | None) -> float:
    assert target.moments is not None
    return settings.noise_scale(pooled or target.moments.std, target.dtype)


def _may_overflow(target: LiveTensor, settings: NoisyTune, pooled: float | None) -> bool:
    """Bound the largest |w'| from the moments, for nearly no weight comes near; the rest is tried on a copy."""
    assert target.moments is not None
    bound = abs(target.moments.mean) + target.moments.m2**0.5 + _LARGEST_U * _scale(target, settings, pooled)
    return not bound < 0.99 * torch.finfo(target.tensor.dtype).max


def _add_noise(
    target: LiveTensor, tensor: torch.Tensor, settings: NoisyTune, pooled: float | None, workers: ThreadPoolExecutor
) -> Effect:
    assert target.moments is not None
    sums = kernels.add_noise(
        tensor,
        target.dtype,
        workers,
        key=key(settings.seed, target.drawn_for or target.name),
        scale=_scale(target, settings, pooled),
        is_normal=settings.noise == "normal",
        is_stochastic=settings.rounding == "stochastic",
    )
    return merge_effect(sums, tensor.numel(), pooled or target.moments.std, what=target.name)
