"""The program that a command line executes, and whether it is a Python that runs our sitecustomize."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SettingError, SurgeryError
from surgery.escapes import shell_quote

from .folder import RUN_DIR

_PYTHON = re.compile(r"(python|pypy)[\d.]*[a-z]?")
_WITHOUT_SITE = "SIE"
"""Options with which Python does not run sitecustomize, or does not read PYTHONPATH."""


class CommandError(SurgeryError):
    """The command cannot be executed. `code` is the exit code that env and nohup have for it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class _Python:
    """A Python that a command starts: its path, its own arguments with what follows, and where they are written."""

    path: str
    arguments: Sequence[str]
    where: str


def find_program(command: Sequence[str]) -> str:
    """Return the file that a command executes.

    Raises:
        CommandError: there is none, or it may not be executed.
    """
    name = command[0]
    if found := shutil.which(name):
        return found
    is_there = Path(name).is_file()
    if is_there and name.endswith(".py"):
        what = f"expected a program, got a script of Python. Write: python {shell_quote(name)}"
    elif is_there and os.sep in name:
        what = "expected a program, got a file that may not be executed. See its permissions"
    else:
        what = "expected a program, got none of this name. See its name and PATH"
    raise CommandError(f"{name}: {what}.", 126 if is_there and os.sep in name else 127)


def check_python(program: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a Python that does not start with the hooks. Of another program nothing is known.

    Args:
        program: the file that the command executes.
        command: its arguments, the first its name.
        environment: what it will have.
    Raises:
        SettingError: it is started with -S, -I or -E, or is of another environment, without surgery.
    """
    python = _python_of(program, command)
    if python is None:
        return
    if option := _option_without_site(python.arguments):
        raise SettingError(
            f"{python.where}: expected a Python that reads PYTHONPATH and runs sitecustomize, got {option}. Leave it "
            "out, or start the script with another python."
        )
    if not _is_own_python(python.path):
        _probe(python.path, environment)


def _python_of(program: str, command: Sequence[str]) -> _Python | None:
    """Return the Python that a program is, or that its first lines name."""
    if _PYTHON.fullmatch(Path(program).name):
        return _Python(program, command[1:], command[0])
    words = _first_words(program)
    if words and Path(words[0]).name == "env":
        words = _after_env(words[1:])
    if not words or not _PYTHON.fullmatch(Path(words[0]).name):
        return None
    path = shutil.which(words[0])
    return _Python(path, [*words[1:], program], program) if path else None


def _first_words(program: str) -> list[str]:
    """Return the interpreter of a script and its arguments; those of the second line where pip or uv wrote one.

    Their `#!/bin/sh` is for paths that are too long for a first line, or that are relative to the script.
    """
    try:
        with Path(program).open("rb") as file:
            first, second = (os.fsdecode(file.readline(4096)) for _ in range(2))
    except OSError:  # may be executed, not read
        return []
    if not first.startswith("#!"):
        return []
    if not second.startswith("'''exec' "):
        return first.removeprefix("#!").split()
    if beside := re.search(r"dirname.*/'?([\w.]+)'? \"\$0\"", second):
        return [str(Path(program).resolve().with_name(beside[1]))]
    with suppress(ValueError):  # not of pip's making
        return shlex.split(second.removeprefix("'''exec' "))
    return []


def _after_env(words: list[str]) -> list[str]:
    """Return what env executes: its arguments without its own options and assignments."""
    while words and (words[0].startswith("-") or "=" in words[0]):
        words = words[1:]
    return words


def _option_without_site(arguments: Sequence[str]) -> str | None:
    """Return the option of Python, of those before its script, that keeps it from our sitecustomize."""
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        option = rest.pop(0)
        if option.startswith("--"):  # of long options only this one has an argument
            rest = rest[option == "--check-hash-based-pycs" :]
            continue
        for place, letter in enumerate(option[1:], 2):
            if letter in _WITHOUT_SITE:
                return f"-{letter}"
            if letter in "cm":
                return None
            if letter in "WX":
                rest = rest[option[place:] == "" :]
                break
    return None


def _is_own_python(python: str) -> bool:
    """Tell whether a path is this Python in this environment, under whatever name."""
    here = Path(sys.executable)
    return Path(python).parent.samefile(here.parent) and Path(python).samefile(here)


def _probe(python: str, environment: Mapping[str, str]) -> None:
    import subprocess

    # no record is left, and no folder `surgery` beside the user is taken for ours
    alone = {name: value for name, value in environment.items() if name != RUN_DIR} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [python, "-c", "import surgery.hooks.run.inside.start"],
        env=alone,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n")
        why = next((line for line in reversed(said) if line.strip()), f"exit code {done.returncode}")
        raise SettingError(
            f"{python}: expected a Python with model-surgery, got {why.strip()}. Install it there, or use "
            f"{sys.executable}."
        )
