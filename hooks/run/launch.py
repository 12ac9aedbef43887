"""What `surgery run` does, from command line to exit code: check, start the command, print what took effect."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgery.errors import SettingError
from surgery.exit_codes import INACTIVE

from .command import CommandError, check_python, find_program
from .console import say
from .folder import RUN_DIR, run_dir
from .options import Options, is_own
from .outcome import Outcome, judge
from .record import Record, read_records
from .report import Command, write_report

SITE = Path(__file__).resolve().parents[1] / "site"
"""The folder whose sitecustomize every Python of the command runs."""


def launch(command: Sequence[str], options: Options) -> int:
    """Run a command with regularizers. Return its exit code, or INACTIVE; end as it did, if a signal ended it.

    What became of it goes to stderr and to the file of --report.

    Args:
        command: its arguments, the first its name.
        options: what to regularize with.
    Raises:
        SettingError: the command cannot be regularized, or the report could not be written.
    """
    _refuse_windows()
    if not command:
        raise SettingError(
            "command: expected one, got none. Write it after --, such as: surgery run --mixout 0.7 -- python train.py."
        )
    environment = environment_of(options, os.environ)
    about = Command(command)
    try:
        program = find_program(command)
        check_python(program, command, environment)
        code, records = _run(program, command, environment)
    except CommandError as error:
        say(f"error: {error}")
        return error.code
    return _report(judge(records, options, command, has_failed=code != 0), options, about, code)


def environment_of(options: Options, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a command: the user's, the options, and the folder of the hooks before other ones."""
    kept = {name: value for name, value in variables.items() if not is_own(name)}
    folders = [folder for folder in variables.get("PYTHONPATH", "").split(os.pathsep) if folder != str(SITE)]
    path = [str(SITE), *folders] if any(folders) else [str(SITE)]
    return kept | options.variables | {"PYTHONPATH": os.pathsep.join(path)}


def _refuse_windows() -> None:
    if sys.platform == "win32":
        raise SettingError("surgery run: expected Linux or macOS, got Windows. Call patch_model in the script instead.")


def _run(program: str, command: Sequence[str], environment: dict[str, str]) -> tuple[int, list[Record]]:
    """Run a program. Return its exit code, or minus its signal, and the records of its processes."""
    from .supervise import hold_signals, supervise

    held = hold_signals()
    folder = Path(tempfile.mkdtemp(prefix="surgery-run-"))
    try:
        code = supervise(program, command, environment | {RUN_DIR: str(folder)}, held=held)
        records = read_records(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if outer := run_dir():  # of a `surgery run` that runs this one
        for record in records:
            record.write(outer)
    return code, records


def _report(outcome: Outcome, options: Options, command: Command, code: int) -> int:
    for line in outcome.lines:
        say(line)
    if options.report:
        try:
            write_report(outcome, options, command)
        except OSError as error:
            say(f"error: {options.report}: expected a file that can be written, got {error.strerror}. Choose another.")
            code = code or 1
    if code < 0:
        from .supervise import die

        return die(-code)
    if outcome.is_active or outcome.is_idle or options.allow_inactive:
        return code
    return INACTIVE if code == 0 or outcome.is_refused else code
