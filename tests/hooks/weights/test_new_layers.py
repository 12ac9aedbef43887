"""Which layers count as new, and so are neither mixed nor lose their dropout."""

from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from surgery.errors import SettingError, SourceError
from surgery.hooks import describe, patch_model, unpatch_model

pytestmark = pytest.mark.transformers

NEW = "new: it has no pretrained value"


def new_of(model: nn.Module) -> set[str]:
    return {name for name, reason in (describe(model).left or {}).items() if reason == NEW}


def tuned(path: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(seeded.bert_folder(path))


@pytest.mark.parametrize("lost", [False, True], ids=["marked", "marks-lost"])
def test_fresh_classifier_is_new(lost: bool, tmp_path: Path) -> None:
    model = tuned(tmp_path)
    model = patch_model(deepcopy(model) if lost else model)
    assert new_of(model) == {"classifier.weight", "classifier.bias"}
    assert len(describe(model).mixed) == 2 * 6 + 1
    assert describe(model).kept == ("dropout",)


@pytest.mark.parametrize("lost", [False, True], ids=["marked", "marks-lost"])
def test_classifier_of_mismatched_size_is_new(lost: bool, tmp_path: Path) -> None:
    seeded.bert(num_labels=3).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    model = patch_model(deepcopy(model) if lost else model)
    assert new_of(model) == {"classifier.weight", "classifier.bias"}


def test_classifier_from_a_checkpoint_is_mixed(tmp_path: Path) -> None:
    model = patch_model(seeded.reload(seeded.bert(), tmp_path))
    assert "classifier.weight" in describe(model).mixed
    assert (new_of(model), describe(model).kept) == (set(), ())


@pytest.mark.parametrize("lost", [False, True], ids=["marked", "marks-lost"])
def test_tied_head_is_as_pretrained_as_its_embedding(lost: bool, tmp_path: Path) -> None:
    model = seeded.reload(seeded.gpt2(), tmp_path)
    model = patch_model(deepcopy(model) if lost else model)
    assert new_of(model) == set()
    assert describe(model).tied == ("lm_head.weight",)


@pytest.mark.parametrize("lost", [False, True], ids=["marked", "marks-lost"])
def test_fresh_head_beside_a_tied_embedding_is_new(lost: bool, tmp_path: Path) -> None:
    model = BertForMaskedLM.from_pretrained(seeded.bert_folder(tmp_path))
    model = patch_model(deepcopy(model) if lost else model)
    assert {name for name in new_of(model) if "weight" in name} == {
        "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.LayerNorm.weight",
    }
    assert "cls.predictions.decoder.weight" in describe(model).tied


def test_resized_embedding_is_pulled_to_what_it_was_at_patch_time(tmp_path: Path) -> None:
    model = seeded.reload(seeded.gpt2(), tmp_path)
    model.resize_token_embeddings(seeded.VOCAB + 4)
    with pytest.raises(
        SourceError, match=r"^w_pre: transformer\.wte\.weight: expected shape \(64, 32\), got \(60, 32\)"
    ):
        patch_model(model, w_pre=tmp_path)
    patch_model(model)
    if version("transformers").startswith("4."):  # it leaves no marks: of another shape than in the checkpoint is new
        assert new_of(model) == {"transformer.wte.weight", "lm_head.weight"}
    else:
        assert torch.equal(seeded.w_pre_of(model)["transformer.wte.weight"], model.lm_head.weight)


class Siamese(nn.Module):
    """Two encoders and a head of one's own."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(64, 2)


@pytest.mark.parametrize("lost", [False, True], ids=["marked", "marks-lost"])
def test_copied_encoder_is_as_pretrained_as_its_original(lost: bool, tmp_path: Path) -> None:
    encoder = BertModel.from_pretrained(seeded.bert_folder(tmp_path))
    model = Siamese(encoder, deepcopy(encoder))
    model = patch_model(deepcopy(model) if lost else model)
    assert new_of(model) == {"head.weight", "head.bias"}
    assert len(describe(model).mixed) == 2 * 13
    assert describe(model).kept == ("dropout",)


def test_unloaded_encoder_beside_a_loaded_one_is_new(tmp_path: Path) -> None:
    model = patch_model(Siamese(BertModel.from_pretrained(seeded.bert_folder(tmp_path)), seeded.bert(BertModel)))
    assert {name.partition(".")[0] for name in new_of(model)} == {"right", "head"}
    assert len(describe(model).mixed) == 13


def test_model_without_a_checkpoint_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(AutoModelForSequenceClassification.from_config(seeded.bert().config))
    assert caplog.messages == [
        "BertForSequenceClassification: no checkpoint found, so every weight counts as pretrained. "
        "Name new layers in exclude."
    ]
    assert new_of(model) == set()
    assert "classifier.weight" in describe(model).mixed


def test_model_of_ones_own_names_new_layers_in_exclude(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 2))
    patch_model(model, exclude="4")
    assert describe(model).left["4.weight"] == "in exclude"
    assert (describe(model).replaced, describe(model).kept, caplog.messages) == (("1",), ("3",), [])


def forget_exclude(model: nn.Module) -> None:
    patch_model(model, exclude="classifier")


def forget_include(model: nn.Module) -> None:
    patch_model(model, include=["bert.**", "classifier"])


@pytest.mark.parametrize("former", [patch_model, forget_exclude, forget_include], ids=lambda former: former.__name__)
def test_new_layers_stay_new_when_patched_again(former: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = tuned(tmp_path)
    former(model)
    patch_model(model, mixout=0.5, exclude="bert.embeddings")
    assert new_of(model) == {"classifier.weight", "classifier.bias"}


def test_new_layers_alone_are_nothing_to_mix(tmp_path: Path) -> None:
    model = tuned(tmp_path)
    before = seeded.fingerprint(model)
    message = r"^model: expected a trainable weight to mix, got none \(39 not in include; 2 new: it has no pretrained "
    with pytest.raises(SettingError, match=message):
        patch_model(model, include="classifier")
    assert seeded.fingerprint(model) == before


def test_new_layers_train_as_without_a_patch(tmp_path: Path) -> None:
    plain = tuned(tmp_path).eval()
    model = patch_model(deepcopy(plain), mixout=1.0)
    model.train()
    model.dropout.p = 0.0
    grads = [torch.autograd.grad(m(**seeded.batch()).loss, m.classifier.weight)[0] for m in (plain, model)]
    assert torch.equal(*grads)
    assert unpatch_model(model).dropout.p == 0.0
