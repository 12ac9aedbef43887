"""When R-Drop doubles the batch, what it doubles, and that the script sees one batch all the same."""

from typing import Any

import pytest
import seeded
import torch
from heads import HEADS, IDS, ROWS, SIZES, TOKENS, grads_of
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from surgery import Mixout, RDrop, patch_model
from surgery.hooks.rdrop.doubling import is_equivalent

pytestmark = pytest.mark.usefixtures("one_thread")
each_head = pytest.mark.parametrize("name", HEADS)


def rows_seen(model: Any, *args: Any, **batch: Any) -> list[int]:
    """The first dimension of what a layer in the middle reads, call by call."""
    seen: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)]
    layers += [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    layers += [module for module in model.modules() if type(module).__name__ == "T5LayerNorm"]
    forward = layers[-1].forward

    def note(x: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(x))
        return forward(x, *args, **kwargs)

    layers[-1].forward = note  # no hook: with one of the script's, nothing is doubled
    model(*args, **batch)
    del layers[-1].forward
    return seen


@each_head
def test_auto_doubles_the_batch_of_each_head(name: str) -> None:
    head = HEADS[name]
    plain, patched = rows_seen(head.model(), **head.batch), patch_model(head.model(), rdrop=1.0)
    assert rows_seen(patched, **head.batch) == [2 * rows for rows in plain]


def assert_alike(output: Any, expected: Any) -> None:
    """Same types and shapes all the way down, caches and all."""
    if isinstance(expected, torch.Tensor):
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        return
    assert type(output) is type(expected)
    if isinstance(expected, dict):
        assert list(output) == list(expected)
        output, expected = tuple(output.values()), tuple(expected.values())
    if isinstance(expected, EncoderDecoderCache):
        for part in ("self_attention_cache", "cross_attention_cache"):
            assert_alike(getattr(output, part), getattr(expected, part))
    elif isinstance(expected, DynamicCache):
        assert_alike([(x.keys, x.values) for x in output.layers], [(x.keys, x.values) for x in expected.layers])
    elif isinstance(expected, tuple | list):
        for one, other in zip(output, expected, strict=True):
            assert_alike(one, other)


@pytest.mark.parametrize("passes", ["two", "doubled"])
@each_head
def test_outputs_have_the_shapes_that_the_script_expects(name: str, passes: Any) -> None:
    head = HEADS[name]
    settings = {"output_hidden_states": True, "output_attentions": True}
    if name in ("gpt2", "llama", "t5"):
        settings["use_cache"] = True
    plain, patched = head.model(), patch_model(head.model(), rdrop=RDrop(1.0, passes=passes))
    for model in (plain, patched):
        model.set_attn_implementation("eager")
    output = patched(**head.batch, **settings)
    assert_alike(output, plain(**head.batch, **settings))
    assert "past_key_values" in output or "use_cache" not in settings


# -- what takes two passes -----------------------------------------------------------------------------------------


class Subclass(BertForSequenceClassification):
    """Somebody's own."""


class Packed(BertForSequenceClassification):
    """As flash attention's models take packed rows."""


def bert(kind: Any = BertForSequenceClassification, **config: Any) -> Any:
    return seeded.bert(kind, num_labels=3, **config).train()


def with_loss(model: Any) -> Any:
    model.loss_function = lambda labels, logits, **_: F.cross_entropy(logits, labels)
    return model


def with_forward(model: Any) -> Any:
    forward = model.forward
    model.forward = lambda **batch: forward(**batch)
    return model


def with_layer(model: Any) -> Any:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm()

    model.bert.encoder.layer[0].output.dropout = nn.Sequential(nn.Dropout(0.1), Scale())
    return model


def with_layerdrop() -> Any:
    model = HEADS["bart"].model()
    model.model.encoder.layerdrop = 0.3
    return model


def with_batch_norm() -> Any:
    model = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3))
    model.classifier.insert(1, nn.Dropout(0.3))
    return model


def with_experts() -> Any:
    config = MixtralConfig(**SIZES, vocab_size=40, num_local_experts=2, num_key_value_heads=2, attention_dropout=0.1)
    return MixtralForCausalLM(config)


TEXT = {"input_ids": IDS, "labels": ROWS}
TWO: dict[str, tuple[Any, dict[str, Any]]] = {
    "no-labels": (bert, {"input_ids": IDS}),
    "one-row": (bert, {"input_ids": IDS[:1], "labels": ROWS[:1]}),
    "one-row-of-positions": (bert, {**TEXT, "position_ids": torch.arange(8)[None]}),
    "mask-for-all": (bert, {**TEXT, "attention_mask": torch.ones(1, 1, 8, 8)}),
    "unknown-tensor": (HEADS["llama"].model, {**HEADS["llama"].batch, "cu_seq_lens_q": torch.tensor([0, 4, 8, 8])}),
    "list": (HEADS["llama"].model, {**HEADS["llama"].batch, "of_the_script": [1, 2]}),
    "cache": (HEADS["llama"].model, {**HEADS["llama"].batch, "past_key_values": DynamicCache()}),
    "subclass": (lambda: bert(Subclass), TEXT),
    "loss-of-ones-own": (lambda: with_loss(bert()), TEXT),
    "forward-of-ones-own": (lambda: with_forward(bert()), TEXT),
    "layer-of-ones-own": (lambda: with_layer(bert()), TEXT),
    "layerdrop": (with_layerdrop, HEADS["bart"].batch),
    "experts": (
        with_experts,
        {"input_ids": IDS, "labels": TOKENS},
    ),
    "batch-norm": (
        with_batch_norm,
        {"pixel_values": torch.randn(4, 3, 8, 8), "labels": ROWS},
    ),
    "soft-labels": (
        lambda: DebertaV2ForSequenceClassification(
            DebertaV2Config(**SIZES, vocab_size=40, num_labels=3, max_position_embeddings=16)
        ),
        {"input_ids": IDS, "labels": F.one_hot(ROWS, 3).float()},
    ),
    "rows-in-another-order": (
        lambda: ProphetNetForConditionalGeneration(
            ProphetNetConfig(
                vocab_size=40,
                hidden_size=16,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                **{
                    f"num_{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")
                },
                decoder_start_token_id=0,
            )
        ),
        {"input_ids": IDS, "labels": TOKENS},
    ),
    "batch-in-the-second-dimension": (
        lambda: XLNetLMHeadModel(XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=40)),
        {"input_ids": IDS, "labels": TOKENS.clamp(min=0)},
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_auto_takes_two_passes_where_a_doubled_batch_may_differ(name: str) -> None:
    make, batch = TWO[name]
    plain = rows_seen(make().train(), **_again(batch))
    model = patch_model(make().train(), rdrop=RDrop(1.0))
    assert rows_seen(model, **_again(batch)) == [*plain, *plain]


def _again(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | ({"past_key_values": DynamicCache()} if "past_key_values" in batch else {})


# -- what is doubled -----------------------------------------------------------------------------------------------

ONES = torch.ones_like(IDS)
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "inputs_embeds": ("single-label", {"input_ids": None, "inputs_embeds": torch.randn(4, 8, 16).double()}),
    "token_types": ("single-label", {"token_type_ids": ONES, "position_ids": torch.arange(8).repeat(4, 1)}),
    "4d-mask": ("single-label", {"attention_mask": torch.ones(4, 1, 8, 8)}),
    "decoder": ("t5", {"decoder_input_ids": IDS, "decoder_attention_mask": ONES}),
    "flags": ("llama", {"use_cache": False, "return_dict": True, "logits_to_keep": 0, "num_items_in_batch": 9}),
}


@pytest.mark.parametrize("more", MORE)
def test_auto_doubles_more_arguments(more: str) -> None:
    name, batch = MORE[more]
    head = HEADS[name]
    plain = rows_seen(head.model(), **head.batch | batch)
    assert rows_seen(patch_model(head.model(), rdrop=1.0), **head.batch | batch) == [2 * rows for rows in plain]


def test_positions_in_planes_are_not_doubled() -> None:
    planes = torch.zeros(4, 3, 8, dtype=torch.long)
    assert is_equivalent(bert(), ((), TEXT))
    assert not is_equivalent(bert(), ((), {**TEXT, "position_ids": planes}))


def test_deberta_takes_two_passes_for_soft_labels_alone() -> None:
    config = DebertaV2Config(**SIZES, vocab_size=40, num_labels=3, max_position_embeddings=16)
    assert is_equivalent(DebertaV2ForSequenceClassification(config), ((), TEXT))
    assert is_equivalent(DebertaV2ForTokenClassification(config), ((), {"input_ids": IDS, "labels": TOKENS}))


def test_weights_that_are_mixed_take_two_passes() -> None:
    assert rows_seen(patch_model(bert(), rdrop=1.0, mixout=Mixout(0.5)), **TEXT) == [4, 4]
    assert rows_seen(patch_model(bert(), rdrop=1.0, mixout=Mixout(0.0, replace_dropout=False)), **TEXT) == [8]


def test_only_tensors_of_the_batch_are_doubled() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Any = None
            self.layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

        def forward(self, x: torch.Tensor, y: torch.Tensor, **more: Any) -> torch.Tensor:
            self.seen = (x, y, more)
            return F.cross_entropy(self.layer(x), y) * more["factor"]

    model = patch_model(Recorder(), rdrop=RDrop(1.0, passes="doubled"))
    x, y, factor = torch.randn(4, 3), torch.tensor([0, 1, 2, 1]), torch.tensor(2.0)
    masks = [torch.ones(4), torch.zeros(4, 2)]
    model(x, y, factor=factor, masks=masks, flag=True, count=4, name="n")
    seen_x, seen_y, more = model.seen
    assert torch.equal(seen_x, torch.cat([x, x]))
    assert torch.equal(seen_y, torch.cat([y, y]))
    assert [mask.shape for mask in more["masks"]] == [(8,), (8, 2)]
    assert (more["factor"] is factor, more["flag"], more["count"], more["name"]) == (True, True, 4, "n")
    assert [mask.shape for mask in masks] == [(4,), (4, 2)]


@each_head
def test_without_dropout_a_doubled_batch_is_two_passes(name: str) -> None:
    head, found = HEADS[name], []
    for passes in ("two", "doubled"):
        model = head.model()
        for module in model.modules():
            rates = [
                key for key, value in vars(module).items() if key == "p" or (isinstance(value, float) and "drop" in key)
            ]
            vars(module).update(dict.fromkeys(rates, 0.0))
        patch_model(model, rdrop=RDrop(0, passes=passes))  # type: ignore[arg-type]
        output = model(**head.batch)
        output.loss.backward()
        found.append({"loss": output.loss.detach(), **grads_of(model)})
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_outputs_without_a_dict_are_halved() -> None:
    plain, model = bert(), patch_model(bert(), rdrop=RDrop(1.0, passes="doubled"))
    assert_alike(model(**TEXT, return_dict=False), plain(**TEXT, return_dict=False))


def with_prefix(model: Any) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model.eval()(input_ids=IDS, past_key_values=cache)
    model.train()
    return cache


def test_a_cache_that_is_given_grows_once_and_both_passes_start_from_it() -> None:
    plain, model = HEADS["llama"].model(), patch_model(HEADS["llama"].model(), rdrop=RDrop(0.0))
    batch, caches = {"input_ids": IDS, "labels": TOKENS}, [with_prefix(plain), with_prefix(plain), with_prefix(model)]
    torch.manual_seed(1)
    expected = sum(plain(**batch, past_key_values=cache).loss for cache in caches[:2]) / 2
    torch.manual_seed(1)
    loss = model(**batch, past_key_values=caches[2]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert [cache.get_seq_length() for cache in caches] == [16] * 3


def test_a_cache_of_encoder_and_decoder_grows_once() -> None:
    model = patch_model(HEADS["t5"].model(), rdrop=1.0)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model(input_ids=IDS, decoder_input_ids=IDS, past_key_values=cache, use_cache=True)
    assert cache.self_attention_cache.get_seq_length() == 8
    assert [layer.keys.shape[0] for layer in cache.cross_attention_cache.layers] == [4]


def script_hook(module: Any, args: Any) -> None: ...


def script_output_hook(module: Any, args: Any, output: Any) -> None: ...


PLACES = {
    "layer": lambda model: model.bert.pooler.register_forward_hook(script_output_hook),
    "layer before": lambda model: model.bert.encoder.register_forward_pre_hook(script_hook),
    "model": lambda model: model.register_forward_pre_hook(script_hook),
    "every module": lambda _: nn.modules.module.register_module_forward_hook(script_output_hook),
}


@pytest.mark.parametrize("place", PLACES)
def test_hooks_of_the_script_see_its_batch(place: str) -> None:
    head = HEADS["single-label"]
    model = patch_model(head.model(), rdrop=1.0)
    rows = rows_seen(model, **head.batch)
    handle = PLACES[place](model)
    assert rows_seen(model, **head.batch) == [row // 2 for row in rows for _ in range(2)]
    handle.remove()
    assert rows_seen(model, **head.batch) == rows
