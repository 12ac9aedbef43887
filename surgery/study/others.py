"""Runs that somebody else made: the metric of each, and which of them belong together."""

import glob
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from surgery.errors import SettingError
from surgery.study.arms import Arm
from surgery.study.collect import Study
from surgery.study.metrics.find import NoMetricError, find_metric
from surgery.study.summary import Run, summarize

_LOGS = ("log.txt", "*.log", "*.out", "stdout*", "*.txt")


def compare_runs(
    patterns: Sequence[str], *, metric: str, minimize: bool = False, failed_below: float | None = None
) -> Study:
    """Compare runs that are there. The first pattern's are what the others are compared with.

    Runs of two patterns are a pair where they are called the same: `plain/seed-1` and `rdrop/seed-1`.

    Args:
        patterns: globs of folders, or of files of output; one for each arm.
        metric, minimize, failed_below: as in Plan.
    Raises:
        SettingError: there are fewer than two patterns, or one matches nothing.
        NoMetricError: a run has no such metric; names it.
    """
    if len(patterns) < 2 or len(set(patterns)) < len(patterns):
        raise SettingError(
            f"runs: expected two globs or more, each another, got {len(set(patterns))}. Quote them, so that the shell "
            "does not expand them: surgery study compare 'runs/plain/*' 'runs/rdrop/*' --metric eval_accuracy."
        )
    runs = {pattern: _read(pattern, metric, minimize=minimize) for pattern in patterns}
    summaries, threshold = summarize(runs, metric=metric, minimize=minimize, failed_below=failed_below)
    first, *others = ({run.seed for run in found} for found in runs.values())
    alone = [name for name, seeds in zip(patterns[1:], others, strict=True) if not first & seeds]
    notes = [f"no run of {name} is called as one of {patterns[0]}: there are no pairs to compare" for name in alone]
    return Study(metric, minimize, tuple(Arm(name) for name in patterns), summaries, threshold, tuple(notes))


def _read(pattern: str, metric: str, *, minimize: bool) -> list[Run]:
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  (absolute ones too)
    paths = [Path(name) for name in sorted(found)]
    if not paths:
        raise SettingError(f"runs: expected a glob of runs, got {pattern!r}, which matches nothing. Correct it.")
    return [_run(path, name, metric, minimize=minimize) for path, name in zip(paths, _names(paths), strict=True)]


def _run(path: Path, name: str, metric: str, *, minimize: bool) -> Run:
    out, log = (path, _log_of(path)) if path.is_dir() else (None, path)
    try:
        return Run(name, find_metric(metric, path, out, log, minimize=minimize).value)
    except NoMetricError as error:
        raise NoMetricError(f"{path}: {error}") from error


def _log_of(folder: Path) -> Path:
    return next((path for pattern in _LOGS for path in sorted(folder.glob(pattern))), folder / _LOGS[0])


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each run by what tells it from the others: without the folders that all lie in, or all end in."""
    if len(paths) == 1:
        return [paths[0].name]
    parts = [path.parts for path in paths]
    start = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    back = [part[start:][::-1] for part in parts]
    end = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*back, strict=False)))
    return ["/".join(part[start : len(part) - end]) or "." for part in parts]
