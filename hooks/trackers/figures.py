"""What trackers are told of the models in a training: figures with each training loss, settings once.

A failure costs one warning and the figures, never the training.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import nn

from surgery.escapes import get_logger
from surgery.live.applied_noise import find_noise

from ..lifecycle import Patch, find_patched
from ..marks import PATCH
from ..refusals import handled
from ..regularizer import Settings

_log = get_logger(__name__)
_of_run: dict[str, Any] = {}
"""The settings of a `surgery run` around this process."""
_is_told = False


def figures_of(models: Sequence[nn.Module], *, is_collective: bool = True) -> dict[str, float]:
    """Return what goes beside a training loss in a log.

    `noise_lam` of NoisyTune, with methods that act on weights `w_pre_distance`, ||w - w_pre||_2, and what each method
    logs; means are over the forwards since they were last read. Those of a second patched model end in `_2`.

    Args:
        models: those that are trained; they may be wrapped, or parts of a patched model.
        is_collective: all ranks call this, so that the distance of sharded weights can be summed up. Else it is left
            out.
    """
    found: dict[str, float] = {}
    for *_, noise in find_noise(models):
        found.setdefault("noise_lam", noise.lam)
    for number, root in enumerate(find_patched(models), 1):
        figures = _figures_of_patch(root, is_collective=is_collective)
        found |= {_numbered(name, number): value for name, value in figures.items()}
    return found


def _figures_of_patch(root: nn.Module, *, is_collective: bool) -> dict[str, float]:
    patch: Patch = root.__dict__[PATCH]
    found = {}
    if patch.weights is not None and (is_collective or not patch.weights.is_sharded):
        found["w_pre_distance"] = patch.weights.distance()
    for regularizer in patch.regularizers:
        found |= regularizer.logs(root)
    return found


def settings_of(models: Sequence[nn.Module]) -> dict[str, Any]:
    """Return what was asked for, flat, for a tracker's config: `surgery_mixout`, `surgery_mixout_granularity`."""
    found = dict(_of_run)
    for *_, noise in find_noise(models):
        found |= {"surgery_noisytune": noise.lam, "surgery_noise_seed": noise.seed}
    for number, root in enumerate(find_patched(models), 1):
        patch: Patch = root.__dict__[PATCH]
        found |= {_numbered(name, number): value for name, value in _flatten(patch.settings).items()}
    return found


def announce(methods: Iterable[Settings], **others: Any) -> None:
    """Take in what a `surgery run` asks for: its models are patched after the trackers have been told the settings."""
    given = {f"surgery_{name}": value for name, value in others.items() if value not in (None, ())}
    _of_run.update(_flatten(methods) | {name: _plain(value) for name, value in given.items()})


def is_under_run() -> bool:
    """Tell whether a `surgery run` is to patch the models of this process."""
    return bool(_of_run)


@contextmanager
def lenient() -> Iterator[None]:
    """Let nothing that fails in here end the training; warn of the first failure."""
    global _is_told
    try:
        with handled():
            yield
    except Exception as error:
        if not _is_told:
            _log.warning(
                "figures: expected some to log, got %s: %s. The training goes on without them.",
                type(error).__name__,
                error,
            )
        _is_told = True


def _flatten(methods: Iterable[Settings]) -> dict[str, Any]:
    found = {}
    for one in methods:
        for field in fields(one):  # type: ignore[arg-type]
            name = one.name if field.name == one.number else f"{one.name}_{field.name}"
            found[f"surgery_{name}"] = _plain(getattr(one, field.name))
    return found


def _plain(value: Any) -> Any:
    """Make a value what every tracker takes; a tuple of globs becomes words."""
    if isinstance(value, str | int | float):
        return value
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"
