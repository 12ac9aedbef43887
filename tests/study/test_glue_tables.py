"""README and cards show what the trials of the study of GLUE say."""

import csv

import make_glue_tables as tables
import numpy as np
import pytest


def test_tables_are_those_of_the_trials():
    for path, name, table in tables.made():
        text = path.read_text(encoding="utf-8")
        assert tables.put(text, name, table) == text, "run `make study-tables`"


@pytest.mark.parametrize("task", list(tables.tasks()))
def test_differences_are_those_of_the_trials(task):
    with (tables.TRIALS / f"{task}.csv").open(newline="") as file:
        rows = {(row["arm"], int(row["seed"])): float(row["metric"]) for row in csv.DictReader(file) if row["metric"]}
    arms = {arm for arm, _ in rows}
    seeds = sorted(seed for arm, seed in rows if arm == "plain" and all((other, seed) in rows for other in arms))
    assert len(seeds) >= 3
    assert arms == {"plain", *tables.README_ROWS.values()}
    values = {arm: np.array([rows[arm, seed] for seed in seeds]) for arm in arms}
    readme = (tables.ROOT / "README.md").read_text(encoding="utf-8")
    header, _, *lines = readme.split(tables.BEGIN.format("all"))[1].split(tables.END)[0].strip().splitlines()
    column = [cell.strip() for cell in header.split("|")].index(f"{tables.TASKS[task][0]}, {len(seeds)} seeds")
    shown = {line.split("|")[1].strip(): line.split("|")[column].strip(" *") for line in lines}
    for name, arm in tables.README_ROWS.items():
        assert float(shown[name].split()[0]) == pytest.approx(100 * (values[arm] - values["plain"]).mean(), abs=0.051)
        assert ("failed" in shown[name]) == (task in ("cola", "stsb") and (values[arm] <= 0).any())
