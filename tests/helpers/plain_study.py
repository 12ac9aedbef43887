"""A study of plain trials alone, and jobs of plain commands: what engines are tried on, without a model to train."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from surgery.engines.engine import Engine, State
from surgery.engines.job import Job
from surgery.engines.registry import open_engine
from surgery.study import run
from surgery.study.arms import PLAIN
from surgery.study.plan import Plan
from surgery.study.template import Template
from surgery.study.todo import read_results
from surgery.study.trial import Trial

METRIC = "score"
_PRINT = "; echo \"{'score': 0.$2}\""


class PlainPlan(Plan):
    """A plan of which the trials without an arm are run alone."""

    def trials(self) -> list[Trial]:
        return [trial for trial in super().trials() if trial.arm.name == PLAIN]

    @property
    def script(self) -> str:
        return self.template.words[2].removesuffix(_PRINT)


def make_plan(folder: Path, script: str, seeds: int) -> PlainPlan:
    """Make a study of a shell script, which gets the trial's folder as $1 and its seed as $2, and prints its score."""
    words = ("sh", "-c", f"{script}; echo \"{{'score': 0.$2}}\"", "sh", "{out}", "{seed}")
    return PlainPlan(folder, Template(words), folder.parent, ("mixout=0.7",), (), tuple(range(seeds)), METRIC)


def scores(plan: Plan) -> list[float | None]:
    return [one.metric.value if one.metric else None for one in read_results(plan)]


def start_study(
    plan: PlainPlan, engine: str, *, settle: float = 1.0, env: Mapping[str, str] = os.environ, **popen: Any
) -> "subprocess.Popen[bytes]":
    """Run a study in a process of its own, which a test can kill.

    Args:
        plan: by `make_plan`.
        engine: by its name.
        settle: seconds that a result may take to show.
        env, popen: of the process.
    """
    arguments = [sys.executable, __file__, str(plan.folder), engine, str(len(plan.seeds)), plan.script, str(settle)]
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(arguments, env={**env, **here}, start_new_session=True, **popen)


def make_job(folder: Path, *command: str, **settings: object) -> Job:
    folder.mkdir(parents=True)
    job = Job(folder, command, folder, **settings)  # type: ignore[arg-type]
    job.write()
    return job


def shell_jobs(folder: Path, script: str, count: int = 1, **settings: object) -> list[Job]:
    return [make_job(folder / str(number), "sh", "-c", script, **settings) for number in range(count)]


def wait_for(is_so: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"not so in {seconds:.0f} s"
        time.sleep(0.05)


def finish(engine: Engine, ids: list[str], seconds: float = 60.0) -> None:
    """Poll until all jobs have ended."""
    wait_for(lambda: set(engine.poll(ids).values()) == {State.ENDED}, seconds)


def running(words: str) -> list[int]:
    """Return the processes whose command line holds some words."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if is_alive and words in " ".join(process.info["cmdline"] or []):
            found.append(process.pid)
    return found


if __name__ == "__main__":
    folder, name, seeds, text, settle = sys.argv[1:]
    run._SETTLE = float(settle)
    plan = make_plan(Path(folder), text, int(seeds))
    run.StudyRun(plan, open_engine(name, logs=plan.folder / ".slurm")).run()
