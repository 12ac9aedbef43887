"""Which models of a process a run regularizes, and which it leaves alone."""

from pathlib import Path
from typing import Any

import byhand
import pytest
import seeded
import torch
from running import SCRIPTS, Run, run

from surgery import perturb_model


@pytest.fixture(scope="module")
def several() -> Any:
    """The script's own module: its loops are run again on models that are regularized by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import several

        yield several


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("several")
    ways = "play", "call_parts", "learn", "evaluate"
    return run(folder, "several.py", *byhand.NOISE, *byhand.MIXOUT, args=(folder / "final.pt", *ways))


@pytest.fixture(scope="module")
def left(ran: Run) -> Any:
    """What the script has left."""
    assert ran.code == 0, ran.err
    return torch.load(ran.folder / "final.pt")


def noisy(model: Any, *, seed: int = 0, **settings: Any) -> Any:
    perturb_model(model, lam=byhand.LAM, seed=seed)
    byhand.Mixed(model, **settings)
    return model


def assert_all_equal(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, state in wanted.items():
        byhand.assert_equal(got[name], state)


def test_both_models_of_a_game_are_regularized(left: Any, several: Any) -> None:
    wanted = several.play(noisy(several.build()), noisy(several.build_critic()))
    assert_all_equal(left["play"], wanted)


def test_model_whose_modules_are_called_alone_is_regularized(left: Any, several: Any) -> None:
    assert_all_equal(left["call_parts"], several.call_parts(noisy(several.build())))


def test_teacher_is_left_alone(left: Any, several: Any) -> None:
    assert_all_equal(left["learn"], several.learn(noisy(several.build()), several.build()))
    byhand.assert_equal(left["learn"]["teacher"], several.build().state_dict(), tolerance=0)


def test_model_that_is_only_evaluated_is_left_alone(left: Any, several: Any) -> None:
    byhand.assert_equal(left["evaluate"]["model"], several.build().state_dict(), tolerance=0)


def test_each_trained_model_has_an_entry(ran: Run) -> None:
    found = [(entry["class"], entry["perturbed"], entry["mixed"], entry["steps"]) for entry in ran.models]
    assert found == [("Net", 6, 3, 5), ("Critic", 4, 2, 5), ("Net", 6, 3, 5), ("Net", 6, 3, 5)]
    assert all(entry["distance"] > 0 for entry in ran.models)


@pytest.mark.transformers
def test_teacher_from_pretrained_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = seeded.bert_folder(tmp_path / "source")
    ran = run(tmp_path, "with_teacher.py", *byhand.NOISE, *byhand.MIXOUT, args=(source, tmp_path / "final.pt"))
    assert ran.code == 0, ran.err
    monkeypatch.syspath_prepend(SCRIPTS)
    import with_teacher

    head = ("dropout", "classifier")
    left = torch.load(tmp_path / "final.pt")
    student = noisy(with_teacher.load(source), fresh=head, kept=head)
    assert_all_equal(left, with_teacher.distil(student, with_teacher.load(source)))
    byhand.assert_equal(left["teacher"], with_teacher.load(source).state_dict(), tolerance=0)
    assert [(entry["class"], entry["steps"]) for entry in ran.models] == [("BertForSequenceClassification", 5)]


def test_script_whose_first_import_is_transformers_is_seen(tmp_path: Path) -> None:
    source = seeded.bert_folder(tmp_path / "source")
    script = f"from transformers import Trainer, BertModel\nBertModel.from_pretrained({str(source)!r})\n"
    ran = run(tmp_path, script, *byhand.MIXOUT)
    assert ran.code == 0, ran.err
    assert [(record["has_loaded"], record["has_trained"]) for record in ran.records] == [(True, False)]


def test_dead_models_leave_their_figures_and_no_memory(several: Any, tmp_path: Path) -> None:
    ran = run(tmp_path, "several.py", *byhand.ALL, args=(tmp_path / "final.pt", "average", "sweep"))
    assert ran.code == 0, ran.err
    left = torch.load(tmp_path / "final.pt")
    model = several.build()
    perturb_model(model, lam=byhand.LAM, seed=0)
    steps = byhand.seeded_steps(several.batches())
    wanted = byhand.train(model, steps, model, mixed=byhand.Mixed(model))
    for state in (left["average"]["model"], left["average"]["copy"], *left["sweep"]["models"]):
        byhand.assert_equal(state, wanted)
    assert left["sweep"]["alive"] == 0
    assert len(ran.models) == 6
    for entry in ran.models:
        assert (entry["class"], entry["steps"], entry["rdrop_fired"], entry["mixed"]) == ("Net", 5, 5, 3)
        assert entry["distance"] == ran.models[0]["distance"] > 0
        assert entry["kl"] == ran.models[0]["kl"] > 0


def test_choice_of_classes_and_parameters(several: Any, tmp_path: Path) -> None:
    flags = (*byhand.NOISE, *byhand.MIXOUT, "--include", "Net", "--exclude", "head", "--seed", "7")
    ran = run(tmp_path, "several.py", *flags, "--w-pre", "original", args=(tmp_path / "final.pt", "play"))
    assert ran.code == 0, ran.err
    model = several.build()
    w_pre = {path: layer.weight.detach().clone() for path, layer in model.named_modules() if hasattr(layer, "weight")}
    perturb_model(model, lam=byhand.LAM, seed=7, exclude=["head.weight", "head.bias"])
    byhand.Mixed(model, w_pre=w_pre, fresh=["head"])
    assert_all_equal(torch.load(tmp_path / "final.pt")["play"], several.play(model, several.build_critic()))
    assert [(entry["class"], entry["perturbed"], entry["mixed"]) for entry in ran.models] == [("Net", 4, 2)]


def test_choice_by_excluded_class(several: Any, tmp_path: Path) -> None:
    flags = (*byhand.MIXOUT, "--include", "body.0", "--include", "first", "--exclude", "Crit*")
    ran = run(tmp_path, "several.py", *flags, args=(tmp_path / "final.pt", "play"))
    assert ran.code == 0, ran.err
    model = several.build()
    byhand.Mixed(model, fresh=["body.3", "head"], kept=["body.2"])  # the dropout of what is not mixed stays
    assert_all_equal(torch.load(tmp_path / "final.pt")["play"], several.play(model, several.build_critic()))
    assert [(entry["class"], entry["mixed"]) for entry in ran.models] == [("Net", 1)]
