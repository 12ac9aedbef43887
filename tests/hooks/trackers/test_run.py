"""The figures of `surgery run` around a script that knows nothing of them, read back from the files of its tracker."""

import csv
import json
from pathlib import Path

import byhand
import event_files
import pytest
import seeded
import yaml
from running import Run, run

SETTINGS = {
    "surgery_noisytune": byhand.LAM,
    "surgery_mixout": byhand.P,
    "surgery_rdrop": byhand.ALPHA,
    "surgery_rdrop_every": 1,
    "surgery_anchor": byhand.ANCHOR,
}
FIGURES = {"noise_lam", "w_pre_distance", "mixed_share", "rdrop_kl", "rdrop_ce"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained BERT without a head."""
    return seeded.bert_folder(tmp_path_factory.mktemp("source"))


def logged(way: str, source: Path, tmp_path: Path, *flags: str) -> Run:
    ran = run(tmp_path, "logged.py", *flags, args=(way, source, tmp_path / "out"))
    assert ran.code == 0, ran.err
    assert "figures:" not in ran.err
    return ran


@pytest.mark.parametrize("way", ["trainer", "callback"])
def test_trainer_in_tensorboard(way: str, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    ran = logged(way, source, tmp_path, *byhand.ALL)
    found = event_files.scalars(tmp_path / "out")
    for name in ("loss", *FIGURES):
        assert len(found[f"train/{name}"]) == 4, name
    assert found["train/noise_lam"] == pytest.approx([byhand.LAM] * 4)
    assert found["train/w_pre_distance"][-1] == pytest.approx(ran.models[0]["distance"])
    assert not any(tag.endswith("_2") for tag in found)
    arguments = json.loads(event_files.text(tmp_path / "out", "args"))
    assert arguments | SETTINGS == arguments


def test_noise_alone_in_tensorboard(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    logged("trainer", source, tmp_path, *byhand.NOISE, "--noise-seed", "3")
    found = event_files.scalars(tmp_path / "out")
    assert found["train/noise_lam"] == pytest.approx([byhand.LAM] * 4)
    assert not {f"train/{name}" for name in FIGURES - {"noise_lam"}} & found.keys()
    assert json.loads(event_files.text(tmp_path / "out", "args"))["surgery_noise_seed"] == 3


def test_script_without_a_run_logs_as_ever(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    logged("trainer", source, tmp_path)
    assert not {f"train/{name}" for name in FIGURES} & event_files.scalars(tmp_path / "out").keys()
    assert "surgery_" not in event_files.text(tmp_path / "out", "args")


@pytest.mark.parametrize("settings", [byhand.ALL, pytest.param((), marks=pytest.mark.sweep)], ids=["run", "plain"])
def test_lightning_in_csv(settings: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    ran = logged("lightning", source, tmp_path, *settings)
    (file,) = (tmp_path / "out").rglob("metrics.csv")
    with file.open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 2  # of 5 steps, every second
    if not settings:
        assert lines[0].keys() == {"epoch", "step", "train_loss"}
        return
    assert lines[0].keys() == {"epoch", "step", "train_loss", *FIGURES}
    assert [float(line["noise_lam"]) for line in lines] == pytest.approx([byhand.LAM] * 2)
    near, far = (float(line["w_pre_distance"]) for line in lines)
    assert 0 < near < far < ran.models[0]["distance"]
    found = yaml.safe_load(file.with_name("hparams.yaml").read_text())
    assert found | SETTINGS == found


def test_accelerate_in_tensorboard(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    ran = logged("accelerate", source, tmp_path, *byhand.ALL)
    found = event_files.scalars(tmp_path / "out")
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys({"train_loss", *FIGURES}, 5) | {
        "eval_loss": 1
    }
    assert found["w_pre_distance"][-1] == pytest.approx(ran.models[0]["distance"])
    (file,) = (tmp_path / "out").rglob("hparams.yml")
    found = yaml.safe_load(file.read_text())
    assert found | SETTINGS | {"lr": 0.1} == found
