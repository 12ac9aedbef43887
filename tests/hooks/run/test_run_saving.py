"""What torch.save writes under a run: models as they would be without one, for those who have no surgery."""

import io
import json
from pathlib import Path
from typing import Any

import byhand
import pytest
import torch
from running import SCRIPTS, run
from torch import nn

from surgery import patch_model
from surgery.hooks.run.inside.saving import plain_pickle

FLAGS = (*byhand.MIXOUT, *byhand.RDROP, "--anchor", str(byhand.ANCHOR))
PLAIN = {"rates": [0.3, 0.1], "hooks": 0, "marks": [], "far": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script has saved its models there in a run, and loaded them without surgery."""
    folder = tmp_path_factory.mktemp("saved")
    for way, flags in {"write": FLAGS, "read": ()}.items():
        ran = run(folder, "saving.py", *flags, args=(way, folder))
        assert ran.code == 0, ran.err
    return folder


@pytest.mark.parametrize("name", ["model", "legacy", "file", "nested", "copy"])
def test_saved_model_loads_without_surgery_as_it_was(name: str, folder: Path) -> None:
    assert json.loads((folder / "read.json").read_text())[name] == PLAIN


def test_saved_model_is_that_of_a_plain_run_to_the_byte(folder: Path) -> None:
    assert (folder / "model.bin").read_bytes() == (folder / "model-without.bin").read_bytes()


def test_what_was_not_patched_is_saved_to_the_byte(folder: Path) -> None:
    assert (folder / "untrained.bin").read_bytes() == (folder / "untrained-without.bin").read_bytes()


def test_pickle_module_of_the_script_saves_the_patch(folder: Path) -> None:
    written = json.loads((folder / "written.json").read_text())
    assert written["used"] == 1
    assert [one["rates"] for one in written["other"]] == [[0, 0], [0, 0]]
    assert all("_surgery_patch" in one["marks"] for one in written["other"])


def test_model_that_was_saved_stays_regularized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import nets
    import saving

    model: Any = saving.build()
    model.dropout = 0.0
    steps = byhand.seeded_steps(nets.batches())
    byhand.assert_equal(torch.load(folder / "final.pt"), byhand.train(model, steps, model, mixed=byhand.Mixed(model)))


class OfWeights(nn.Linear):
    """Has a state of its own."""

    def __getstate__(self) -> Any:
        return {"values": self.weight.detach()}


class OfSizes(nn.Linear):
    """Has no state at all."""

    def __reduce__(self) -> Any:
        return OfSizes, (3, 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1))),
        lambda: OfWeights(3, 4),
        lambda: OfSizes(3, 4),
    ],
    ids=["traced", "own state", "no state"],
)
def test_module_that_pickles_itself_is_saved_to_the_byte(build: Any) -> None:
    model = build()
    before, after = io.BytesIO(), io.BytesIO()
    torch.save(model, before)
    torch.save(patch_model(model, mixout=0.5), after, plain_pickle)
    assert after.getvalue() == before.getvalue()
