"""The figures in the logs of transformers' Trainer, read back from its history and the files of real trackers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import event_files
import pytest
import seeded
import torch
from checkpoints import tree_digest
from torch import nn
from trainers import Reporter, trained, trainer
from transformers import TrainerCallback

from surgery import RDrop, SettingError, SurgeryCallback, patch_model, perturb_model, stats, unpatch_model
from surgery.hooks.trackers import figures

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]
FIGURES = ("rdrop_kl", "rdrop_ce", "w_pre_distance", "mixed_share")
ALL: dict[str, Any] = {"mixout": 0.5, "rdrop": RDrop(1.0, every=2)}


def with_loss(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [log for log in logs if "loss" in log]


# -- which Trainers ------------------------------------------------------------------------------------------------


def test_trainer_without_a_callback_logs_figures(tmp_path: Path) -> None:
    reporter = Reporter()
    model = patch_model(seeded.bert(), mixout=0.5, rdrop=1.0)
    run = trained(model, tmp_path, callbacks=[reporter], eval_strategy="steps", eval_steps=2)
    for logs in (run.state.log_history, reporter.logs):
        assert [set(FIGURES) <= log.keys() for log in with_loss(logs)] == [True] * 4
        assert with_loss(logs)[-1]["w_pre_distance"] == stats(model)["distance"]
        assert not any(log.keys() & set(FIGURES) for log in logs if "loss" not in log)


def test_trainer_made_before_the_patch_logs_figures(tmp_path: Path) -> None:
    reporter = Reporter()
    model = seeded.bert()
    run = trainer(model, tmp_path, callbacks=[reporter])
    patch_model(model, anchor=0.1)
    run.train()
    assert all(log["w_pre_distance"] > 0 for log in with_loss(reporter.logs))


@pytest.mark.parametrize("place", [0, 1], ids=["before", "after"])
def test_callback_in_the_script_adds_nothing_twice(
    place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = figures.figures_of
    monkeypatch.setattr(
        "surgery.hooks.trackers.transformers.figures_of", lambda models: calls.append(1) or measure(models)
    )
    reporter = Reporter()
    callbacks: list[Any] = [reporter]
    callbacks.insert(place, SurgeryCallback())
    model = patch_model(seeded.bert(), mixout=0.5, rdrop=1.0)
    trained(model, tmp_path, callbacks=callbacks)
    assert [set(FIGURES) <= log.keys() for log in with_loss(reporter.logs)] == [True] * 4
    assert len(calls) == 4
    assert "already one" not in caplog.text


def test_rdrop_figures_are_means_since_the_last_log(tmp_path: Path) -> None:
    torch.manual_seed(0)
    every = with_loss(trained(patch_model(seeded.bert(), rdrop=1.0), tmp_path).state.log_history)
    torch.manual_seed(0)
    second = with_loss(trained(patch_model(seeded.bert(), rdrop=1.0), tmp_path, logging_steps=2).state.log_history)
    means = [(every[n]["rdrop_kl"] + every[n + 1]["rdrop_kl"]) / 2 for n in (0, 2)]
    assert [log["rdrop_kl"] for log in second] == pytest.approx(means)


def test_model_without_a_patch_is_logged_as_ever(tmp_path: Path) -> None:
    patch_model(other := seeded.bert(), mixout=0.5)
    run = trained(seeded.bert(), tmp_path)
    assert {name for log in with_loss(run.state.log_history) for name in log} == {
        *("loss", "grad_norm", "learning_rate", "epoch", "step")
    }
    unpatch_model(other)


def test_unpatched_model_is_logged_as_ever(tmp_path: Path) -> None:
    run = trained(unpatch_model(patch_model(seeded.bert(), mixout=0.5)), tmp_path)
    assert not any(log.keys() & set(FIGURES) for log in run.state.log_history)


class Loss(nn.Module):
    """Holds the model, as the losses of sentence-transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)


@pytest.mark.parametrize("where", [lambda model: model.bert, Loss], ids=["part", "holder"])
def test_patch_on_a_part_or_around_the_model_is_found(where: Callable[[Any], Any], tmp_path: Path) -> None:
    model = seeded.bert()
    patched = patch_model(where(model), anchor=0.1)
    found = with_loss(trained(model, tmp_path).state.log_history)
    assert found[-1]["w_pre_distance"] == stats(patched)["distance"] > 0


def test_second_patched_part_is_numbered(tmp_path: Path) -> None:
    model = seeded.bert()
    parts = [patch_model(part, anchor=0.1) for part in (model.bert.encoder, model.bert.pooler)]
    last = with_loss(trained(model, tmp_path).state.log_history)[-1]
    assert [last["w_pre_distance"], last["w_pre_distance_2"]] == [stats(part)["distance"] for part in parts]


def test_noise_is_logged_beside_a_patch(tmp_path: Path) -> None:
    model = seeded.bert()
    perturb_model(model, lam=0.25, seed=3)
    patch_model(model, anchor=0.1)
    run = trained(model, tmp_path)
    assert [log["noise_lam"] for log in with_loss(run.state.log_history)] == [0.25] * 4
    found = figures.settings_of([model])
    assert (found["surgery_noisytune"], found["surgery_noise_seed"], found["surgery_anchor"]) == (0.25, 3, 0.1)


def test_copied_model_has_its_own_figures(tmp_path: Path) -> None:
    from copy import deepcopy

    model = deepcopy(patch_model(seeded.bert(), anchor=0.1))
    assert with_loss(trained(model, tmp_path).state.log_history)[-1]["w_pre_distance"] == stats(model)["distance"]


# -- failures ------------------------------------------------------------------------------------------------------


def test_failure_costs_one_line_and_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(seeded.bert(), anchor=0.1)
    monkeypatch.setattr(figures, "_is_told", False)
    monkeypatch.setattr(figures, "_figures_of_patch", lambda *_, **__: {}["gone"])
    run = trained(model, tmp_path)
    assert len(with_loss(run.state.log_history)) == 4
    lines = [line for line in caplog.messages if line.startswith("figures: ")]
    assert lines == ["figures: expected some to log, got KeyError: 'gone'. The training goes on without them."]


def test_callback_says_nothing_of_a_run_that_patches_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"^SurgeryCallback: expected a patched model"):
        trained(seeded.bert(), tmp_path, callbacks=[SurgeryCallback()])
    monkeypatch.setattr(figures, "_of_run", {"surgery_mixout": 0.5})
    trained(seeded.bert(), tmp_path, callbacks=[SurgeryCallback()])


# -- settings ------------------------------------------------------------------------------------------------------

SETTINGS = {
    "surgery_mixout": 0.5,
    "surgery_mixout_granularity": "neuron",
    "surgery_rdrop": 1.0,
    "surgery_rdrop_every": 2,
}


class Config(TrainerCallback):
    """Keeps what a reporter reads of the arguments, as each of them does."""

    def __init__(self) -> None:
        self.read: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self.read = [args.to_dict(), args.to_sanitized_dict(), json.loads(args.to_json_string())]


def test_settings_are_in_the_config_while_training_begins(tmp_path: Path) -> None:
    config = Config()
    run = trained(patch_model(seeded.bert(), **ALL), tmp_path, callbacks=[config])
    assert [one | SETTINGS == one for one in config.read] == [True] * 3
    assert not any(name.startswith("surgery_") for name in run.args.to_dict())


def test_files_of_a_run_are_those_of_a_plain_one_but_for_its_history(tmp_path: Path) -> None:
    files = []
    for name, settings in (("plain", {}), ("patched", {"anchor": 0.0})):
        model = seeded.bert()
        if settings:
            patch_model(model, **settings)
        (tmp_path / name).mkdir()
        run = trained(model, tmp_path / "out", save_strategy="steps", save_steps=4, callbacks=[Config()])
        run.save_model()
        (tmp_path / "out").rename(tmp_path / name / "out")
        files.append(tree_digest(tmp_path / name / "out"))
    plain, patched = files
    changed = {name for name in plain if plain[name] != patched.get(name)} | patched.keys() - plain.keys()
    assert changed == {"checkpoint-4/trainer_state.json"}


# -- real trackers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callbacks", [(), (SurgeryCallback,)], ids=["alone", "callback"])
def test_tensorboard_has_figures_and_settings(callbacks: tuple[Any, ...], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = trained(
        patch_model(seeded.bert(), **ALL), tmp_path, callbacks=[make() for make in callbacks], report_to="tensorboard"
    )
    found = event_files.scalars(tmp_path)
    logged = with_loss(run.state.log_history)
    for name in FIGURES:
        expected = [log[name] for log in logged if name in log]
        assert expected
        assert found[f"train/{name}"] == pytest.approx(expected)
    assert [len(found[f"train/{name}"]) for name in ("loss", "w_pre_distance", "rdrop_kl")] == [4, 4, 2]
    arguments = json.loads(event_files.text(tmp_path, "args"))
    assert arguments | SETTINGS == arguments


@pytest.mark.filterwarnings("ignore")  # mlflow's own
def test_mlflow_has_figures_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    model = patch_model(seeded.bert(), **ALL)
    run = trained(model, tmp_path / "out", report_to="mlflow")
    (folder,) = [path.parent for path in (tmp_path / "store").rglob("params")]
    params = {path.name: path.read_text() for path in (folder / "params").iterdir()}
    assert {name: params.get(name) for name in SETTINGS} == {name: str(value) for name, value in SETTINGS.items()}
    lines = (folder / "metrics" / "w_pre_distance").read_text().splitlines()
    expected = [log["w_pre_distance"] for log in with_loss(run.state.log_history)]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(expected)
    mlflow.end_run()
