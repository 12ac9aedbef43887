"""Every method of the registry, through what the contract promises of each: nothing here names a method but CASES."""

import io
import json
import pickle
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from commands import Ran
from torch import nn
from trainers import Reporter, trainer

from surgery import SettingError, SourceError, SurgeryCallback, describe, patch_model, patched, stats, unpatch_model
from surgery.hooks.description import Description
from surgery.hooks.registry import METHODS, as_settings
from surgery.hooks.regularizer import Settings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]
NUMBERS = {"mixout": 0.5, "rdrop": 1.0, "anchor": 0.1, "recadam": 20.0}
BAD = {"mixout": 1.5, "rdrop": -1.0, "anchor": -1.0, "recadam": -1.0}
EVERY = pytest.mark.parametrize("kind", METHODS, ids=[kind.name for kind in METHODS])


def patch(model: Any, kind: type[Settings]) -> Any:
    return patch_model(model, **{kind.name: NUMBERS[kind.name]})


def train(model: nn.Module, *, steps: int = 2, lr: float = 0.02) -> torch.optim.Optimizer:
    """Take a few optimizer steps on the loss that the model returns."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(**seeded.batch()).loss.backward()
        optimizer.step()
    return optimizer


def weights(model: nn.Module) -> bytes:
    return b"".join(w.detach().numpy().tobytes() for w in model.state_dict().values())


def test_cases_are_all_methods() -> None:
    assert NUMBERS.keys() == BAD.keys() == {kind.name for kind in METHODS}
    assert len({name for kind in METHODS for name in (kind.name, *kind.idle_facts, *kind.idle_report)}) == sum(
        1 + len(kind.idle_facts) + len(kind.idle_report.keys() - kind.idle_facts.keys()) for kind in METHODS
    )


# -- settings ------------------------------------------------------------------------------------------------------


@EVERY
def test_settings_are_frozen_and_made_of_a_number(kind: type[Settings]) -> None:
    (made,) = as_settings({kind.name: NUMBERS[kind.name]})
    assert getattr(made, kind.number) == NUMBERS[kind.name]
    assert as_settings({kind.name: made}) == (made,)
    assert {flag.field for flag in kind.flags} <= {field.name for field in fields(made)}  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        setattr(made, kind.number, 0.25)
    assert pickle.loads(pickle.dumps(made)) == deepcopy(made) == made


@EVERY
def test_number_out_of_range_is_refused_and_changes_nothing(kind: type[Settings]) -> None:
    model = seeded.bert()
    before = seeded.fingerprint(model)
    with pytest.raises(SettingError, match=rf"^{kind.name}: expected .*, got {BAD[kind.name]}\. Give one such as"):
        patch_model(model, **{kind.name: BAD[kind.name]})
    assert seeded.fingerprint(model) == before


# -- the restore contract ------------------------------------------------------------------------------------------


@EVERY
def test_unpatched_model_is_what_it_was(kind: type[Settings]) -> None:
    model = seeded.bert()
    before = seeded.fingerprint(model)
    assert patch(model, kind) is model
    assert seeded.fingerprint(model) != before
    assert unpatch_model(model) is model
    assert seeded.fingerprint(model) == before
    unpatch_model(model)
    assert seeded.fingerprint(model) == before


@EVERY
def test_trained_model_is_unpatched_to_its_weights_alone(kind: type[Settings]) -> None:
    model, plain = patch(seeded.bert(), kind), seeded.bert()
    optimizer = train(model)
    trained = weights(model)
    unpatch_model(model)
    assert weights(model) == trained
    plain.load_state_dict(model.state_dict())
    plain.train()
    for each, step in ((model, optimizer), (plain, torch.optim.SGD(plain.parameters(), 0.02))):
        step.zero_grad()
        torch.manual_seed(5)
        each(**seeded.batch()).loss.backward()
        step.step()
    assert weights(model) == weights(plain)  # and the optimizer made before still works
    assert optimizer.param_groups[0].keys() == torch.optim.SGD(plain.parameters()).param_groups[0].keys()


@EVERY
def test_names_and_values_stay_those_of_the_model(kind: type[Settings]) -> None:
    model = seeded.bert()
    before = {name: id(w) for name, w in model.named_parameters()}
    state = {name: w.clone() for name, w in model.state_dict().items()}
    patch(model, kind)
    assert {name: id(w) for name, w in model.named_parameters()} == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())


@EVERY
def test_context_restores_what_was_there_before(kind: type[Settings]) -> None:
    model = seeded.bert()
    before = seeded.fingerprint(model)
    with patched(model, **{kind.name: NUMBERS[kind.name]}):
        train(model, steps=1, lr=0.0)
    model.zero_grad()
    assert seeded.fingerprint(model) == before


@EVERY
def test_patching_again_replaces_and_never_stacks(kind: type[Settings]) -> None:
    twice, once = patch(patch(seeded.bert(), kind), kind), patch(seeded.bert(), kind)
    train(twice)
    train(once)
    assert weights(twice) == weights(once)
    unpatch_model(twice)
    assert not describe(twice).settings


@EVERY
def test_it_changes_what_is_trained(kind: type[Settings]) -> None:
    model, plain = patch(seeded.bert(), kind), seeded.bert()
    train(model)
    train(plain)
    assert weights(model) != weights(plain)


@EVERY
def test_eval_is_untouched_to_the_bit(kind: type[Settings]) -> None:
    model, plain = patch(seeded.bert(), kind), seeded.bert()
    train(model, steps=1)
    plain.load_state_dict(model.state_dict())
    figures = stats(model)
    model.eval()
    plain.eval()
    states = torch.get_rng_state()
    with torch.no_grad():
        logits = model(**seeded.batch()).logits
    assert torch.equal(torch.get_rng_state(), states)
    assert torch.equal(logits, plain(**seeded.batch()).logits)
    assert stats(model)["steps"] == figures["steps"]


# -- copies --------------------------------------------------------------------------------------------------------


@EVERY
def test_deepcopy_goes_on_by_itself(kind: type[Settings]) -> None:
    model = patch(seeded.bert(), kind)
    train(model, steps=1)
    copied = deepcopy(model)
    kept = weights(model)
    train(copied)
    assert weights(model) == kept
    train(model)
    assert weights(copied) == weights(model)
    unpatch_model(model)
    assert describe(copied).settings == as_settings({kind.name: NUMBERS[kind.name]})
    assert not describe(unpatch_model(copied)).settings


@EVERY
def test_pickle_carries_no_w_pre_and_says_so(kind: type[Settings]) -> None:
    model = patch(seeded.bert(), kind)
    train(model, steps=1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert describe(loaded).is_w_pre_lost is (kind.acts_on is not None)
    if kind.acts_on is None:
        train(loaded)
        assert stats(loaded)["steps"] == stats(model)["steps"] + 2
    else:
        with pytest.raises(SourceError, match="expected w_pre, got a model from a pickle"):
            train(loaded)
    trained = weights(loaded)
    plain = unpatch_model(loaded)
    assert weights(plain) == trained
    assert not any(name.startswith("_surgery") for module in plain.modules() for name in vars(module))


# -- idleness ------------------------------------------------------------------------------------------------------


def in_eval_mode(model: Any, step: int) -> None:
    """Train as ever, in the mode that from_pretrained leaves a model in."""
    optimizer = torch.optim.SGD(model.eval().parameters(), 0.01)
    torch.manual_seed(step)
    model(**seeded.batch()).loss.backward()
    optimizer.step()


def by_hand(model: Any, step: int) -> None:
    """Train without an optimizer of torch."""
    model.zero_grad()
    torch.manual_seed(step)
    model.train()(**seeded.batch()).loss.backward()
    with torch.no_grad():
        for w in model.parameters():
            w -= 0.1 * w.grad


@EVERY
def test_training_that_it_has_no_part_in_is_reported(kind: type[Settings], caplog: pytest.LogCaptureFixture) -> None:
    reported = []
    for way in (in_eval_mode, by_hand):
        caplog.clear()
        model = patch(seeded.bert(), kind)
        (regularizer,) = model.__dict__["_surgery_patch"].regularizers
        texts = []
        try:
            for step in range(4):
                way(model, step)
        except SourceError as error:
            texts.append(str(error))
        texts += caplog.messages
        reported.append(any(text.startswith(f"{kind.name}: expected") for text in texts))
        assert reported[-1] is not regularizer.has_acted, (way.__name__, texts)
    assert any(reported)


# -- description, figures, report ----------------------------------------------------------------------------------


@EVERY
def test_description_has_its_settings_and_facts(kind: type[Settings]) -> None:
    plain = describe(seeded.bert())
    assert getattr(plain, kind.name) is None
    assert {name: getattr(plain, name) for name in kind.idle_facts} == dict(kind.idle_facts)
    model = patch(seeded.bert(), kind)
    train(model)
    found = describe(model)
    assert getattr(found, kind.name) == as_settings({kind.name: NUMBERS[kind.name]})[0]
    assert kind.idle_facts.keys() <= found.facts.keys()
    text = str(found)
    assert f"{NUMBERS[kind.name]:g}" in next(line for line in text.splitlines() if line.startswith(kind.name))
    if kind.acts_on is not None:
        acted = found.acted[kind.acts_on]
        assert acted.verb == kind.verb
        assert f"{kind.verb:12} {len(acted.names)} weights" in text
        assert set(acted.names).isdisjoint(acted.left or {})
        assert set(acted.names) | set(acted.left or {}) == dict(model.named_parameters()).keys()
        assert found.w_pre_bytes == sum(dict(model.named_parameters())[name].nbytes for name in acted.names)
    assert Description() == plain


@EVERY
def test_stats_count_forwards_and_measure_the_distance(kind: type[Settings]) -> None:
    model = patch(seeded.bert(), kind)
    w_pre = {name: w.detach().double().clone() for name, w in model.named_parameters()}
    assert stats(model)["steps"] == 0
    train(model, steps=3)
    found = stats(model)
    names = describe(model).acted[kind.acts_on].names if kind.acts_on is not None else ()
    now = {name: w.detach().double() for name, w in model.named_parameters()}
    squares = sum(float((now[name] - w_pre[name]).square().sum()) for name in names)
    assert found["steps"] == 3
    assert found["distance"] == pytest.approx(squares**0.5, rel=1e-12)
    assert found["w_pre_bytes"] == describe(model).w_pre_bytes


@EVERY
def test_callback_logs_with_the_training_loss(kind: type[Settings], tmp_path: Path) -> None:
    reporter = Reporter()
    model = patch(seeded.bert(), kind)
    trainer(model, tmp_path, callbacks=[reporter, SurgeryCallback(unpatch=True)], max_steps=2).train()
    logs = [log for log in reporter.logs if "loss" in log]
    plain = {"loss", "grad_norm", "learning_rate", "epoch"}
    assert len(logs) == 2
    assert all(log.keys() > plain for log in logs)
    assert all("w_pre_distance" in log for log in logs) is (kind.acts_on is not None)
    assert not describe(model).settings


SCRIPT = """
import sys
import torch
from transformers import AutoModelForSequenceClassification
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).train()
optimizer = torch.optim.SGD(model.parameters(), 0.05)
for step in range(3):
    optimizer.zero_grad()
    model(input_ids=torch.arange(1, 17).view(2, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
"""

BY_HAND = SCRIPT.replace("    optimizer.step()", "    [w.data.sub_(0.05 * w.grad) for w in model.parameters()]")


@EVERY
def test_run_reports_what_it_did(kind: type[Settings], tmp_path: Path, run_cli: Callable[..., Ran]) -> None:
    folder = seeded.bert_folder(tmp_path / "pre")
    (tmp_path / "train.py").write_text(SCRIPT)
    flags = (f"--{kind.name}", NUMBERS[kind.name], "--report", "report.json")
    ran = run_cli("run", *flags, "--", sys.executable, "train.py", folder)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    (entry,) = report["ranks"][0]["models"]
    assert report["status"] == "active"
    assert all(entry[name] != idle for name, idle in kind.idle_report.items())
    others = [other for other in METHODS if other is not kind]
    assert all(entry[name] == idle for other in others for name, idle in other.idle_report.items())
    assert entry["steps"] == 3
    assert (entry["distance"] is not None) is (kind.acts_on is not None)
    lines = ran.err.splitlines()
    begun = next(line for line in lines if line.startswith("surgery: BertForSequenceClassification"))
    ended = next(line for line in lines if line.startswith("surgery: active: BertForSequenceClassification"))
    (settings,) = as_settings({kind.name: NUMBERS[kind.name]})
    assert settings.announcement(entry) in begun
    assert all(f"{entry[name]:,} {name}" in ended for name in kind.counts)
    assert all(text in ended for text in kind.summary(entry))


@EVERY
def test_run_that_it_has_no_part_in_ends_with_3(
    kind: type[Settings], tmp_path: Path, run_cli: Callable[..., Ran]
) -> None:
    folder = seeded.bert_folder(tmp_path / "pre")
    is_of_steps = kind.name in ("anchor", "recadam")
    (tmp_path / "train.py").write_text(BY_HAND if is_of_steps else SCRIPT.replace("train()", "eval()"))
    ran = run_cli("run", f"--{kind.name}", NUMBERS[kind.name], "--", sys.executable, "train.py", folder)
    assert ran.code == 3, ran.err
    assert "INACTIVE" in ran.err


# -- together ------------------------------------------------------------------------------------------------------


def at_work_on(model: nn.Module) -> Any:
    patch = model.__dict__["_surgery_patch"]
    return zip(patch.settings, patch.regularizers, strict=True)


PAIRS = list(combinations(METHODS, 2))


@pytest.mark.parametrize("pair", PAIRS, ids=["-".join(kind.name for kind in pair) for pair in PAIRS])
def test_any_two_work_together_or_are_refused(pair: tuple[type[Settings], ...]) -> None:
    model = seeded.bert()
    before = seeded.fingerprint(model)
    given = {kind.name: NUMBERS[kind.name] for kind in pair}
    if {"anchor", "recadam"} == given.keys():
        with pytest.raises(SettingError, match="recadam: expected no anchor beside it"):
            patch_model(model, **given)
    else:
        patch_model(model, **given)
        train(model, lr=0.0)
        acted = [one.name for one, at_work in at_work_on(model) if at_work.has_acted]
        # weights that stay at w_pre are the same in both passes, and Mixout has set dropout to 0
        assert acted == (["mixout"] if given.keys() == {"mixout", "rdrop"} else [kind.name for kind in pair])
        assert describe(model).settings == as_settings(given)
        unpatch_model(model).zero_grad()
    assert seeded.fingerprint(model) == before
