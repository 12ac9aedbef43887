"""Child processes of a run, each with its own record; and models that end it, for it cannot regularize them."""

import json
from pathlib import Path
from typing import Any

import byhand
import pytest
from running import Run, run

CHILDREN = "trained", "train_and_vanish", "forked plainly", "spawned", "update_by_hand", "evaluate"
REFUSED = {
    "in_replicas": "got DataParallel, whose replicas are not its layers",
    "of_no_weights": "mixout: Squared: model: expected a trainable weight to mix, got none",
    "shared": "noisytune: Net: weights: expected some of this process alone, got some shared with others",
    "quantized": "noisytune: Net: expected unquantized weights, got a quantized model",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("children")
    ran = run(folder, "children.py", *byhand.NOISE, *byhand.MIXOUT, args=[*CHILDREN, *REFUSED])
    assert ran.code == 0, ran.err
    return ran


def record_of(ran: Run, name: str) -> Any:
    pid, _ = json.loads(ran.out)[name]
    return next((record for record in ran.records if record["pid"] == pid), None)


@pytest.mark.parametrize("name", ["trained", "spawned"])
def test_child_leaves_a_record(name: str, ran: Run) -> None:
    record = record_of(ran, name)
    assert [(entry["class"], entry["mixed"], entry["steps"]) for entry in record["models"]] == [("Net", 3, 5)]
    assert (record["acts"], record["is_final"]) == (["mixout", "noisytune"], True)


@pytest.mark.parametrize("name", ["train_and_vanish", "forked plainly"])
def test_child_that_ends_without_a_word_has_left_one_before(name: str, ran: Run) -> None:
    record = record_of(ran, name)
    assert [(entry["class"], entry["mixed"]) for entry in record["models"]] == [("Net", 3)]
    assert (record["acts"], record["is_final"]) == (["mixout", "noisytune"], False)


def test_training_without_an_optimizer_is_seen(ran: Run) -> None:
    record = record_of(ran, "update_by_hand")
    found = [(entry["class"], entry["steps"], entry["mixed"]) for entry in record["models"]]
    assert (record["has_trained"], found) == (True, [("Net", 5, 3)])


def test_child_that_only_evaluates_says_nothing(ran: Run) -> None:
    assert record_of(ran, "evaluate") is None


def test_parent_has_nothing_of_its_childrens(ran: Run) -> None:
    record = record_of(ran, "parent")
    assert (record["has_torch"], record["has_trained"], record["models"]) == (True, False, [])


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_be_regularized_ends_the_process(name: str, ran: Run) -> None:
    assert json.loads(ran.out)[name][1] == 3
    record = record_of(ran, name)
    assert record["is_refused"]
    (fault,) = record["faults"]
    assert REFUSED[name] in fault
    assert f"surgery: {fault}\n" in ran.err


def test_inactive_run_goes_on_if_allowed(tmp_path: Path) -> None:
    flags = (*byhand.NOISE, *byhand.MIXOUT, "--allow-inactive")
    ran = run(tmp_path, "children.py", *flags, args=REFUSED)
    assert ran.code == 0, ran.err
    for name, fault in REFUSED.items():
        assert json.loads(ran.out)[name][1] == 0
        record = record_of(ran, name)
        assert (record["is_refused"], record["has_trained"]) == (False, True)
        assert fault in record["faults"][0]


def test_model_that_processes_share_is_mixed(tmp_path: Path) -> None:
    ran = run(tmp_path, "children.py", *byhand.MIXOUT, args=["shared"])
    assert ran.code == 0, ran.err
    record = record_of(ran, "shared")
    assert [(entry["class"], entry["mixed"], entry["steps"]) for entry in record["models"]] == [("Net", 3, 5)]
    assert (record["acts"], record["faults"]) == (["mixout"], [])
