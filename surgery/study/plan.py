"""study.json: what a study is of. The same command goes on with it, and may add arms and seeds."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.engines.job import write_whole
from surgery.errors import OutputError, SettingError, SourceError
from surgery.escapes import printable, shell_join
from surgery.files import read_file
from surgery.study.arms import Arm, make_arms
from surgery.study.template import Template
from surgery.study.trial import Trial

STUDY = "study.json"
_FORMAT = "surgery-study-1"


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        folder: that it is kept in, absolute.
        template: the user's command.
        cwd: the folder that it is run in.
        arms, sweeps: as the user wrote them.
        seeds: of the trials of each arm.
        metric: its name, as the script writes it.
        minimize: less of it is better.
        failed_below: a trial whose metric is no better has failed; None: as the plain trials show.
    """

    folder: Path
    template: Template
    cwd: Path
    arms: tuple[str, ...]
    sweeps: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    minimize: bool = False
    failed_below: float | None = None

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise SettingError(f"--seeds: expected at least 2, got {len(set(self.seeds))}. One run says nothing.")
        if not self.metric.strip():
            raise SettingError("--metric: expected a name, such as eval_accuracy, got none. Name it.")
        self.made_arms()

    def made_arms(self) -> tuple[Arm, ...]:
        """Return the arms, plain first."""
        return make_arms(self.arms, self.sweeps)

    def trials(self) -> list[Trial]:
        """Return all trials, seed by seed, so that what is there can be compared at any time."""
        arms = self.made_arms()
        return [Trial(self.folder, arm, seed) for seed in self.seeds for arm in arms]

    def write(self) -> None:
        """Write study.json."""
        document = {"format": _FORMAT} | asdict(self)
        del document["folder"]
        write_whole(self.folder / STUDY, json.dumps(document | {"cwd": str(self.cwd)}, indent=1) + "\n")


def read_plan(folder: Path) -> Plan:
    """Read the study of a folder.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    path = folder / STUDY
    if not path.is_file():
        raise SourceError(f"{folder}: expected the folder of a study, got one without {STUDY}. Check the name.")
    try:
        found = json.loads(read_file(path))
        if found["format"] != _FORMAT:
            raise SourceError(f"{path}: expected {_FORMAT}, got {printable(str(found['format']))}. Use its version.")
        return _from_json(folder, found)
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: expected what `surgery study` wrote, got something else ({error}).") from error


def _from_json(folder: Path, found: Mapping[str, Any]) -> Plan:
    template = Template(tuple(map(str, found["template"]["words"])), dict(found["template"]["variables"]))
    return Plan(
        folder.absolute(),
        template,
        Path(found["cwd"]),
        tuple(map(str, found["arms"])),
        tuple(map(str, found["sweeps"])),
        tuple(map(int, found["seeds"])),
        str(found["metric"]),
        bool(found["minimize"]),
        None if found["failed_below"] is None else float(found["failed_below"]),
    )


def join_former(plan: Plan) -> Plan:
    """Return a plan together with the study that is in its folder already, if there is one.

    Raises:
        OutputError: the folder holds something else.
        SettingError: its study is of another command or of another metric.
    """
    if not (plan.folder / STUDY).is_file():
        if plan.folder.is_dir() and any(plan.folder.iterdir()):
            raise OutputError(
                f"{plan.folder}: expected a new folder or that of a study, got one with other files. Choose another."
            )
        return plan
    former = read_plan(plan.folder)
    for name in ("template", "cwd", "metric", "minimize"):
        if (here := getattr(plan, name)) != (there := getattr(former, name)):
            raise SettingError(
                f"{plan.folder}: expected its study's {_NAMES[name]}, {_show(there)}, got {_show(here)}. Choose "
                "another folder for another study."
            )
    return replace(
        plan,
        arms=_union(former.arms, plan.arms),
        sweeps=_union(former.sweeps, plan.sweeps),
        seeds=tuple(sorted({*former.seeds, *plan.seeds})),
    )


_NAMES = {"template": "command", "cwd": "working folder", "metric": "metric", "minimize": "direction"}


def _union(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*one, *other]))


def _show(value: Any) -> str:
    if isinstance(value, Template):
        variables = [f"{name}={text}" for name, text in value.variables.items()]
        return f"`{shell_join([*variables, *value.words])}`"
    if isinstance(value, bool):
        return "--minimize" if value else "no --minimize"
    return printable(os.fspath(value))
