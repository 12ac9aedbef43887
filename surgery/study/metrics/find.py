"""Find a metric in what a trial left: the first place that has it, in a fixed order, and say which that was."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SurgeryError, some
from surgery.files import list_files
from surgery.study.metrics import event_files, json_files, tables
from surgery.study.metrics.found import Found
from surgery.study.metrics.output import read_output

BEST = "best:"
"""Before a metric's name: the best of those that were logged instead of the last."""


class NoMetricError(SurgeryError):
    """A trial has no metric of the name asked for."""


@dataclass(frozen=True)
class _Place:
    """A file with figures, the last of each being the latest."""

    file: str
    figures: dict[str, list[float]]
    rule: str


def find_metric(name: str, root: Path, out: Path | None, log: Path, *, minimize: bool) -> Found:
    """Find a metric of one trial.

    Looked for are, in this order: JSON files of results, trainer_state.json, tables and event files below `out`, then
    the output. Of files of one kind, those that lie less deep come first, then newer ones.

    Args:
        name: of the metric, perhaps after "best:".
        root: what files are named relative to.
        out: the folder that the script wrote to, if it was told of one.
        log: its output.
        minimize: of the metric, less is better.
    Raises:
        NoMetricError: it is nowhere; names what is there.
    """
    wants_best, name = name.startswith(BEST), name.removeprefix(BEST)
    seen: dict[str, str] = {}
    for place in _places(root, out, log):
        if values := place.figures.get(name):
            best = (min if minimize else max)((value for value in values if value == value), default=values[-1])
            one_of = f"last of {len(values)}, best {best:.6g}" if len(values) > 1 else ""
            rule = f"best of {len(values)}, last {values[-1]:.6g}" if wants_best and len(values) > 1 else one_of
            return Found(best if wants_best else values[-1], place.file, ", ".join(filter(None, (place.rule, rule))))
        seen |= {one: place.file for one in place.figures if one not in seen}
    raise NoMetricError(
        f"metric: expected {name} in the results, got "
        f"{some([f'{one} in {file}' for one, file in seen.items()]) if seen else 'no figures at all'}. "
        "See --metric."
    )


def _places(root: Path, out: Path | None, log: Path) -> Iterator[_Place]:
    files = _newest_first(out) if out else []
    for pattern in json_files.RESULTS:
        for path in _matching(files, pattern):
            figures = {name: [value] for name, value in json_files.read_results(path).items()}
            yield _Place(_relative(path, root), figures, "")
    states = [(path, *json_files.read_log_history(path)) for path in _matching(files, json_files.TRAINER_STATE)]
    for path, steps, figures in sorted(states, key=lambda entry: -entry[1]):
        yield _Place(_relative(path, root), figures, f"of {steps} steps")
    for pattern in tables.FILES:
        for path in _matching(files, pattern):
            yield _Place(_relative(path, root), tables.read_columns(path), "")
    for pattern in event_files.FILES:
        for path in _matching(files, pattern):
            yield _Place(_relative(path, root), event_files.read_scalars(path), "")
    yield _Place(_relative(log, root), read_output(log), "printed")


def _newest_first(out: Path) -> list[Path]:
    """Return the files below a folder: those that lie less deep first, then newer ones."""
    if not out.is_dir():
        return []
    paths = [Path(entry.path) for entry in list_files(out) if entry.is_file()]
    return sorted(paths, key=lambda path: (len(path.parts), -path.stat().st_mtime, str(path)))


def _matching(files: Sequence[Path], pattern: str) -> list[Path]:
    return [path for path in files if path.match(pattern)]


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
