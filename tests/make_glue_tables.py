"""Write the tables of the study of GLUE into README and cards, from the trials.csv of each task.

    make study-tables [STUDY=study-glue]

With STUDY, the trials of a study that `make study` has run are taken first into tests/benchmarks/glue.
"""

import csv
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.study.summary import ArmSummary, Run, summarize

ROOT = Path(__file__).resolve().parents[1]
TRIALS = ROOT / "tests" / "benchmarks" / "glue"
TASKS = {
    "cola": ("CoLA, MCC", "eval_matthews"),
    "stsb": ("STS-B, Spearman", "eval_spearman"),
    "mrpc": ("MRPC, F1", "eval_f1"),
    "rte": ("RTE, accuracy", "eval_accuracy"),
}
SWEEPS = "cola-sweeps"
ALL = "noisytune=0.15 mixout=0.7 rdrop=1 anchor=0.01"
RECADAM = "recadam=500 recadam-k=0.2 recadam-t0=30"
BOTH = "noisytune=0.15 mixout=0.7"
README_ROWS = {
    "NoisyTune 0.15": "noisytune=0.15",
    "Mixout 0.7": "mixout=0.7",
    "Mixout 0.9": "mixout=0.9",
    "R-Drop 1": "rdrop=1",
    "anchor 0.01": "anchor=0.01",
    "RecAdam 500": RECADAM,
    "NoisyTune + Mixout 0.7": BOTH,
    "all but RecAdam": ALL,
}
CARDS = {
    "surgery/perturb/README.md": ("noisytune=0.15", BOTH),
    "hooks/mixout/README.md": ("mixout=0.7", "mixout=0.9", BOTH),
    "hooks/rdrop/README.md": ("rdrop=1",),
    "hooks/anchor/README.md": ("anchor=0.01",),
    "hooks/recadam/README.md": (RECADAM,),
    "surgery/study/README.md": (ALL,),
}
SWEPT = {
    "surgery/perturb/README.md": ("noisytune",),
    "hooks/mixout/README.md": ("mixout",),
    "hooks/rdrop/README.md": ("rdrop", "rdrop=1 rdrop-every"),
}
BEGIN, END = "<!-- from tests/benchmarks/glue: {} -->", "<!-- end -->"


@dataclass(frozen=True)
class Found:
    """What a task's trials say, by arm; plain is the first."""

    arms: Mapping[str, ArmSummary]

    @property
    def plain(self) -> ArmSummary:
        return next(iter(self.arms.values()))


def read(task: str, metric: str) -> Found | None:
    """Summarize the trials of a task, over the seeds that every arm has; None where it was not run."""
    path = TRIALS / f"{task}.csv"
    if not path.exists():
        return None
    runs: dict[str, list[Run]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] == "done":
                run = Run(int(row["seed"]), float(row["metric"]), float(row["seconds"]), int(row["peak_memory"]))
                runs.setdefault(row["arm"], []).append(run)
    shared = set.intersection(*({run.seed for run in of_arm} for of_arm in runs.values()))
    paired = {arm: [run for run in of_arm if run.seed in shared] for arm, of_arm in runs.items()}
    summaries, _ = summarize(paired, metric=metric, minimize=False, failed_below=None)
    return Found({summary.name: summary for summary in summaries})


def tasks() -> dict[str, Found]:
    found = {task: read(task, metric) for task, (_, metric) in TASKS.items()}
    return {task: summaries for task, summaries in found.items() if summaries}


def cell(arm: ArmSummary, *, with_mean: bool = False) -> str:
    """Say an arm's difference from plain in points, with its interval; bold if it can be told from 0."""
    assert arm.difference
    interval = arm.difference.interval
    size = f"{100 * arm.difference.mean:+.1f}"
    if interval:
        size += f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    if arm.p is not None and arm.p < 0.05 and interval and interval.low * interval.high > 0:
        size = f"**{size}**"
    if with_mean and arm.p is not None:
        size += f", p {arm.p:.2g}"
    return size + (f", {arm.failed} failed" if arm.failed else "")


def plain_cell(plain: ArmSummary) -> str:
    assert plain.mean is not None
    spread = f" ± {100 * plain.std:.1f}" if plain.std is not None else ""
    return f"{100 * plain.mean:.1f}{spread}" + (f", {plain.failed} failed" if plain.failed else "")


def table(found: Mapping[str, Found], rows: Mapping[str, str], *, with_mean: bool) -> Iterator[str]:
    """Write a row for plain and each arm, a column for each task."""
    yield f"| | {' | '.join(f'{TASKS[task][0]}, {one.plain.n} seeds' for task, one in found.items())} |"
    yield "|---" * (len(found) + 1) + "|"
    yield f"| plain, x 100 | {' | '.join(plain_cell(one.plain) for one in found.values())} |"
    for name, arm in rows.items():
        yield f"| {name} | {' | '.join(cell(one.arms[arm], with_mean=with_mean) for one in found.values())} |"


def sweep_table(found: Found, names: Sequence[str]) -> Iterator[str]:
    """Write a row for each value of a sweep on CoLA."""
    yield f"| CoLA, MCC x 100, {found.plain.n} seeds | mean (95 %) | against plain | failed |"
    yield "|---|---|---|---|"
    yield f"| plain | {_mean(found.plain)} | | {found.plain.failed} |"
    for arm in found.arms.values():
        if any(arm.name.rpartition("=")[0] == name for name in names):
            yield f"| `{arm.name}` | {_mean(arm)} | {cell(arm, with_mean=True).split(', ')[0]} | {arm.failed} |"


def _mean(arm: ArmSummary) -> str:
    assert arm.mean is not None
    interval = f" ({100 * arm.interval.low:.1f} to {100 * arm.interval.high:.1f})" if arm.interval else ""
    return f"{100 * arm.mean:.1f}{interval}"


def made() -> Iterator[tuple[Path, str, str]]:
    """Yield each file, the name of a table in it, and the table."""
    found = tasks()
    yield ROOT / "README.md", "all", "\n".join(table(found, README_ROWS, with_mean=False))
    for path, arms in CARDS.items():
        rows = {f"`{arm}`": arm for arm in arms}
        yield ROOT / path, "tasks", "\n".join(table(found, rows, with_mean=True))
    if swept := read(SWEEPS, "eval_matthews"):
        for path, names in SWEPT.items():
            yield ROOT / path, "sweep", "\n".join(sweep_table(swept, names))


def put(text: str, name: str, table: str) -> str:
    """Put a table in the place of the one between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    begin = BEGIN.format(name)
    before, after = text.split(f"{begin}\n", 1)
    return f"{before}{begin}\n{table}\n{END}{after.split(END, 1)[1]}"


def main() -> None:
    for study in map(Path, sys.argv[1:]):
        for task in (*TASKS, SWEEPS):
            if (study / task / "trials.csv").exists():
                shutil.copyfile(study / task / "trials.csv", TRIALS / f"{task}.csv")
    for path, name, table in made():
        path.write_text(put(path.read_text(encoding="utf-8"), name, table), encoding="utf-8")


if __name__ == "__main__":
    main()
