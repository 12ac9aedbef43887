"""Whether the Python of a command can be reached: what `surgery run` refuses before anything starts."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from commands import clean_env
from runs import ROOT, write_program

MIXOUT = ("run", "--mixout", "0.7")


@pytest.mark.parametrize(
    ("options", "got"),
    [(["-S"], "-S"), (["-I"], "-I"), (["-E"], "-E"), (["-sE"], "-E"), (["-Iu"], "-I"), (["-W", "ignore", "-uS"], "-S")],
)
def test_a_python_that_runs_no_sitecustomize_is_refused(options, got, run_cli):
    ran = run_cli(*MIXOUT, "--", sys.executable, *options, "-c", "print(1)")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"error: {sys.executable}: expected a Python that reads PYTHONPATH and runs sitecustomize, got {got}. "
        "Leave it out, or start the script with another python.\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["-c", "1", "-E"],
        ["-mplatform", "-S"],
        ["-Wignore::SyntaxWarning", "-c1"],
        ["-X", "dev", "-sPu", "-c", "1", "-I"],
    ],
)
def test_other_options_of_python_are_its_own(options, run_cli):
    ran = run_cli(*MIXOUT, "--allow-inactive", "--", sys.executable, *options)
    assert "surgery: INACTIVE: command: expected a Python that imports torch" in ran.err, ran.err


@pytest.mark.parametrize(
    "first_lines",
    [
        f"#!{sys.executable} -sE\n",
        f"#! {sys.executable}  -I\n",
        "#!/usr/bin/env -S python -E\n",
        f"#!/bin/sh\n'''exec' \"{sys.executable}\" -I \"$0\" \"$@\"\n' '''\n",
    ],
    ids=["plain", "spaces", "env", "trampoline"],
)
def test_a_script_with_such_a_python_is_refused(first_lines, run_cli, tmp_path):
    write_program(tmp_path / "tool", f"{first_lines}print(1)\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = run_cli(*MIXOUT, "--", "./tool", env={"PATH": path})
    assert ran.code == 2
    assert ran.err.startswith("error: ./tool: expected a Python that reads PYTHONPATH")


@pytest.mark.parametrize(
    "first_lines",
    [
        f"#!{sys.executable}\n",
        "#!/usr/bin/env python\n",
        f"#!/bin/sh\n'''exec' '{sys.executable}' \"$0\" \"$@\"\n' '''\n",
    ],
    ids=["plain", "env", "trampoline"],
)
def test_a_console_script_runs(first_lines, run_cli, tmp_path):
    write_program(tmp_path / "bin" / "tool", f"{first_lines}import sys\nprint(sys.argv[1])\n")
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = run_cli(*MIXOUT, "--allow-inactive", "--", "tool", "x", env={"PATH": path})
    assert (ran.code, ran.out) == (0, "x\n"), ran.err


def test_a_script_that_only_looks_like_a_trampoline_runs(run_cli, tmp_path):
    write_program(tmp_path / "tool", "#!/bin/sh\n'''exec' \"unbalanced\necho ran\n")
    ran = run_cli(*MIXOUT, "--", "./tool")
    assert ran.code == 2, "of sh"
    assert "surgery: INACTIVE: the command failed" in ran.err


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A Python of another environment, without surgery."""
    folder = tmp_path_factory.mktemp("other")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("kind", ["itself", "script", "relative"])
def test_a_python_of_another_environment_is_refused(kind, other, tmp_path):
    relative = "#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python' \"$0\" \"$@\"\n' '''\n"
    command = {
        "itself": [other, "-c", "print(1)"],
        "script": [write_program(tmp_path / "tool", f"#!{other}\nprint(1)\n")],
        "relative": [write_program(other.with_name("tool"), f"{relative}print(1)\n")],
    }[kind]
    # found by the launcher, and not by PYTHONPATH
    surgery = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from surgery.cli import main; main()"
    env = {name: value for name, value in clean_env().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", surgery, *MIXOUT, "--", *command], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {other}: expected a Python with model-surgery, got ModuleNotFoundError: No module named 'surgery'. "
        f"Install it there, or use {sys.executable}.\n"
    )
