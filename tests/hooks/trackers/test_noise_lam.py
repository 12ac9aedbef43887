"""Which noise the trackers are told of: that which is in the weights of a model."""

import gc
from typing import Any

import pytest
import seeded
from torch import nn

from surgery import perturb_model
from surgery.hooks.run.inside.noise import Noise
from surgery.hooks.run.inside.snapshots import Snapshots
from surgery.hooks.trackers.figures import figures_of, settings_of
from surgery.live.applied_noise import _noise

pytestmark = pytest.mark.usefixtures("one_thread")


def told(model: Any) -> tuple[Any, Any]:
    """What trackers get: lam beside the loss, and the settings."""
    settings = settings_of([model])
    return figures_of([model]).get("noise_lam"), (settings.get("surgery_noisytune"), settings.get("surgery_noise_seed"))


def noisy_run() -> tuple[Any, Noise]:
    model = seeded.bert()
    noise = Noise(0.15, 1, Snapshots())
    noise.add(model, list(model.parameters()), [], [], [])
    return model, noise


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_perturbed_model_has_lam(wrap: Any) -> None:
    model = wrap(seeded.bert())
    assert told(model) == (None, (None, None))
    perturb_model(model, lam=0.25, seed=7)
    assert told(model) == (0.25, (0.25, 7))


def test_perturbed_part_counts_for_the_model_and_no_other() -> None:
    model, other = seeded.bert(), seeded.bert()
    perturb_model(model.bert, lam=0.25)
    assert (told(model)[0], told(model.bert.encoder)[0], told(other)[0]) == (0.25, 0.25, None)


def test_dead_model_is_not_kept() -> None:
    perturb_model(model := seeded.bert())
    assert model in _noise
    count = len(_noise)
    del model
    gc.collect()
    assert len(_noise) < count


def test_noise_of_a_run_is_told_until_it_is_off() -> None:
    model, noise = noisy_run()
    assert told(model) == (0.15, (0.15, 1))
    noise.undo(list(model.parameters()))  # the run goes on from weights that have it
    assert told(model) == (0.15, (0.15, 1))
    noise.note_off(list(model.parameters()))
    assert told(model) == (None, (None, None))


def test_resumed_run_is_told_the_noise_that_it_began_with() -> None:
    model, noise = noisy_run()
    noise.note_other(list(model.parameters()), 0.1, 5)
    assert told(model) == (0.1, (0.1, 5))


def test_forgotten_noise_is_told_once_it_is_added_again() -> None:
    model, noise = noisy_run()
    noise.forget(list(model.parameters()))
    assert told(model) == (None, (None, None))
    noise.add(model, list(model.parameters()), [], [], [])
    assert told(model) == (0.15, (0.15, 1))
