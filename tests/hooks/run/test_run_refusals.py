"""Refusals while a script trains: whoever catches them, they are told, and none takes other regularizers along."""

from pathlib import Path

import byhand
import pytest
from running import Run, run

from surgery.hooks.run.options import make_options
from surgery.hooks.run.outcome import Outcome, judge
from surgery.hooks.run.record import Record

RDROP = make_options(rdrop=1.0)
REASON = (
    "rdrop: expected a loss by cross_entropy, nll_loss, log_softmax, binary_cross_entropy or mse_loss of torch, got"
)


def outcome_of(ran: Run) -> Outcome:
    return judge([Record(**record) for record in ran.records], RDROP, has_failed=ran.code != 0)


@pytest.mark.parametrize(
    "way",
    [
        "swallow",
        "fork",
        "then well",
        *(pytest.param(way, marks=pytest.mark.sweep) for way in ("vanish", "thread", "spawn")),
    ],
)
def test_a_refusal_that_the_script_catches_is_one(way: str, tmp_path: Path) -> None:
    ran = run(tmp_path, "refused.py", *byhand.RDROP, args=(way,))
    assert ran.code == 0, ran.err
    assert ("came to its end" in ran.out) == (way != "vanish")
    outcome = outcome_of(ran)
    assert (outcome.is_refused, outcome.is_active, outcome.is_idle) == (True, False, False)
    assert str(outcome.reason).startswith(REASON)


@pytest.mark.parametrize("way", ["train", "thread"])
def test_a_refusal_is_one_line_without_a_traceback(way: str, tmp_path: Path) -> None:
    ran = run(tmp_path, "refused.py", *byhand.RDROP, args=(way,))
    assert f"surgery: error: {REASON}" in ran.err
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback_of_a_refusal(tmp_path: Path) -> None:
    ran = run(tmp_path, "refused.py", *byhand.RDROP, "--debug", args=("train",))
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert f"SourceError: {REASON}" in ran.err


def test_rdrop_steps_aside_if_allowed_and_the_others_go_on(tmp_path: Path) -> None:
    flags = (*byhand.RDROP, *byhand.MIXOUT, "--allow-inactive")
    ran = run(tmp_path, "refused.py", *flags, args=("train",))
    assert (ran.code, ran.out) == (0, "came to its end\n"), ran.err
    assert ran.err.count(REASON) == 1
    assert [fault.startswith(REASON) for fault in ran.records[0]["faults"]] == [True], "no untrue ones beside it"
    (entry,) = ran.models
    assert (entry["mixed"], entry["rdrop_fired"], entry["steps"]) == (3, 0, 5)
    assert not outcome_of(ran).is_active


def test_methods_that_fit_are_put_on_if_the_others_may_be_missing(tmp_path: Path) -> None:
    flags = (*byhand.MIXOUT, "--recadam", "10", "--allow-inactive")
    ran = run(tmp_path, "odd.py", *flags, args=("Squared",))
    assert ran.code == 0, ran.err
    assert "surgery: mixout: Squared: model: expected a trainable weight to mix, got none" in ran.err
    assert ran.records[0]["acts"] == ["recadam"]
    assert ran.records[0]["refused"] == ["mixout"]


def test_refusals_for_one_reason_are_one_line(tmp_path: Path) -> None:
    ran = run(tmp_path, "children.py", *byhand.MIXOUT, *byhand.RDROP, args=("in_replicas",))
    assert "surgery: mixout and rdrop: Net: expected a model in one place, got DataParallel" in ran.err
    assert [record["refused"] for record in ran.records if record["is_refused"]] == [["mixout", "rdrop"]]


def test_an_optimizer_without_a_model_says_so_at_its_first_backward(tmp_path: Path) -> None:
    """An image is fitted to a model, which gets gradients, too: that model is not trained."""
    ran = run(tmp_path, FITTED, *byhand.NOISE, *byhand.MIXOUT)
    assert ran.code == 0, ran.err
    said, done = (ran.err.index(text) for text in ("so far nothing is regularized", "first step done"))
    assert said < done
    options = make_options(noisytune=0.1, mixout=0.7)
    outcome = judge([Record(**record) for record in ran.records], options)
    assert str(outcome.reason).startswith("optimizer: expected one of torch.optim with the parameters of a model")
    assert "no pretrained weights" not in str(outcome.reason)


FITTED = """
import sys, torch
model = torch.nn.Linear(3, 3)
model.load_state_dict(model.state_dict())
image = torch.ones(2, 3, requires_grad=True)
optimizer = torch.optim.SGD([image], lr=0.1)
for _ in range(2):
    model(image).square().mean().backward()
    optimizer.step()
    print("first step done", file=sys.stderr)
"""
