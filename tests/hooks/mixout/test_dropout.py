"""Which dropout Mixout replaces, which is kept, and how all of it comes back."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetModel,
)

from surgery.hooks import Mixout, describe, patch_model, patched, unpatch_model

BERT_LAYER = ("attention.self.dropout", "attention.output.dropout", "output.dropout")
if version("transformers").startswith("4."):
    BERT_LAYER = (*BERT_LAYER, "attention.self.dropout_prob")
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48}


class Attention(nn.Module):
    """As nanoGPT has it: a rate in an attribute, beside modules with the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.2), nn.Dropout(0.2)
        self.dropout = 0.2


class Block(nn.Module):
    """One block of nanoGPT, with its embedding before and its head after."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.drop = nn.Embedding(10, 8), nn.Dropout(0.2)
        self.attn = Attention()
        self.lm_head = nn.Linear(8, 10, bias=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.3)
        self.drop_path = nn.Dropout(0.0)
        self.layerdrop = 0.1
        self.out = nn.Linear(8, 2)


def fresh(kind: type[Any], config: Any, path: Path) -> Any:
    """A model whose base is pretrained and whose head is new."""
    torch.manual_seed(0)
    kind(config).base_model.save_pretrained(path)
    return kind.from_pretrained(path)


def bert(path: Path) -> Any:
    return fresh(BertForSequenceClassification, seeded.bert().config, path)


def roberta(path: Path) -> Any:
    return fresh(RobertaForSequenceClassification, RobertaConfig(vocab_size=60, **SIZES), path)


def distilbert(path: Path) -> Any:
    config = DistilBertConfig(vocab_size=60, dim=32, n_heads=2, n_layers=1, hidden_dim=48)
    return fresh(DistilBertForSequenceClassification, config, path)


def gpt2(path: Path) -> Any:
    return seeded.reload(seeded.gpt2(), path)


def bart(path: Path) -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    rates = {"attention_dropout": 0.1, "activation_dropout": 0.2, "classifier_dropout": 0.3}
    config = BartConfig(vocab_size=60, d_model=32, max_position_embeddings=16, **layers, **heads, **rates)
    return fresh(BartForSequenceClassification, config, path)


def t5(path: Path) -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return seeded.reload(T5ForConditionalGeneration(config), path)


def vit(path: Path) -> Any:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    return fresh(ViTForImageClassification, ViTConfig(image_size=8, patch_size=4, **SIZES, **rates), path)


def nano_gpt(_: Path) -> nn.Module:
    return Block()


def encoder_layer(_: Path) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)


def recurrent(_: Path) -> nn.Module:
    return Recurrent()


def rates_of(model: nn.Module) -> dict[str, float]:
    """Every number of the model whose name has to do with dropping, written without a look at the code under test."""
    rates = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (isinstance(module, nn.Dropout) and name == "p")):
                rates[path if name == "p" else f"{path}.{name}".lstrip(".")] = value
    return {name: rate for name, rate in rates.items() if rate}


GPT2_LAYER = ("attn.attn_dropout", "attn.resid_dropout", "mlp.dropout")
T5_PARTS, T5_ATTENTION = ("encoder", "decoder"), ("SelfAttention.dropout", "dropout")
BART_LAYER = ("self_attn.dropout", "dropout", "activation_dropout")
KEPT: dict[Callable[[Path], nn.Module], set[str]] = {
    bert: {"dropout"},
    roberta: {"classifier.dropout"},
    distilbert: {"dropout"},
    gpt2: set(),
    bart: {"classification_head.dropout"},
    t5: set(),
    vit: set(),
    nano_gpt: set(),
    encoder_layer: set(),
    recurrent: {"layerdrop"},
}
NOT_DROPOUT = {"layerdrop", "model.encoder.layerdrop", "model.decoder.layerdrop"}


@pytest.mark.parametrize("make", KEPT, ids=lambda make: make.__name__)
def test_dropout_of_mixed_layers_is_replaced(make: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    model = make(tmp_path)
    before = rates_of(model)
    assert before
    patch_model(model)
    assert rates_of(model).keys() == KEPT[make]
    assert set(describe(model).replaced) == before.keys() - KEPT[make]
    assert set(describe(model).kept) == KEPT[make] - NOT_DROPOUT
    assert rates_of(unpatch_model(model)) == before


def test_real_model_has_these_rates(tmp_path: Path) -> None:
    model = patch_model(bert(tmp_path))
    layers = {f"bert.encoder.layer.{index}.{name}" for index in (0, 1) for name in BERT_LAYER}
    assert set(describe(model).replaced) == {"bert.embeddings.dropout"} | layers
    model = patch_model(bart(tmp_path / "bart"))
    decoder = {f"model.decoder.layers.0.{name}" for name in (*BART_LAYER, "encoder_attn.dropout")}
    encoder = {f"model.encoder.layers.0.{name}" for name in BART_LAYER}
    assert set(describe(model).replaced) == {"model.encoder.dropout", "model.decoder.dropout"} | decoder | encoder


def test_dropout_before_an_excluded_layer_is_kept(tmp_path: Path) -> None:
    model = patch_model(seeded.reload(seeded.bert(), tmp_path), exclude="classifier")
    assert describe(model).kept == ("dropout",)
    patch_model(unpatch_model(model))
    assert describe(model).kept == ()


@pytest.mark.parametrize(
    ("make", "include", "replaced"),
    [
        (bert, "bert.encoder.layer.1", {f"bert.encoder.layer.1.{name}" for name in BERT_LAYER}),
        (bert, "**.intermediate", set()),
        (gpt2, "transformer.h.0", {"transformer.drop"} | {f"transformer.h.0.{name}" for name in GPT2_LAYER}),
        (gpt2, "transformer.h.1", {f"transformer.h.1.{name}" for name in GPT2_LAYER}),
        (bart, "model.encoder.layers.0", {f"model.encoder.layers.0.{name}" for name in BART_LAYER}),
        (t5, "**.SelfAttention", {f"{part}.block.0.layer.0.{name}" for part in T5_PARTS for name in T5_ATTENTION}),
        (vit, "vit.embeddings", {"vit.embeddings.dropout"}),
        (encoder_layer, "linear1", set()),
        (encoder_layer, "linear2", {"dropout", "dropout1", "dropout2"}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if isinstance(value, str) else ""),
)
def test_dropout_of_layers_not_in_include_is_kept(
    make: Callable[[Path], nn.Module], include: str, replaced: set[str], tmp_path: Path
) -> None:
    model = make(tmp_path)
    before = rates_of(model)
    patch_model(model, include=include)
    assert set(describe(model).replaced) == replaced
    assert rates_of(model).keys() == before.keys() - replaced


def test_dropout_of_layers_that_are_frozen_is_kept(tmp_path: Path) -> None:
    model = bert(tmp_path)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    patch_model(model)
    assert set(describe(model).replaced) == {f"bert.encoder.layer.1.{name}" for name in BERT_LAYER}


def test_next_layer_decides_and_the_last_one_where_none_comes() -> None:
    layers = [nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 4), nn.Dropout(0.3)]
    model = nn.Sequential(*layers)
    for include, replaced in (("0", ()), ("2", ("1",)), ("4", ("3", "5"))):
        assert describe(patch_model(unpatch_model(model), include=include)).replaced == replaced


def test_dropout_by_itself_follows_the_layers_beside_its_parent() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.1)), nn.Linear(4, 4))
    assert describe(patch_model(model, include="0")).kept == ("1.0",)
    assert describe(patch_model(model, include="2", w_pre=model.state_dict())).replaced == ("1.0",)


@pytest.mark.parametrize(
    "settings",
    [{"mixout": Mixout(0.5, replace_dropout=False)}, {"anchor": 0.1}],
    ids=["replace-dropout-off", "anchor-alone"],
)
def test_dropout_is_left_alone_when_mixout_does_not_replace_it(settings: dict[str, Any], tmp_path: Path) -> None:
    model = bert(tmp_path)
    before = rates_of(model)
    patch_model(model, **settings)
    assert rates_of(model) == before
    assert (describe(model).replaced, describe(model).kept) == ((), ())


def test_rate_that_the_user_changed_since_is_left_alone(tmp_path: Path) -> None:
    model = patch_model(bert(tmp_path))
    model.bert.embeddings.dropout.p = 0.35
    unpatch_model(model)
    assert model.bert.embeddings.dropout.p == 0.35
    assert model.bert.encoder.layer[0].output.dropout.p == 0.1


def test_rates_survive_patching_again(tmp_path: Path) -> None:
    model = bert(tmp_path)
    before = rates_of(model)
    patch_model(model)
    patch_model(model, mixout=0.2)
    with patched(model, mixout=Mixout(0.1, replace_dropout=False)):
        assert rates_of(model) == before
    assert rates_of(model).keys() == {"dropout"}
    assert rates_of(unpatch_model(model)) == before


@pytest.mark.parametrize("mixed", ["rel_attn", "ff"])
def test_dropout_of_weights_that_its_parent_holds_goes_with_them(mixed: str) -> None:
    model = XLNetModel(XLNetConfig(vocab_size=60, d_model=8, n_head=2, d_inner=16, n_layer=1))
    left = {"rel_attn": "ff", "ff": "rel_attn"}[mixed]
    patch_model(model, exclude=f"**.{left}")
    assert f"layer.0.{mixed}.dropout" in describe(model).replaced
    assert f"layer.0.{left}.dropout" in describe(model).kept


@pytest.mark.parametrize("make", [nn.MultiheadAttention, partial(nn.LSTM, 8)], ids=["attention", "lstm"])
def test_layer_keeps_its_dropout_unless_its_weights_are_mixed(make: Callable[..., Any]) -> None:
    model = nn.ModuleDict({"layer": make(8, 2, dropout=0.1), "out": nn.Linear(8, 2)})
    patch_model(model, exclude="layer")
    assert (model["layer"].dropout, describe(model).kept) == (0.1, ("layer.dropout",))
    patch_model(unpatch_model(model))
    assert (model["layer"].dropout, describe(model).replaced) == (0.0, ("layer.dropout",))
    assert unpatch_model(model)["layer"].dropout == 0.1


def test_model_without_randomness_is_deterministic_once_dropout_is_replaced(tmp_path: Path) -> None:
    model = patch_model(gpt2(tmp_path), mixout=0.0).train()
    ids = seeded.batch()["input_ids"]
    assert torch.equal(model(ids).logits, model(ids).logits)
