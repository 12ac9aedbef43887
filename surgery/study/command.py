"""The command of a trial as a job: plain without a trace of us, an arm under `surgery run`."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from surgery.engines.job import Job
from surgery.hooks.run.command import find_program
from surgery.hooks.run.launch import SITE
from surgery.hooks.run.options import is_own
from surgery.study.template import Template
from surgery.study.trial import REPORT, Trial

_PATH = "PYTHONPATH"


def make_job(trial: Trial, template: Template, cwd: Path, *, cpus: int = 0, gpus: int | None = None) -> Job:
    """Return the job that runs a trial."""
    filled = template.fill(trial.seed, trial.out)
    words, removed, variables = filled.words, *_without_us(os.environ)
    if trial.arm.options is not None:
        flags = [*trial.arm.flags(trial.seed), "--report", str(trial.folder / REPORT)]
        words = (sys.executable, "-m", "surgery", "run", *flags, "--", *words)
    return Job(trial.folder, words, cwd, variables | dict(filled.variables), removed, cpus, gpus)


def check_program(template: Template) -> None:
    """Refuse a command that cannot be executed before a hundred trials fail by it.

    Raises:
        CommandError: there is no such program, or it may not be executed.
    """
    if "{" not in template.words[0]:
        find_program(template.words)


def _without_us(environment: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the variables that a trial must not inherit, and PYTHONPATH without our hooks, if they are in it."""
    removed = tuple(name for name in environment if is_own(name))
    folders = environment.get(_PATH, "").split(os.pathsep)
    if str(SITE) not in folders:
        return removed, {}
    return removed, {_PATH: os.pathsep.join(folder for folder in folders if folder != str(SITE))}
