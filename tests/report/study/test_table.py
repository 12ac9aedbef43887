"""A study on a terminal: an arm a line at 80 columns, what can be said of it below, and what went wrong."""

import json

import pytest
from studies import REASON, draw_scores, make_study, twelve_arms, two_arms

from surgery.report.study.rows import rows
from surgery.report.study.table import p_value, table
from surgery.report.tables import Terminal
from surgery.report.text import as_json
from surgery.report.widths import width_of
from surgery.study.collect import Study
from surgery.study.trial import Status


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Study]:
    folder = tmp_path_factory.mktemp("studies")
    return {"two": two_arms(folder / "2"), "twelve": twelve_arms(folder / "12")}


def show(study: Study, width: int | None = 80) -> list[str]:
    return table(rows(study), Terminal(width)).splitlines()


def test_table_of_two_arms(studies):
    assert show(studies["two"]) == [
        "eval_accuracy, more is better",
        "",
        "arm          n   mean            95 %      std   best  worst  failed       p",
        "plain       20  0.801  0.720 to 0.846    0.118  0.866  0.527    3/20",
        "mixout=0.7  20  0.870  0.867 to 0.873  0.00711  0.881  0.854    0/20  <0.001",
        "",
        "mixout=0.7: better by 0.0697 (0.0256 to 0.151)",
        "",
        "failed: eval_accuracy of 0.527 or less (3 runs of plain have exactly this)",
    ]


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("name", ["two", "twelve"])
def test_each_arm_is_one_line_with_what_matters_most(name, width, studies):
    study = studies[name]
    lines = show(study, width)
    assert max(map(width_of, lines)) <= width
    assert [title for title in ("arm", "n", "mean", "95 %", "failed") if f" {title} " in f" {lines[2]} "] == [
        "arm", "n", "mean", "95 %", "failed"
    ]  # fmt: skip
    body = lines[3 : 3 + len(study.arms)]
    assert lines[3 + len(study.arms)] == ""
    end = lines[2].index(" n") - 1  # of the column of names, which the next is right of
    assert len({line[:end].rstrip() for line in body}) == len(study.arms)
    for line, arm in zip(body, study.summaries, strict=True):
        assert f" {arm.n} " in f"{line} "
        assert arm.failed is None or not arm.values or f" {arm.failed}/{len(arm.values)}" in line


def test_table_tells_of_arms_without_effect_and_of_trials_without_a_metric(studies):
    lines = show(studies["twelve"], None)
    for line in (
        f"recadam=0.1: NO EFFECT: {REASON}",
        "anchor=0.01: nothing to compare yet",
        "recadam=0.1: 19 not run, 1 no effect",
        "rdrop=2: 1 crashed, 1 no metric",
        "  seed 0: exit code 1: seed 0 of rdrop=2 is done",
        "anchor=0.01: 20 not run",
    ):
        assert line in lines


def test_problems_of_many_trials_are_a_few_lines(tmp_path):
    study = make_study(tmp_path / "s", {"plain": draw_scores(9), "rdrop=1": [Status.CRASHED] * 9})
    lines = show(study)
    at = lines.index("rdrop=1: 9 crashed")
    assert lines[at + 1 :] == [*(f"  seed {seed}: exit code 1: seed {seed} of rdrop=1 is done" for seed in (0, 1, 2)),
                               "  and 6 more"]  # fmt: skip


def test_less_is_better_where_it_is(tmp_path):
    study = make_study(tmp_path / "s", {"plain": [3.0, 2.0], "rdrop=1": [1.0, 1.5]}, minimize=True, failed_below=2.5)
    lines = show(study)
    assert lines[0] == "eval_accuracy, less is better"
    assert lines[-1] == "failed: eval_accuracy of 2.50 or more (as asked)"


def test_hostile_names_do_not_act_on_the_terminal(tmp_path):
    study = make_study(tmp_path / "s", {"plain": [0.1, 0.2], "rdrop=1 'include=\x1b[31m\n'": [0.1, 0.2]})
    assert all(line.isprintable() for line in show(study))


@pytest.mark.parametrize(("p", "text"), [(0.0002, "<0.001"), (0.001, "0.001"), (0.0496, "0.050"), (1.0, "1.000")])
def test_p_has_no_more_digits_than_resamples(p, text):
    assert p_value(p) == text


def test_same_rows_are_json(studies):
    document = json.loads(as_json(rows(studies["twelve"])))
    arms = {arm["name"]: arm for arm in document["arms"]}
    assert next(iter(arms)) == "plain"
    assert arms["mixout=0.7"]["values"]["0"] is None  # NaN
    assert arms["recadam=0.1"]["trials"] == {"not run": 19, "no effect": 1}
    assert arms["rdrop=2"]["problems"][0]["seed"] == 0
    assert arms["rdrop=2"]["problems"][0]["why"].startswith("exit code 1")
