"""What of a study is still to be run, its folders made ready, and their jobs as lines for another scheduler."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from surgery.engines.job import LOG, Job, is_held
from surgery.errors import OutputError
from surgery.escapes import shell_join
from surgery.lock import lock_folder
from surgery.study.command import check_program, make_job
from surgery.study.environment import describe_environment
from surgery.study.plan import Plan, join_former
from surgery.study.trial import Status, Trial, TrialResult, read_trial

_LONGEST_WAIT = 30.0
_LOOK = 0.2  # seconds between two looks
_PRINTED = "print"  # in the place of an engine's name


@contextmanager
def opened(plan: Plan) -> Iterator[Plan]:
    """Hold a study's folder, and write study.json: of a plan together with what is in the folder already.

    Raises:
        OutputError: another process runs the study.
        SettingError, CommandError: the folder holds another study, or the command cannot be executed.
    """
    check_program(plan.template)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(plan.folder):
        plan = join_former(plan)
        plan.write()
        yield plan


def read_results(plan: Plan) -> list[TrialResult]:
    """Return what is there of each trial."""
    return [read_trial(trial, plan.metric, minimize=plan.minimize) for trial in plan.trials()]


def due(results: Sequence[TrialResult], *, retry: bool) -> list[Trial]:
    """Return the trials that are to be run: not those that are over, nor those of an arm that has no effect.

    Args:
        results: of all trials.
        retry: run those again that ended without a metric.
    """
    idle = set() if retry else {one.trial.arm.name for one in results if one.status is Status.INACTIVE}
    return [
        one.trial
        for one in results
        if (not one.status.is_over or (retry and one.status is not Status.DONE)) and one.trial.arm.name not in idle
    ]


def prepare(plan: Plan, trial: Trial, *, cpus: int = 0, gpus: int | None = None) -> Job:
    """Empty a trial's folder, and write its job there."""
    _wait_for_former(trial)
    trial.clear()
    job = make_job(trial, plan.template, plan.cwd, cpus=cpus, gpus=gpus)
    job.write()
    return job


def record(plan: Plan, trial: Trial, job: Job, *, engine: str, id: str | None) -> None:
    """Write trial.json: what is run, where, and with what."""
    filled = plan.template.fill(trial.seed, trial.out)
    trial.write(
        {
            "arm": trial.arm.name,
            "seed": trial.seed,
            "command": shell_join(filled.words),
            "run": shell_join(job.command),
            "variables": dict(filled.variables),
            "cwd": str(plan.cwd),
            "engine": engine,
            "job": id,
            "environment": describe_environment(plan.template.words, plan.cwd),
        }
    )


def shell_lines(plan: Plan, *, retry: bool = False) -> Iterator[str]:
    """Yield a shell's line for each trial that is to be run, for a scheduler that we do not know.

    Run on any machine that sees the study's folder, it leaves there what an engine would. What is under way, as far as
    its lock shows here, is left out; the folder of what has never begun is left as it is, for its line may be about to.

    Raises:
        OutputError, SettingError, CommandError: as `opened` does.
    """
    with opened(plan) as plan:
        for trial in due(read_results(plan), retry=retry):
            if not is_held(trial.folder):
                yield _shell_line(plan, trial)


def _shell_line(plan: Plan, trial: Trial) -> str:
    if (trial.folder / LOG).exists() or not trial.out.is_dir():
        trial.clear()
    job = make_job(trial, plan.template, plan.cwd)
    job.write()
    record(plan, trial, job, engine=_PRINTED, id=None)
    # -P: whatever the folder that it is run in holds, is no module of ours
    return shell_join([sys.executable, "-P", "-m", "surgery.engines.execute", str(trial.folder)])


def _wait_for_former(trial: Trial) -> None:
    """Wait for what a killed run has left to end; it would write where the new try does."""
    until = time.monotonic() + _LONGEST_WAIT
    while is_held(trial.folder):
        if time.monotonic() > until:
            raise OutputError(
                f"{trial.folder}: expected no process of a former try, got one that still writes its log. End it."
            )
        time.sleep(_LOOK)
