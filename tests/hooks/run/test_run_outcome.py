"""What is said of a run, from what its processes left."""

import pytest

from surgery.hooks.run.options import make_options
from surgery.hooks.run.outcome import judge
from surgery.hooks.run.record import Record, read_records

BOTH = make_options(mixout=0.7, rdrop=1.0)
MODEL = {
    "class": "BertForSequenceClassification",
    "parameters": 22_713_216,
    "perturbed": 0,
    "mixed": 21_234,
    "new": ["classifier.weight"],
    "w_pre_bytes": 84_936,
    "steps": 5,
    "rdrop_fired": 5,
    "kl": 0.01234567,
    "ce": 0.6931,
    "distance": 1.25,
}


def trained(rank=0, acts=("mixout", "rdrop"), **values) -> Record:
    values = {"pid": 100 + rank, "models": [MODEL], "is_final": True} | values
    return Record(rank=rank, has_torch=True, has_loaded=True, has_trained=True, acts=list(acts), **values)


def test_outcome_is_active_when_all_acted_on_all_ranks():
    outcome = judge([Record(1, has_torch=True), trained(0), trained(1)], BOTH)
    assert outcome.is_active
    assert [(one.rank, one.models) for one in outcome.ranks] == [(0, [MODEL]), (1, [MODEL])]
    assert outcome.reason is None


def test_outcome_says_in_one_line_what_one_rank_did():
    assert judge([trained()], BOTH).lines == (
        "surgery: active: BertForSequenceClassification, 21,234 mixed, 5 steps, R-Drop in 5 of them, KL 0.01235, "
        "CE 0.6931, distance 1.25",
    )


def test_outcome_says_what_noise_alone_did():
    model = MODEL | {"perturbed": 7, "mixed": 0, "rdrop_fired": 0, "kl": None, "ce": None, "distance": None}
    lines = judge([trained(acts=("noisytune",), models=[model, model])], make_options(noisytune=0.1)).lines
    one = "BertForSequenceClassification, 7 perturbed, 5 steps"
    assert lines == (f"surgery: active: {one}; {one}",)


def test_outcome_has_a_line_for_each_of_eight_ranks():
    lines = judge([trained(rank) for rank in range(64)], BOTH).lines
    assert lines[0] == "surgery: active: in 64 processes"
    assert [line.split(" Bert")[0] for line in lines[1:9]] == [f"surgery: rank {rank}:" for rank in range(8)]
    assert lines[9:] == ("surgery: and 56 more",)


def test_trainings_of_one_rank_are_told_apart():
    lines = judge([trained(pid=7), trained(pid=8), trained(1)], BOTH).lines
    starts = ["surgery: rank 0, process 7:", "surgery: rank 0, process 8:", "surgery: rank 1:"]
    assert [line.split(" Bert")[0] for line in lines[1:]] == starts


def test_glob_that_matches_nothing_anywhere_is_a_reason():
    first, second = trained(unmatched=["--exclude 'a'", "--exclude 'b'"]), trained(1, unmatched=["--exclude 'a'"])
    reason = "expected a glob of a model's class or of a parameter that is trained, got one that matches none."
    assert judge([first, second], BOTH).reason == f"--exclude 'a': {reason}"
    assert judge([first, trained(1)], BOTH).is_active


def test_outcome_of_nine_records_is_in_the_order_of_ranks(tmp_path):
    for rank in (3, 0, 2, 1):
        trained(rank).write(tmp_path)
    assert [one.rank for one in read_records(tmp_path)] == [0, 1, 2, 3]
    assert read_records(tmp_path)[2] == trained(2)


def test_a_record_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "7.json").write_text('{"pid": 7, "ra')
    (tmp_path / "8.json").write_text("")
    (tmp_path / "9.json").write_text('{"pid": 9, "of a later version": 1}')
    assert read_records(tmp_path) == [Record(9)]


def test_a_side_process_that_only_holds_a_model_is_reported_and_not_judged():
    beside = Record(7, rank=0, has_torch=True, has_loaded=True, models=[MODEL | {"steps": 0}])
    outcome = judge([beside, trained()], BOTH)
    assert outcome.is_active
    assert len(outcome.ranks) == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("noisytune", "noisytune: no pretrained weights were trained, so that none were perturbed."),
        ("mixout", "mixout: no layer with pretrained weights was trained, so that none was mixed."),
        ("rdrop", "rdrop: its KL reached no loss, or was 0 in all steps."),
        ("anchor", "anchor: no optimizer's step drew a weight toward w_pre."),
    ],
)
def test_outcome_names_the_regularizer_without_effect(name, sentence):
    everything = make_options(noisytune=0.1, mixout=0.7, rdrop=1.0, anchor=0.01)
    outcome = judge([trained(acts=[one for one in everything.asked if one != name])], everything)
    assert outcome.reason == sentence
    assert outcome.lines[0] == f"surgery: INACTIVE: {sentence}"
    assert (outcome.is_active, outcome.is_idle) == (False, False)


def test_outcome_names_the_ranks_without_effect():
    ranks = [trained(0), trained(1, ["mixout"]), trained(2, ["rdrop"]), trained(3, ["mixout"])]
    assert judge(ranks, BOTH).reason == (
        "mixout: no layer with pretrained weights was trained, so that none was mixed on rank 2; "
        "rdrop: its KL reached no loss, or was 0 in all steps on ranks 1, 3."
    )


@pytest.mark.parametrize(
    "fault",
    [
        "rdrop: expected dropout in the model, got none. Add mixout.",
        "rdrop: Bert: expected a model that is not compiled, got one. Patch it first.",
    ],
    ids=["own", "of a model"],
)
def test_outcome_takes_the_reason_of_a_fault(fault):
    records = [trained(rank, ["mixout"], faults=[fault]) for rank in range(2)]
    assert judge(records, BOTH).reason == fault


def test_outcome_takes_one_reason_for_several_regularizers():
    fault = "mixout and rdrop: Bert: expected a model in one place, got DataParallel."
    assert judge([trained(0, [], faults=[fault], refused=["mixout", "rdrop"])], BOTH).reason == fault


def test_outcome_adds_what_the_faults_do_not_tell():
    outcome = judge([trained(0, ["mixout"], faults=["lm_head is not mixed."])], BOTH)
    assert outcome.reason == "lm_head is not mixed; rdrop: its KL reached no loss, or was 0 in all steps."


def test_outcome_shows_the_first_faults():
    outcome = judge([trained(0, [], faults=[f"rdrop: {n}" for n in "abcdefg"])], make_options(rdrop=1.0))
    assert outcome.reason == "rdrop: a; rdrop: b; rdrop: c; rdrop: d; rdrop: e; and 2 more."


def test_faults_of_an_active_run_are_notes():
    outcome = judge([trained(faults=["lm_head is not mixed."])], BOTH)
    assert outcome.lines[1:] == ("surgery: note: lm_head is not mixed",)
    assert outcome.reason is None


def test_outcome_without_a_python_of_ours():
    reason = judge([], BOTH, ["make", "train"]).reason
    assert reason is not None
    assert reason.startswith("command: expected a Python that reads PYTHONPATH")
    assert "surgery env" in reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record(1), "command: expected a Python that imports torch, got none."),
        (
            Record(1, has_torch=True),
            "command: expected a training, got neither a backward pass of torch.autograd nor an optimizer's step.",
        ),
    ],
    ids=["no torch", "no training"],
)
def test_outcome_without_training(record, reason):
    outcome = judge([record], BOTH, ["python", "train.py"])
    assert (outcome.reason, outcome.is_idle) == (reason, False)


@pytest.mark.parametrize("option", ["-h", "--help", "--version"])
def test_help_of_the_command_is_nothing_to_do(option):
    outcome = judge([Record(1, has_torch=True)], BOTH, ["trl", "sft", option])
    assert outcome.is_idle
    assert outcome.lines == (
        "surgery: nothing to do: the command was asked for help or a version, and trained nothing.",
    )
    assert not judge([trained(acts=["mixout"])], BOTH, ["train", option]).is_idle, "it trained nevertheless"


def test_an_evaluation_is_nothing_to_do():
    record = Record(1, has_torch=True, has_loaded=True, models=[MODEL], faults=["mixout: idle"])
    outcome = judge([record], BOTH, ["python", "eval.py"])
    assert outcome.is_idle
    assert outcome.reason == "the command loaded weights, but trained nothing; mixout: idle."


def test_a_command_that_failed_first_is_told():
    outcome = judge([Record(1)], BOTH, ["python", "train.py"], has_failed=True)
    assert outcome.reason == "the command failed before it trained."


def test_a_refusal_is_never_nothing_to_do():
    record = Record(1, has_torch=True, has_loaded=True, is_refused=True, faults=["rdrop: expected dropout."])
    outcome = judge([record], BOTH, ["python", "train.py", "--help"], has_failed=True)
    assert (outcome.is_refused, outcome.is_idle, outcome.reason) == (True, False, "rdrop: expected dropout.")


def test_an_inactive_run_says_what_was_in_effect_nevertheless():
    lines = judge([trained(0, ["mixout"], faults=["rdrop: expected dropout."])], BOTH).lines
    assert lines[0] == "surgery: INACTIVE: rdrop: expected dropout."
    assert lines[1].startswith("surgery: in effect: BertForSequenceClassification, 21,234 mixed, 5 steps")


def test_figures_of_a_process_that_was_ended_are_marked():
    (line,) = judge([trained(is_final=False)], BOTH).lines
    assert line.endswith("distance 1.25 (not final: the process was ended before it could report)")
