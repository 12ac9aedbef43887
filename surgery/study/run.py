"""Run the trials of a study that are not done yet, on any engine, and go on where a former run was stopped."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from surgery.engines.engine import Engine, State
from surgery.engines.job import Result, is_held
from surgery.study.plan import Plan
from surgery.study.todo import due, opened, prepare, read_results, record
from surgery.study.trial import Status, Trial, TrialResult, read_trial

_POLL = 0.2, 5.0  # seconds between two looks, at first and at last
_MOST_TRIES = 3  # of a trial that was lost with its machine
_SETTLE = 60.0  # seconds that a network file system may take to show a result: what NFS keeps at most
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
        cpus: for each trial; 0: the engine's default.
        gpus: for each trial; None: the engine's default.
        retry: run those again that ended without a metric.
        on_progress: told of each trial that ends.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        *,
        cpus: int = 0,
        gpus: int | None = None,
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
        try:
            with opened(self._plan) as self._plan:
                try:
                    self._run()
                finally:
                    self._engine.cancel(list(self._board.trials))
        finally:
            self._engine.close()

    def _run(self) -> None:
        results = read_results(self._plan)
        todo = due(results, retry=self._retry)
        self._total = len(todo) + sum(one.status.is_over for one in results if one.trial not in todo)
        self._find_again(todo)
        found = [trial.folder for trial in self._board.trials.values()]
        self._submit(trial for trial in todo if trial.folder not in found)
        self._tell(None)
        pause, longest = _POLL
        while self._board.trials:
            states = self._engine.poll(list(self._board.trials))
            ended = [id for id, state in states.items() if state is State.ENDED and self._has_settled(id)]
            lost = [id for id in ended if id in self._board.trials and not self._collect(id)]
            self._submit(self._board.trials.pop(id) for id in lost if id in self._board.trials)
            pause = _POLL[0] if ended else min(longest, pause * 1.1)
            if self._board.trials:
                time.sleep(pause)

    def _find_again(self, todo: Iterable[Trial]) -> None:
        """Wait for jobs that a former run has submitted and that went on without it, rather than run them anew."""
        if not self._engine.is_detached:
            return
        former = {}
        for trial in todo:
            about = trial.about()
            if about.get("engine") == self._engine.name and Result.read(trial.folder) is None:
                former[str(about.get("job"))] = trial
        states = self._engine.poll(list(former)) if former else {}
        self._board.trials |= {id: trial for id, trial in former.items() if states[id] is not State.ENDED}

    def _submit(self, trials: Iterable[Trial]) -> None:
        trials = list(trials)
        jobs = [prepare(self._plan, trial, cpus=self._cpus, gpus=self._gpus) for trial in trials]
        ids = self._engine.submit(jobs) if jobs else []
        self._board.trials |= dict(zip(ids, trials, strict=True))  # at once: an interruption cancels what is there
        for id, trial, job in zip(ids, trials, jobs, strict=True):
            self._tries[trial.folder] += 1
            record(self._plan, trial, job, engine=self._engine.name, id=id)

    def _has_settled(self, id: str) -> bool:
        """Tell whether a job that is over has left its result, or will not leave one any more."""
        first = self._board.ended_at.setdefault(id, time.monotonic())
        if Result.read(folder := self._board.trials[id].folder):
            return True
        if is_held(folder):  # it outlives what its engine knows of it, such as Slurm's daemon of its node
            return False
        return not self._engine.is_remote or time.monotonic() - first > _SETTLE

    def _collect(self, id: str) -> bool:
        """Take a trial that is over off the board, unless it was lost and is to be run again; tell whether it was."""
        trial = self._board.trials[id]
        if Result.read(trial.folder) is None:
            if self._tries[trial.folder] < _MOST_TRIES:
                return False
            Result(_LOST, time.time(), 0.0, None, "").write(trial.folder)
        del self._board.trials[id]
        result = read_trial(trial, self._plan.metric, minimize=self._plan.minimize)
        if result.status is Status.INACTIVE:
            self._drop(trial)
        self._tell(result)
        return True

    def _drop(self, idle: Trial) -> None:
        """Leave out the other trials of an arm that has no effect: they would have none either."""
        others = [id for id, trial in self._board.trials.items() if trial.arm.name == idle.arm.name]
        self._engine.cancel(others)
        for id in others:
            # one with a result ended by itself, and is yet to be collected
            if Result.read(self._board.trials[id].folder) is None:
                self._board.trials.pop(id).clear()
                self._total -= 1

    def _tell(self, latest: TrialResult | None) -> None:
        self._on_progress(Progress(self._total - len(self._board.trials), self._total, latest))
