"""Bars of downloads: in a notebook on stdout, and only of what takes a second, as the Hub's client does not ask."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import huggingface_hub
import pytest
from checkpoints import tensors
from hub import Hub
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors.numpy import save

from surgery import inspect_checkpoint, progress
from surgery.checkpoint import hub as hub_of

pytestmark = pytest.mark.transformers
MODEL = "org/model"
_HAS_BARS_OF_FILES = "tqdm_class" in signature(huggingface_hub.hf_hub_download).parameters


@pytest.fixture
def hub(in_process: Callable[[Any], None]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(MODEL, {"config.json": b"{}", "model.safetensors": save(tensors())})
        in_process(hub)
        yield hub


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have bars think that they are in a notebook without ipywidgets, and be drawn after so many seconds."""

    def use(late: float) -> None:
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
        enable_progress_bars()  # transformers' logging.disable_progress_bar is for the whole process
        for module in (progress, hub_of):
            monkeypatch.setattr(module, "is_notebook", lambda: True)
            monkeypatch.setattr(module, "LATE", late)

    return use


def fetch() -> None:
    hub_of.fetch(MODEL, revision=None, variant=None, token=None)


@pytest.mark.usefixtures("hub")
def test_download_has_its_bar_on_stdout(notebook, capsys):
    notebook(0)
    fetch()
    shown = capsys.readouterr()
    assert "Fetching 2 files: 100%" in shown.out
    assert shown.err == ""


@pytest.mark.usefixtures("hub")
def test_quick_download_has_no_bar(notebook, capsys):
    notebook(60)
    fetch()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("hub")
def test_download_has_no_bar_where_they_are_off(notebook, capsys, monkeypatch):
    notebook(0)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a cell, when huggingface_hub has read it
    fetch()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("hub")
@pytest.mark.skipif(not _HAS_BARS_OF_FILES, reason="huggingface_hub 0 takes no bar for a single file")
@pytest.mark.parametrize(("late", "shown"), [(0, "config.json: 100%"), (60, "")], ids=["slow", "quick"])
def test_small_files_have_a_bar_only_if_they_are_slow(late, shown, notebook, capsys):
    notebook(late)
    assert len(inspect_checkpoint(MODEL).tensors) == 3
    out, err = capsys.readouterr()
    assert err == ""
    assert shown in out if shown else not out
