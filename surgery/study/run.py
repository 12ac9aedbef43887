"""Run the trials of a study that are not done yet, on any engine, and go on where a former run was stopped."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from surgery.engines.engine import Engine, State
from surgery.engines.job import Result, is_held
from surgery.errors import OutputError
from surgery.escapes import shell_join
from surgery.lock import lock_folder
from surgery.study.command import check_program, make_job
from surgery.study.environment import describe_environment
from surgery.study.plan import Plan, join_former
from surgery.study.trial import Status, Trial, TrialResult, read_trial

_POLL = 0.2, 5.0  # seconds between two looks, at first and at last
_MOST_TRIES = 3  # of a trial that was lost with its machine
_LONGEST_WAIT = 30.0
_SETTLE = 10.0  # seconds that a network file system may take to show a result
_LOST = 75  # exit code of a trial that was lost too often: EX_TEMPFAIL of sysexits.h


@dataclass
class _Board:
    """Which trial runs under which id."""

    trials: dict[str, Trial] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a study stands.

    Args:
        done: trials that are over.
        total: of all that are to be run, by this call or before.
        latest: the trial that has just ended; None at the beginning.
    """

    done: int
    total: int
    latest: TrialResult | None = None


class StudyRun:
    """Runs a plan.

    Args:
        plan: what to run.
        engine: where.
        cpus, gpus: for each trial; 0: the engine's default.
        retry: run those again that ended without a metric.
        on_progress: told of each trial that ends.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        *,
        cpus: int = 0,
        gpus: int = 0,
        retry: bool = False,
        on_progress: Callable[[Progress], object] = lambda _: None,
    ) -> None:
        self._plan, self._engine = plan, engine
        self._cpus, self._gpus = cpus, gpus
        self._retry, self._on_progress = retry, on_progress
        self._tries: Counter[Path] = Counter()
        self._board = _Board()

    def run(self) -> None:
        """Run all trials that are not done. Returns when none is under way.

        Raises:
            OutputError: another process runs the study.
            SettingError, CommandError: the folder holds another study, or the command cannot be executed.
            KeyboardInterrupt: Ctrl-C; the trials that were under way are ended, and are run anew by the next call.
        """
        check_program(self._plan.template)
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self._plan.folder):
            self._plan = join_former(self._plan)
            self._plan.write()
            self._trials = self._plan.trials()
            try:
                self._run()
            finally:
                self._engine.cancel(list(self._board.trials))
                self._engine.close()

    def _run(self) -> None:
        results = [self._read(trial) for trial in self._trials]
        idle = set() if self._retry else {one.trial.arm.name for one in results if one.status is Status.INACTIVE}
        todo = [one.trial for one in results if self._is_due(one) and one.trial.arm.name not in idle]
        self._total = len(todo) + sum(one.status.is_over for one in results if one.trial not in todo)
        self._submit(trial for trial in todo if not self._is_found_again(trial))
        self._tell(None)
        pause, longest = _POLL
        while self._board.trials:
            states = self._engine.poll(list(self._board.trials))
            ended = [id for id, state in states.items() if state is State.ENDED and self._has_settled(id)]
            for id in ended:
                self._collect(id)
            pause = _POLL[0] if ended else min(longest, pause * 1.1)
            if self._board.trials:
                time.sleep(pause)

    def _read(self, trial: Trial) -> TrialResult:
        return read_trial(trial, self._plan.metric, minimize=self._plan.minimize)

    def _is_due(self, result: TrialResult) -> bool:
        return not result.status.is_over or (self._retry and result.status is not Status.DONE)

    def _is_found_again(self, trial: Trial) -> bool:
        """Wait for a job that a former run has submitted and that went on without it."""
        about = trial.about()
        if not self._engine.is_detached or about.get("engine") != self._engine.name or Result.read(trial.folder):
            return False
        id = str(about.get("job"))
        if self._engine.poll([id])[id] is State.ENDED:
            return False
        self._board.trials[id] = trial
        return True

    def _submit(self, trials: Iterable[Trial]) -> None:
        trials, jobs = list(trials), []
        for trial in trials:
            _wait_for_former(trial)
            trial.clear()
            job = make_job(trial, self._plan.template, self._plan.cwd, cpus=self._cpus, gpus=self._gpus)
            job.write()
            jobs.append(job)
            self._tries[trial.folder] += 1
        ids = self._engine.submit(jobs) if jobs else []
        for id, trial, job in zip(ids, trials, jobs, strict=True):
            filled = self._plan.template.fill(trial.seed, trial.out)
            trial.write(
                {
                    "arm": trial.arm.name,
                    "seed": trial.seed,
                    "command": shell_join(filled.words),
                    "run": shell_join(job.command),
                    "variables": dict(filled.variables),
                    "cwd": str(self._plan.cwd),
                    "engine": self._engine.name,
                    "job": id,
                    "environment": describe_environment(self._plan.template.words, self._plan.cwd),
                }
            )
            self._board.trials[id] = trial

    def _has_settled(self, id: str) -> bool:
        """Tell whether a job that is over has left its result, or will not leave one any more."""
        first = self._board.ended_at.setdefault(id, time.monotonic())
        is_there = Result.read(self._board.trials[id].folder) is not None
        return is_there or not self._engine.is_detached or time.monotonic() - first > _SETTLE

    def _collect(self, id: str) -> None:
        trial = self._board.trials.pop(id)
        self._board.ended_at.pop(id, None)
        if Result.read(trial.folder) is None:
            if self._tries[trial.folder] < _MOST_TRIES:
                self._submit([trial])
                return
            Result(_LOST, time.time(), 0.0, None, "").write(trial.folder)
        result = self._read(trial)
        if result.status is Status.INACTIVE:
            self._drop(trial)
        self._tell(result)

    def _drop(self, idle: Trial) -> None:
        """Leave out the other trials of an arm that has no effect: they would have none either."""
        others = [id for id, trial in self._board.trials.items() if trial.arm.name == idle.arm.name]
        self._engine.cancel(others)
        for id in others:
            if Result.read((trial := self._board.trials.pop(id)).folder) is None:
                trial.clear()
                self._total -= 1

    def _tell(self, latest: TrialResult | None) -> None:
        self._on_progress(Progress(self._total - len(self._board.trials), self._total, latest))


def _wait_for_former(trial: Trial) -> None:
    """Wait for what a killed run has left to end; it would write where the new try does."""
    until = time.monotonic() + _LONGEST_WAIT
    while is_held(trial.folder):
        if time.monotonic() > until:
            raise OutputError(
                f"{trial.folder}: expected no process of a former try, got one that still writes its log. End it."
            )
        time.sleep(_POLL[0])
