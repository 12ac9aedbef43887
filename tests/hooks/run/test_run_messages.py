"""What a run says, and reports, of models and globs: no more than what came of them."""

from pathlib import Path
from typing import Any

import byhand
import pytest
from running import Run, run

from surgery.hooks.run.options import make_options
from surgery.hooks.run.outcome import judge
from surgery.hooks.run.record import Record

GLOBS = ("--include", "Headed", "--include", "Squ*", "--include", "lost.*", "--exclude", "head", "--exclude", "Nobody")
LOST = ["--exclude 'Nobody'", "--include 'lost.*'"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that is regularized, but for one of its layers; one that cannot be; one that is not to be."""
    flags = (*byhand.NOISE, *byhand.MIXOUT, *byhand.RDROP, "--anchor", "0.01", *GLOBS)
    ran = run(tmp_path_factory.mktemp("odd"), "odd.py", *flags, args=("Headed", "Net", "Squared"))
    assert ran.code == 0, ran.err
    return ran


def line_of(ran: Run, name: str) -> Any:
    lines = [line for line in ran.err.splitlines() if line.startswith(f"surgery: {name}: ")]
    (line,) = (line for line in lines if "noise on" in line)
    return line


def test_weights_that_were_not_mixed_do_not_count(ran: Run) -> None:
    headed = ran.models[0]
    assert (headed["class"], headed["parameters"], headed["mixed"]) == ("Headed", 8, 2)


def test_line_of_a_model_says_what_was_done_to_it(ran: Run) -> None:
    noise = "(lam 0.15, seed 0)"
    mixed = "3 weights mixed (p 0.5), R-Drop (alpha 1), anchor (0.01)"  # whether they are called is not known yet
    assert line_of(ran, "Headed").endswith(f"Headed: noise on 6 of 8 parameters {noise}, {mixed}")


def test_line_of_a_model_that_is_not_patched_claims_no_patch(ran: Run) -> None:
    assert [(entry["class"], entry["mixed"], entry["rdrop_fired"]) for entry in ran.models[1:]] == [("Squared", 0, 0)]
    assert line_of(ran, "Squared").endswith("Squared: noise on 2 of 2 parameters (lam 0.15, seed 0)")
    assert "mixout and anchor: Squared: model: expected a trainable weight to mix, got none" in ran.err


def test_globs_without_effect_are_reasons(ran: Run) -> None:
    (record,) = ran.records
    assert record["unmatched"] == LOST
    outcome = judge([Record(**record)], make_options(noisytune=0.15, mixout=0.5, rdrop=1.0, anchor=0.01))
    assert not outcome.is_active
    assert all(f"{option}: expected a glob of a model's class" in str(outcome.reason) for option in LOST)


def test_anchor_alone_mixes_nothing(tmp_path: Path) -> None:
    ran = run(tmp_path, "odd.py", "--anchor", "0.01", args=("Headed",))
    assert ran.code == 0, ran.err
    (entry,) = ran.models
    assert entry["mixed"] == 0
    assert entry["w_pre_bytes"] == (6 * 12 + 12 * 12 + 2 * 12 * 3) * 8, "all that is anchored"
    assert entry["distance"] > 0
    assert "Headed: anchor (0.01)\n" in ran.err


def test_a_run_that_leaves_all_models_out_ends_at_its_first_step(tmp_path: Path) -> None:
    globs = "--include", "Nobody", "--include", "Head*", "--exclude", "lm_head"
    ran = run(tmp_path, "odd.py", *byhand.MIXOUT, *globs, args=("Net", "Squared"))
    left = "model: expected one to regularize, got those that are left out (Net)."
    assert (ran.code, ran.err) == (3, f"surgery: {left}\n")
    (record,) = ran.records
    assert (record["is_refused"], record["faults"]) == (True, [left])
    assert judge([Record(**record)], make_options(mixout=0.5)).is_refused
