"""A trial: one arm with one seed, and all that its folder tells of it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from surgery.engines.job import JOB, LOG, Result, write_whole
from surgery.escapes import printable
from surgery.exit_codes import INACTIVE
from surgery.files import read_file
from surgery.study.arms import PLAIN, Arm
from surgery.study.metrics.find import NoMetricError, find_metric
from surgery.study.metrics.found import Found

TRIAL, SCORE, REPORT, OUT = "trial.json", "score.json", "report.json", "out"
_LONGEST_REASON = 160


class Status(Enum):
    """How far a trial is."""

    MISSING = "not run"
    SUBMITTED = "under way"
    DONE = "done"
    CRASHED = "crashed"
    INACTIVE = "no effect"
    UNSCORED = "no metric"

    @property
    def is_over(self) -> bool:
        """Whether it ended by itself, well or not."""
        return self not in (Status.MISSING, Status.SUBMITTED)


@dataclass(frozen=True)
class Trial:
    """One run of the user's command.

    Args:
        study: the study's folder.
        arm: what it is regularized with.
        seed: that stands for {seed}.
    """

    study: Path
    arm: Arm
    seed: int

    @property
    def folder(self) -> Path:
        """Its own: command, environment, log, report, result, score, and `out`, which stands for {out}."""
        return self.study / "trials" / self.arm.folder / str(self.seed)

    @property
    def out(self) -> Path:
        return self.folder / OUT

    def clear(self) -> None:
        """Make its folder, empty: a script may take what a former try left there for a checkpoint to go on from."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.out.mkdir(parents=True)

    def write(self, about: Mapping[str, Any]) -> None:
        """Write trial.json."""
        write_whole(self.folder / TRIAL, json.dumps(about, indent=1) + "\n")

    def about(self) -> dict[str, Any]:
        """Return what trial.json holds; {} if it is not there."""
        return _read(self.folder / TRIAL)

    def report(self) -> dict[str, Any]:
        """Return the report of `surgery run`; {} for plain."""
        return _read(self.folder / REPORT)


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial.

    Args:
        metric: its value, and where that was found; None if it is not done.
        result: how its command ended, when it has.
        why: the reason, where it is over and not done.
    """

    trial: Trial
    status: Status
    metric: Found | None = None
    result: Result | None = None
    why: str = ""


def read_trial(trial: Trial, metric: str, *, minimize: bool) -> TrialResult:
    """Read a trial's folder, and look for its metric if that was not done before."""
    result = Result.read(trial.folder)
    if result is None:
        is_submitted = (trial.folder / JOB).is_file()
        return TrialResult(trial, Status.SUBMITTED if is_submitted else Status.MISSING)
    if result.code == INACTIVE and trial.arm.name != PLAIN:
        why = str(trial.report().get("reason") or _last_line(trial.folder / LOG))
        return TrialResult(trial, Status.INACTIVE, None, result, why)
    if result.code:
        last = _last_line(trial.folder / LOG)
        return TrialResult(trial, Status.CRASHED, None, result, f"{result.why}: {last}" if last else result.why)
    try:
        return TrialResult(trial, Status.DONE, _score(trial, metric, minimize=minimize), result)
    except NoMetricError as error:
        return TrialResult(trial, Status.UNSCORED, None, result, str(error))


def _score(trial: Trial, metric: str, *, minimize: bool) -> Found:
    """Find a trial's metric once: what the script wrote may be cleared away later."""
    kept = _read(trial.folder / SCORE)
    if kept.get("metric") == metric:
        return Found(float(kept["value"]), str(kept["file"]), str(kept["rule"]))
    found = find_metric(metric, trial.folder, trial.out, trial.folder / LOG, minimize=minimize)
    document = {"metric": metric, "value": repr(found.value), "file": found.file, "rule": found.rule}
    write_whole(trial.folder / SCORE, json.dumps(document, indent=1) + "\n")
    return found


def _last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return printable(last if len(last) <= _LONGEST_REASON else last[: _LONGEST_REASON - 1] + "…")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
