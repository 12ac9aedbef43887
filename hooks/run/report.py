"""The JSON file of --report, and the JSONL file beside it with figures over time."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from surgery.escapes import shell_join

from .console import say
from .options import NOISYTUNE, Options
from .outcome import Outcome, judge
from .ranks import launched_rank
from .record import Record

_PACKAGES = ("model-surgery", "torch", "transformers", "accelerate", "peft", "trl", "lightning", "numpy", "safetensors")


@dataclass(frozen=True)
class Command:
    """What a report is about.

    Args:
        words: the command's arguments, the first the program.
        begun: when it was started, in seconds since the epoch.
    """

    words: Sequence[str]
    begun: float = field(default_factory=time.time)


def write_report(outcome: Outcome, options: Options, command: Command) -> None:
    """Write both files, each whole or not at all; of several processes or `surgery run`, each has files of its own.

    Raises:
        OSError: they cannot be written.
    """
    assert options.report is not None
    path = _own_path(Path(options.report), outcome.ranks)
    _write(path, json.dumps(_plain(make_report(outcome, options, command)), indent=1) + "\n")
    rows = [json.dumps(_plain(row)) + "\n" for row in _history(outcome)]
    _write(path.with_name(f"{path.name}l" if path.suffix == ".json" else f"{path.name}.jsonl"), "".join(rows))


def print_outcome(record: Record, options: Options, command: Command) -> None:
    """Print and write the outcome of this one process, which no `surgery run` waits for."""
    outcome = judge([record], options)
    for line in outcome.lines:
        say(line)
    if options.report:
        write_report(outcome, options, command)


def make_report(outcome: Outcome, options: Options, command: Command) -> dict[str, Any]:
    """Return what --report writes."""
    versions = dict(_versions())
    return {
        "status": "active" if outcome.is_active else "inactive",
        "reason": outcome.reason,
        "notes": list(outcome.notes),
        "version": versions["model-surgery"],
        "command": shell_join(command.words),
        "settings": _settings(options),
        "noise_seed": options.noise_seed if options.noisytune is not None else None,
        "versions": {"python": sys.version.split()[0], **versions},
        "begun": datetime.fromtimestamp(command.begun, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - command.begun, 1),
        "ranks": [_rank(one) for one in outcome.ranks],
    }


def _settings(options: Options) -> dict[str, Any]:
    noise = {} if options.noisytune is None else {NOISYTUNE: {"lam": options.noisytune, "seed": options.noise_seed}}
    own = {"include": options.include, "exclude": options.exclude, "w_pre": options.w_pre}
    methods = {one.name: asdict(one) for one in options.methods}  # type: ignore[call-overload]
    return {**noise, **methods, **{name: value for name, value in own.items() if value}}


def _versions() -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version  # takes longer than a run without a report

    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _rank(record: Record) -> dict[str, Any]:
    models = [{name: value for name, value in model.items() if name != "history"} for model in record.models]
    return {"rank": record.rank, "process": record.pid, "is_final": record.is_final, "models": models}


def _history(outcome: Outcome) -> Iterator[dict[str, Any]]:
    for record in outcome.ranks:
        for number, model in enumerate(record.models):
            for row in model.get("history", ()):
                yield {"rank": record.rank, "process": record.pid, "model": number, "class": model["class"], **row}


def _own_path(path: Path, ranks: Sequence[Record]) -> Path:
    """Name the file by the first rank that it tells of: under srun, each rank has a `surgery run` of its own."""
    rank = min((one.rank for one in ranks), default=launched_rank())
    return path.with_stem(f"{path.stem}-rank{rank}") if rank else path


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.surgery-part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Return what is JSON: it knows no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
