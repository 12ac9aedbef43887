"""What a study's folder tells: which runs are compared, and what should be known before anything is believed."""

import json
from pathlib import Path

from studies import make_study

from surgery.study.collect import collect
from surgery.study.trial import Status

PLAIN = [0.5, 0.6, 0.7]


def test_arm_without_effect_in_one_trial_is_not_compared_at_all(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"plain": PLAIN, "mixout=0.7": [0.9, Status.INACTIVE, 0.9]})
    arm = study.summaries[1]
    assert (arm.n, arm.mean, arm.difference) == (0, None, None)
    assert [result.status for result in study.of("mixout=0.7")] == [Status.DONE, Status.INACTIVE, Status.DONE]


def test_missing_trials_are_listed_and_crashed_ones_in_no_mean(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"plain": PLAIN, "rdrop=1": [0.6, Status.CRASHED]})
    assert [result.status for result in study.of("rdrop=1")] == [Status.DONE, Status.CRASHED, Status.MISSING]
    assert study.of("rdrop=1")[1].why == "exit code 1: seed 1 of rdrop=1 is done"
    assert study.summaries[1].values == {0: 0.6}


def test_score_is_kept_when_the_scripts_files_are_gone(tmp_path: Path) -> None:
    before = make_study(tmp_path / "study", {"plain": PLAIN, "rdrop=1": PLAIN})
    assert before.plan
    for log in (tmp_path / "study").rglob("log.txt"):
        log.unlink()
    assert collect(before.plan) == before


def test_code_and_versions_that_changed_are_noted(tmp_path: Path) -> None:
    plan = make_study(tmp_path / "study", {"plain": PLAIN, "rdrop=1": PLAIN}).plan
    assert plan
    for trial in plan.trials():
        script = {"file": "train.py", "commit": "a" if trial.seed else "b", "is_edited": False}
        versions = {"torch": "2.13.0" if trial.seed else "2.11.0"}
        trial.write(trial.about() | {"environment": {"script": script, "versions": versions}})
    assert collect(plan).notes == (
        "the script's repository was at 2 commits during the study",
        "not all trials ran with the same versions of packages",
    )


def test_metric_of_several_kinds_of_files_is_noted(tmp_path: Path) -> None:
    plan = make_study(tmp_path / "study", {"plain": PLAIN, "rdrop=1": PLAIN}).plan
    assert plan
    first = plan.trials()[0]
    (first.folder / "score.json").unlink()
    (first.out / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.51}))
    assert collect(plan).notes == (
        "the metric was found in different files: all_results.json, eval.json. See trials.csv",
    )
