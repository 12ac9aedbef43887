"""The figures in Lightning's loggers: of Trainers made before and after patch_model, by its entry point."""

import csv
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import event_files
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F  # noqa: N812

from surgery import patch_model, stats
from surgery.hooks.patch import find_patch
from surgery.hooks.trackers import figures
from surgery.hooks.trackers.lightning import Figures, make_callbacks

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:::lightning")]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 3))
        self.distances: list[float] = []

    def training_step(self, batch: Any, number: int) -> torch.Tensor:  # noqa: ARG002
        x, labels = batch
        loss = F.cross_entropy(self.model(x), labels)
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if find_patch(self.model) is not None:
            self.distances.append(stats(self.model)["distance"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(logger: Any, **settings: Any) -> Any:
    return lightning.Trainer(max_epochs=1, accelerator="cpu", logger=logger, **QUIET, **settings)


def fit(trainer: Any, task: Task) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(6, generator=generator), number % 3) for number in range(24)]
    trainer.fit(task, torch.utils.data.DataLoader(rows, batch_size=4))


def read(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_entry_points_make_the_callback() -> None:
    found = [
        {point.value for point in entry_points(group=f"{package}.callbacks_factory")}
        for package in ("lightning.pytorch", "pytorch_lightning")
    ]
    home = "surgery.hooks.trackers.lightning"
    assert f"{home}:make_callbacks" in found[0]
    assert f"{home}:make_standalone_callbacks" in found[1]
    (callback,) = make_callbacks()
    assert isinstance(callback, lightning.pytorch.Callback)


@pytest.mark.parametrize("is_first", [True, False], ids=["patched-first", "trainer-first"])
def test_csv_has_figures_where_lightning_logs(is_first: bool, tmp_path: Path) -> None:
    task = Task()
    if is_first:
        patch_model(task.model, anchor=0.1, rdrop=1.0)
    trainer = make_trainer(CSVLogger(tmp_path), log_every_n_steps=3)
    if not is_first:
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, Figures)]
        patch_model(task.model, anchor=0.1, rdrop=1.0)
    fit(trainer, task)
    lines = read(tmp_path)
    assert sum(isinstance(one, Figures) for one in trainer.callbacks) == 1
    assert [float(line["w_pre_distance"]) for line in lines] == pytest.approx([task.distances[n] for n in (2, 5)])
    assert all(float(line["rdrop_kl"]) > 0 and float(line["train_loss"]) > 0 for line in lines)
    (file,) = tmp_path.rglob("hparams.yaml")
    found = yaml.safe_load(file.read_text())
    assert found | {"width": 12, "surgery_anchor": 0.1, "surgery_rdrop": 1.0} == found


def test_accumulated_batches_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = figures.figures_of
    monkeypatch.setattr(figures, "figures_of", lambda models: calls.append(models) or measure(models))
    task = Task()
    patch_model(task.model, rdrop=1.0, anchor=0.1)
    fit(make_trainer(CSVLogger(tmp_path), log_every_n_steps=1, accumulate_grad_batches=3), task)
    logged = [float(line["w_pre_distance"]) for line in read(tmp_path)]
    assert logged == pytest.approx([task.distances[n] for n in (2, 5)])
    assert len(calls) == 2


def test_tensorboard_shows_one_set_of_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    task = Task()
    patch_model(task.model, anchor=0.1)
    fit(make_trainer(TensorBoardLogger(tmp_path), log_every_n_steps=1), task)
    assert event_files.scalars(tmp_path)["w_pre_distance"] == pytest.approx(task.distances)
    shown = event_files.hyperparameters(tmp_path)
    assert {"width", "surgery_anchor"} <= shown


def test_module_without_a_patch_is_logged_as_ever(tmp_path: Path) -> None:
    fit(make_trainer(CSVLogger(tmp_path), log_every_n_steps=3), Task())
    assert read(tmp_path)[0].keys() == {"epoch", "step", "train_loss"}
