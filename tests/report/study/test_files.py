"""The files of a study, to the byte: table.md, table.tex, trials.csv."""

import csv
import io
import math
from pathlib import Path

import pytest
from studies import REASON, make_study, twelve_arms

from surgery.report.study.files import TRIALS, as_csv, as_latex, as_markdown, write_files
from surgery.report.study.rows import rows
from surgery.study.collect import Study
from surgery.study.trial import Status

SPECIAL = "rdrop=1 'include=a|b_*`<x>[1]&%$#{}~^'"


def small(folder: Path) -> Study:
    """Return 4 seeds of plain, an arm with every special character, and one without effect."""
    scores = {
        "plain": [0.5, 0.625, 0.75, 0.0],
        SPECIAL: [0.5625, 0.75, math.nan, Status.CRASHED],
        "recadam=0.1": [Status.INACTIVE, Status.MISSING, Status.MISSING, Status.MISSING],
    }
    return make_study(folder, scores, metric="f1", failed_below=0.1)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return small(tmp_path_factory.mktemp("files") / "s")


def test_markdown(study):
    assert as_markdown(rows(study)) == (
        "| arm | n | mean | 95 % of the mean | std | median | failed | difference | p | what can be said |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| plain | 4 | 0.469 | 0 to 0.750 | 0.329 | 0.562 | 1/4 |  |  |  |\n"
        "| rdrop=1 'include=a\\|b\\_\\*\\`\\<x\\>\\[1\\]&%$#{}~^' | 2 | 0.656 |  | 0.133 | 0.656 | 1/3 | 0.0938 "
        "| 0.500 | cannot tell: 2 seeds in common with plain, 3 at least |\n"
        f"| recadam=0.1 | 0 |  |  |  |  |  |  |  | NO EFFECT: {REASON} |\n"
    )


def test_latex(study):
    assert as_latex(rows(study)) == (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{tabular}{lrrrrrrrrl}\n"
        "\\toprule\n"
        "arm & n & mean & 95 \\% of the mean & std & median & failed & difference & p & what can be said \\\\\n"
        "\\midrule\n"
        "plain & 4 & 0.469 & 0 to 0.750 & 0.329 & 0.562 & 1/4 &  &  &  \\\\\n"
        "rdrop=1 'include=a|b\\_*`\\textless{}x\\textgreater{}[1]"
        "\\&\\%\\$\\#\\{\\}\\textasciitilde{}\\textasciicircum{}' "
        "& 2 & 0.656 &  & 0.133 & 0.656 & 1/3 & 0.0938 & 0.500 "
        "& cannot tell: 2 seeds in common with plain, 3 at least \\\\\n"
        f"recadam=0.1 & 0 &  &  &  &  &  &  &  & NO EFFECT: {REASON} \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_csv(study):
    name = f'"{SPECIAL}"' if "," in SPECIAL or '"' in SPECIAL else SPECIAL
    assert as_csv(study) == (
        "arm,seed,status,metric,failed,seconds,peak_memory,file,rule,why\n"
        "plain,0,done,0.5,0,61.5,2000000000,out/eval.json,the last,\n"
        "plain,1,done,0.625,0,62.5,2000000000,out/eval.json,the last,\n"
        "plain,2,done,0.75,0,63.5,2000000000,out/eval.json,the last,\n"
        "plain,3,done,0.0,1,64.5,2000000000,out/eval.json,the last,\n"
        f"{name},0,done,0.5625,0,61.5,2000000000,out/eval.json,the last,\n"
        f"{name},1,done,0.75,0,62.5,2000000000,out/eval.json,the last,\n"
        f"{name},2,done,nan,1,63.5,2000000000,out/eval.json,the last,\n"
        f"{name},3,crashed,,,64.5,2000000000,,,exit code 1: seed 3 of {SPECIAL} is done\n"
        f"recadam=0.1,0,no effect,,,61.5,2000000000,,,{REASON}\n"
        "recadam=0.1,1,not run,,,,,,,\n"
        "recadam=0.1,2,not run,,,,,,,\n"
        "recadam=0.1,3,not run,,,,,,,\n"
    )


def test_csv_can_be_read_with_every_digit(tmp_path):
    value = 0.1 + 0.2
    name = "rdrop=1 'include=a,\"b\"'"
    found = list(
        csv.DictReader(io.StringIO(as_csv(make_study(tmp_path / "s", {"plain": [0.1, 0.2], name: [value, 1]}))))
    )
    assert tuple(found[0]) == TRIALS
    assert (found[2]["arm"], float(found[2]["metric"])) == (name, value)


def test_files_of_names_that_no_file_can_hold_are_written(tmp_path):
    name = "rdrop=1 'include=a\udcffb\x1b\nc'"
    study = make_study(tmp_path / "s", {"plain": [0.1, 0.2], name: [0.3, 0.4]}, log=lambda _: "done\n")
    write_files(study, rows(study), tmp_path / "s")
    for file in ("table.md", "table.tex", "trials.csv", "index.html", "arms.svg"):
        text = (tmp_path / "s" / file).read_text(encoding="utf-8")
        assert "\x1b" not in text
        assert "b\nc" not in text
        assert "udcffb" in text


def test_rows_of_arms_and_trials_agree_with_the_summaries(tmp_path):
    study = twelve_arms(tmp_path / "s")
    lines = list(csv.DictReader(io.StringIO(as_csv(study))))
    assert len(lines) == 240
    for arm in study.summaries:
        mine = [line for line in lines if line["arm"] == arm.name and line["metric"]]
        assert sum(math.isfinite(float(line["metric"])) for line in mine) == arm.n
        assert sum(line["failed"] == "1" for line in mine) == arm.failed


def test_all_files_are_written_and_none_besides(study, tmp_path):
    write_files(study, rows(study), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "arms.svg", "index.html", "table.md", "table.tex", "trials.csv"
    ]  # fmt: skip
