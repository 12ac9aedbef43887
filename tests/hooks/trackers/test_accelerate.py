"""The figures in what accelerate's trackers are handed."""

from typing import Any

import pytest
import seeded
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from surgery import patch_model, stats

pytestmark = pytest.mark.usefixtures("one_thread")


class Tracker(GeneralTracker):  # type: ignore[misc]
    """Keeps what it is handed."""

    name = "kept"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logs: list[dict[str, Any]] = []

    @property
    def tracker(self) -> "Tracker":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:  # noqa: ARG002
        self.logs.append(values)


def start(model: Any) -> tuple[Accelerator, Tracker, Any]:
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker])
    prepared = accelerator.prepare(model)
    accelerator.init_trackers("project", config={"lr": 0.1})
    return accelerator, tracker, prepared


@pytest.mark.parametrize("name", ["loss", "train_loss", "train/loss", "Loss"])
def test_training_loss_has_figures_beside_it(name: str) -> None:
    model = patch_model(seeded.bert(), anchor=0.1)
    accelerator, tracker, _ = start(model)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    values = {name: 1.0, "lr": 0.1}
    accelerator.log(values, step=0)
    assert tracker.logs == [{name: 1.0, "lr": 0.1, "w_pre_distance": stats(model)["distance"]}]
    assert values == {name: 1.0, "lr": 0.1}
    assert tracker.config == {"lr": 0.1, "surgery_anchor": 0.1}


@pytest.mark.parametrize("name", ["eval_loss", "val/loss", "test-loss", "accuracy", "glossary"])
def test_other_logs_stay_as_they_are(name: str) -> None:
    accelerator, tracker, _ = start(patch_model(seeded.bert(), anchor=0.1))
    accelerator.log({name: 1.0})
    assert tracker.logs == [{name: 1.0}]


def test_model_without_a_patch_is_logged_as_ever() -> None:
    accelerator, tracker, _ = start(seeded.bert())
    accelerator.log({"loss": 1.0})
    assert tracker.logs == [{"loss": 1.0}]
    assert tracker.config == {"lr": 0.1}
