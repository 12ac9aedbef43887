"""The files of --report: one JSON document, and figures over time."""

import json
import math
from importlib.metadata import version
from itertools import pairwise

import pytest
from test_run_outcome import BOTH, MODEL, trained

from surgery.hooks.run.inside.history import History
from surgery.hooks.run.options import make_options
from surgery.hooks.run.outcome import judge
from surgery.hooks.run.report import Command, write_report

ROWS = [{"seconds": 0.5, "steps": 1, "kl": 0.1}, {"seconds": 1.5, "steps": 2, "kl": math.nan}]


def options(folder, **values):
    return make_options(report=str(folder / "report.json"), **values)


def write(folder, *records, **values):
    write_report(judge(records, BOTH), options(folder, mixout=0.7, rdrop=1.0, **values), Command(["python", "a b.py"]))


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_report_tells_of_the_run(tmp_path):
    write(tmp_path, trained(), trained(1), noisytune=0.1, noise_seed=3, exclude=("lm_head",))
    written = read(tmp_path / "report.json")
    assert (written["status"], written["reason"], written["notes"]) == ("active", None, [])
    assert (written["version"], written["versions"]["torch"]) == (version("model-surgery"), version("torch"))
    assert (written["command"], written["noise_seed"]) == ("python 'a b.py'", 3)
    assert written["settings"]["noisytune"] == {"lam": 0.1, "seed": 3}
    assert (written["settings"]["mixout"]["p"], written["settings"]["rdrop"]["alpha"]) == (0.7, 1.0)
    assert written["settings"]["exclude"] == ["lm_head"]
    assert written["begun"].endswith("+00:00")
    assert 0 <= written["seconds"] < 60
    assert [(rank["rank"], rank["is_final"], rank["models"]) for rank in written["ranks"]] == [
        (0, True, [MODEL]),
        (1, True, [MODEL]),
    ]


def test_figures_over_time_stand_beside_it(tmp_path):
    write(tmp_path, trained(models=[MODEL, MODEL | {"history": ROWS}]))
    assert "history" not in (tmp_path / "report.json").read_text()
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    own = {"rank": 0, "process": 100, "model": 1, "class": MODEL["class"]}
    assert lines == [own | ROWS[0], own | ROWS[1] | {"kl": None}]


def test_report_is_written_whole(tmp_path):
    (tmp_path / "report.json").write_text("older")
    write(tmp_path, trained(models=[MODEL | {"kl": math.nan, "ce": math.inf}]))
    assert read(tmp_path / "report.json")["ranks"][0]["models"][0] == MODEL | {"kl": None, "ce": None}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["report.json", "report.jsonl"]


def test_report_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path, trained())
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_ranks_with_a_run_of_their_own_have_files_of_their_own(tmp_path, monkeypatch):
    write(tmp_path, trained(0))
    write(tmp_path, trained(2), trained(3))
    monkeypatch.setenv("SLURM_PROCID", "5")
    write(tmp_path)
    names = ["report-rank2.json", "report-rank5.json", "report.json"]
    assert sorted(one.name for one in tmp_path.glob("*.json")) == names
    assert [rank["rank"] for rank in read(tmp_path / "report-rank2.json")["ranks"]] == [2, 3]


def test_history_is_bounded_and_covers_all_of_the_time(monkeypatch):
    clock = iter(range(100_000))
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    history = History()
    for second in clock:
        now[0] = float(second)
        history.add({"steps": second}, None)
    assert 128 < len(history.rows) < 512
    steps = [row["steps"] for row in history.rows]
    assert (steps[0], steps == sorted(steps)) == (0, True)
    assert steps[-1] > 99_000
    assert max(b - a for a, b in pairwise(steps)) < 1_000


def test_distance_takes_a_small_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    spent = []

    def distance():
        now[0] += 0.1
        spent.append(0.1)
        return 1.0

    history = History()
    while now[0] < 1000:
        now[0] += 1
        history.add({"steps": now[0]}, distance)
    assert 10 < len(spent) < 25
