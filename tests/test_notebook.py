"""A real notebook, executed by nbconvert: what its cells show is short, and bars are a notebook's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from checkpoints import write_json
from commands import clean_env
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import save_file

LAYERS = 60
WIDGET = "application/vnd.jupyter.widget-view+json"
SET_UP = f"""
import os, time
from safetensors.torch import load_file
from torch import nn
from surgery import describe, diff_checkpoints, inspect_checkpoint, patch_model, perturb_checkpoint, progress
from surgery import verify_checkpoint
model = nn.Sequential(*(nn.Linear(16, 16) for _ in range({LAYERS})))
_ = model.load_state_dict(load_file("model/model.safetensors"))
"""
SLOW = """
with progress.bar(2_000_000, "sleeping") as on_bytes:
    for _ in range(2):
        time.sleep(0.6)
        on_bytes(1_000_000)
"""
CELLS = {
    "set up": SET_UP,
    "perturb": 'recipe = perturb_checkpoint("model", "noisy")\nrecipe',
    "diff": 'diff_checkpoints("model", "noisy")',
    "inspect": 'inspect_checkpoint("model", stats=True)',
    "describe": "describe(patch_model(model, mixout=0.5))",
    "verify": 'verify_checkpoint("noisy")',
    "list": "[recipe, recipe.files[0]]",
    "bar": SLOW,
    "bars of threads": 'progress.LATE = 0\nassert verify_checkpoint("noisy").is_equal',
    "disabled": 'os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"\nassert verify_checkpoint("noisy").is_equal',
}
KERNEL = """
import sys, time
from types import ModuleType, SimpleNamespace
for name in ("IPython", "ipykernel.zmqshell"):
    sys.modules[name] = ModuleType(name)
sys.modules["IPython"].get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["ipywidgets"] = None
"""


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(LAYERS)))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "none of ours"})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each cell has shown."""
    folder = tmp_path_factory.mktemp("notebook")
    write_model(folder / "model")
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in CELLS.values()])
    nbformat.write(notebook, folder / "notebook.ipynb")
    names = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "HF_HOME")
    env = clean_env(**{name: str(folder / name) for name in names})
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "notebook.ipynb"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(folder / "notebook.ipynb", as_version=4).cells
    return {name: cell.outputs for name, cell in zip(CELLS, cells, strict=True)}


def test_output_of_a_notebook_is_short(outputs):
    assert len(json.dumps(outputs)) < 20_000


def test_nothing_is_printed(outputs):
    assert not [output for shown in outputs.values() for output in shown if output.output_type == "stream"]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("perturb", "120 of 120 tensors perturbed"),
        ("diff", "<br>120 changed<br>"),
        ("inspect", "perturb changes 120 of them</p>"),
        ("describe", "60 weights"),
    ],
)
def test_results_are_tables(cell, text, outputs):
    (shown,) = outputs[cell]
    assert text in shown.data["text/html"]
    assert len(shown.data["text/html"]) < 8_000
    assert shown.data["text/html"].count("<tr>") <= 21
    assert len(shown.data["text/plain"]) <= 1_000


@pytest.mark.parametrize(("cell", "text"), [("verify", "Verification(folder='noisy'"), ("list", "<120 TensorRecord>")])
def test_other_results_are_a_line(cell, text, outputs):
    (shown,) = outputs[cell]
    assert [*shown.data] == ["text/plain"]
    assert text in shown.data["text/plain"]


def test_bar_is_a_widget(outputs):
    (shown,) = outputs["bar"]
    assert WIDGET in shown.data
    assert shown.data["text/plain"].startswith("sleeping: 100%")


def test_bars_of_threads_stand_in_their_cell(outputs):
    assert all(WIDGET in shown.data for shown in outputs["bars of threads"])
    assert any("verifying:" in shown.data["text/plain"] for shown in outputs["bars of threads"])


def test_bars_can_be_turned_off(outputs):
    assert outputs["disabled"] == []


def bar_of_text(folder: Path, first: str, late: float, disabled: str = "") -> str:
    """Return what a bar of 1.2 seconds prints in a kernel without ipywidgets, after one import."""
    code = f"{KERNEL}\nimport {first}\nfrom surgery import progress\nprogress.LATE = {late}\n{SLOW}"
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": disabled}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("first", ["surgery.progress", "surgery.perturb.execute", "surgery.push.push"])
def test_bar_without_ipywidgets_is_text_and_no_warning(first, tmp_path):
    assert bar_of_text(tmp_path, first, 0.5).strip().startswith("sleeping:  50%")


@pytest.mark.parametrize(("late", "disabled"), [(60, ""), (0, "1")], ids=["quick", "disabled"])
def test_no_bar_leaves_no_text(late, disabled, tmp_path):
    assert bar_of_text(tmp_path, "surgery.progress", late, disabled) == ""
