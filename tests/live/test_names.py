"""A live model gets the bits that its checkpoint file gets, whatever transformers calls its parameters."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgery import Recipe, SourceError, perturb_checkpoint, perturb_model

pytestmark = pytest.mark.transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 99}
BERT = transformers.BertConfig(**TEXT, max_position_embeddings=64)
LLAMA = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
GPT2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
T5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
MOE = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_key_value_heads": 2}
QWEN = transformers.Qwen2MoeConfig(**TEXT, **MOE, decoder_sparse_step=1)
MIXTRAL = transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
ENCODEC = transformers.EncodecConfig(
    num_filters=4, hidden_size=16, codebook_dim=16, codebook_size=16, upsampling_ratios=[2, 2], num_lstm_layers=1,
    sampling_rate=1600, target_bandwidths=[24.0],
)  # fmt: skip
MINIMAX = transformers.MiniMaxConfig(**TEXT, num_key_value_heads=2, num_local_experts=2, block_size=16, head_dim=8)
IBERT = transformers.IBertConfig(**TEXT, max_position_embeddings=64)
HIFIGAN = transformers.SpeechT5HifiGanConfig(model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2])
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
LLAVA = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(**CLIP, image_size=8, patch_size=4), text_config=LLAMA,
    image_token_index=98, vision_feature_layer=-1,
)  # fmt: skip
RESNET = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def make(kind: Any, config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = type(config)(**(config.to_dict() | settings))
    return kind(config)


def save(model: Any, folder: Path) -> Path:
    """Save a model whose every parameter has a spread: initial biases and norms have none."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)
    model.save_pretrained(folder)
    return folder


def load(kind: Any, folder: Path) -> Any:
    """Load a model whose new parameters, if it has any, are always the same."""
    torch.manual_seed(2)
    return kind.from_pretrained(folder, dtype="auto")


def perturb_both(source: Path, kind: Any, out: Path, **settings: Any) -> tuple[Any, Any, Recipe]:
    """Return the model loaded from the perturbed files, the one perturbed after loading, and the latter's recipe."""
    perturb_checkpoint(source, out, seed=7, **settings)
    live = load(kind, source)
    return load(kind, out), live, perturb_model(live, seed=7, **settings)


def differing(expected: Any, live: Any) -> set[str]:
    expected, live = expected.state_dict(), live.state_dict()
    assert expected.keys() == live.keys()
    return {name for name in live if not torch.equal(expected[name], live[name])}


auto = transformers
SAME = [
    pytest.param(auto.BertModel, BERT, auto.BertModel, {}, id="bert"),
    pytest.param(auto.BertForMaskedLM, BERT, auto.BertModel, {}, id="bert-prefix-stripped"),
    pytest.param(auto.BertForMaskedLM, BERT, auto.BertForMaskedLM, {}, id="bert-tied-head"),
    pytest.param(auto.GPT2LMHeadModel, GPT2, auto.GPT2LMHeadModel, {}, id="gpt2-tied"),
    pytest.param(auto.GPT2LMHeadModel, GPT2, auto.GPT2Model, {}, id="gpt2-prefix-stripped"),
    pytest.param(auto.LlamaForCausalLM, LLAMA, auto.LlamaForCausalLM, {}, id="llama-untied"),
    pytest.param(auto.LlamaForCausalLM, LLAMA, auto.LlamaForCausalLM, {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param(auto.T5ForConditionalGeneration, T5, auto.T5ForConditionalGeneration, {}, id="t5-shared"),
    pytest.param(auto.T5ForConditionalGeneration, T5, auto.T5EncoderModel, {}, id="t5-encoder"),
    pytest.param(auto.LlavaForConditionalGeneration, LLAVA, auto.LlavaForConditionalGeneration, {}, id="llava-renamed"),
    pytest.param(auto.ResNetModel, RESNET, auto.ResNetModel, {}, id="resnet-buffers"),
    pytest.param(auto.EncodecModel, ENCODEC, auto.EncodecModel, {}, id="encodec-codebooks"),
    pytest.param(auto.IBertModel, IBERT, auto.IBertModel, {}, id="ibert-ranges"),
    pytest.param(auto.SpeechT5HifiGan, HIFIGAN, auto.SpeechT5HifiGan, {}, id="hifigan-statistics"),
]


@pytest.mark.parametrize(("saved", "config", "loaded", "settings"), SAME)
def test_perturb_model_has_the_bits_of_the_perturbed_file(
    saved: Any, config: Any, loaded: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = save(make(saved, config, **settings), tmp_path / "in")
    before = loaded.from_pretrained(source).state_dict()
    expected, live, recipe = perturb_both(source, loaded, tmp_path / "out")
    assert differing(expected, live) == set()
    assert any(not torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    assert recipe.notes == ()
    names = load_file(source / "model.safetensors").keys()
    assert {tensor.name for tensor in recipe.tensors if tensor.copied is None} <= names


def test_decays_are_left_alone_in_a_file_and_in_the_model(tmp_path: Path) -> None:
    source = save(make(auto.MiniMaxForCausalLM, MINIMAX), tmp_path / "in")
    before = auto.MiniMaxForCausalLM.from_pretrained(source).state_dict()
    expected, live, recipe = perturb_both(source, auto.MiniMaxForCausalLM, tmp_path / "out")
    assert {name for name in differing(expected, live) if ".experts." not in name} == set()
    decays = {name for name in before if name.endswith(("_decay", "slope_rate"))}
    assert len(decays) == 4
    assert all(torch.equal(before[name], expected.state_dict()[name]) for name in decays)
    assert {t.known for t in recipe.tensors if t.name in decays} == {"class"}


@pytest.mark.parametrize(("saved", "loaded"), [("BertForMaskedLM", "BertModel"), ("BertModel", "BertForMaskedLM")])
def test_perturb_model_needs_no_private_api_of_transformers(
    saved: str, loaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(make(getattr(auto, saved), BERT), tmp_path / "in")
    weights = load_file(source / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in weights.items()}
    save_file(old, source / "model.safetensors", {"format": "pt"})
    perturb_checkpoint(source, tmp_path / "out", seed=7)
    live, expected = (load(getattr(auto, loaded), folder) for folder in (source, tmp_path / "out"))
    if hasattr(live, "_get_key_renaming_mapping"):  # transformers 4
        monkeypatch.delattr("transformers.PreTrainedModel._get_key_renaming_mapping")
    else:
        monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    recipe = perturb_model(live, seed=7)
    assert differing(expected, live) == set()
    assert recipe.notes == ()


@pytest.mark.parametrize("settings", [{"noise": "normal"}, {"rounding": "stochastic"}, {"scale": "global"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_perturb_model_has_the_bits_of_the_file_with_every_setting(
    settings: dict[str, str], dtype: torch.dtype, tmp_path: Path
) -> None:
    source = save(make(auto.LlamaForCausalLM, LLAMA).to(dtype), tmp_path / "in")
    expected, live, recipe = perturb_both(source, auto.LlamaForCausalLM, tmp_path / "out", **settings)
    assert live.lm_head.weight.dtype == dtype
    assert differing(expected, live) == set()
    assert recipe.pooled_std == Recipe.read(tmp_path / "out" / "surgery.json").pooled_std


def test_perturb_model_maps_old_layer_norm_names(tmp_path: Path) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    weights = load_file(source / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, source / "model.safetensors", {"format": "pt"})
    expected, live, recipe = perturb_both(source, auto.BertModel, tmp_path / "out")
    assert differing(expected, live) == set()
    assert "embeddings.LayerNorm.gamma" in {tensor.name for tensor in recipe.tensors}


def test_perturb_model_reads_names_of_a_pickle(tmp_path: Path) -> None:
    model = make(auto.BertForMaskedLM, BERT)
    source = save(model, tmp_path / "in")
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    expected, live, _ = perturb_both(source, auto.BertForMaskedLM, tmp_path / "out")
    assert differing(expected, live) == set()


def test_perturb_model_takes_the_name_that_a_tied_pickle_is_written_under(tmp_path: Path) -> None:
    source = save(make(auto.BertForMaskedLM, BERT), tmp_path / "in")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    name = "bert.embeddings.word_embeddings.weight"
    torch.save({"cls.predictions.decoder.weight": weights[name], **weights}, source / "pytorch_model.bin")
    live = auto.BertModel.from_pretrained(source)
    recipe = perturb_model(live, seed=7)
    perturb_checkpoint(source, tmp_path / "out", seed=7)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "cls.predictions.decoder.weight" not in written
    assert torch.equal(live.embeddings.word_embeddings.weight, written[name])
    assert recipe.tensors[0].name == name


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(auto.Qwen2MoeForCausalLM, QWEN, id="qwen2-moe"),
        pytest.param(auto.MixtralForCausalLM, MIXTRAL, id="mixtral"),
    ],
)
def test_perturb_model_reports_fused_experts(kind: Any, config: Any, tmp_path: Path) -> None:
    source = save(make(kind, config), tmp_path / "in")
    before = kind.from_pretrained(source).state_dict()
    expected, live, recipe = perturb_both(source, kind, tmp_path / "out")
    fused = {name for name in before if ".experts." in name}
    if len(fused) > 4:
        pytest.skip("transformers 4 fuses no experts")
    assert len(fused) == 4
    assert differing(expected, live) == fused
    assert all(not torch.equal(before[name], live.state_dict()[name]) for name in fused)
    assert len(recipe.notes) == 1
    assert recipe.notes[0].startswith("4 tensors (model.layers.0.mlp.experts.")
    assert recipe.notes[0].endswith(
        f"no counterpart of their shape in {source}: perturbed under the names in the model"
    )
    assert recipe.notes == Recipe.from_json(recipe.to_json()).notes


def test_perturb_model_leaves_a_new_head_alone(tmp_path: Path) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    live = auto.BertForSequenceClassification.from_pretrained(source)
    head = live.classifier.weight.clone()
    recipe = perturb_model(live, seed=7)
    assert torch.equal(live.classifier.weight, head)
    copied = {tensor.name: tensor.copied for tensor in recipe.tensors}
    assert copied["classifier.weight"] == "new: not in the checkpoint"
    assert copied["encoder.layer.0.attention.self.query.weight"] is None
    perturb_checkpoint(source, tmp_path / "out", seed=7)
    assert differing(auto.BertModel.from_pretrained(tmp_path / "out"), live.bert) == set()


def test_perturb_model_reports_a_resized_embedding(tmp_path: Path) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    live = auto.BertModel.from_pretrained(source)
    live.resize_token_embeddings(105)
    recipe = perturb_model(live, seed=7)
    assert recipe.notes[0].startswith(
        "1 tensors (embeddings.word_embeddings.weight) have no counterpart of their shape"
    )


def test_perturb_model_reports_a_model_loaded_in_another_dtype(tmp_path: Path) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    recipe = perturb_model(auto.BertModel.from_pretrained(source, dtype=torch.bfloat16))
    assert recipe.notes[0].endswith(f"have another dtype than in {source}: the same noise, rounded otherwise")


class Task(torch.nn.Module):
    """A module of one's own around a pretrained model, with a head of its own."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(32, 2)


class Base(torch.nn.Module):
    """Shaped like a layer that PEFT wraps: the base layer under base_layer, the adapter beside it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(32, 4, bias=False)})


def in_peft(model: Any) -> Any:
    for layer in model.encoder.layer:
        layer.attention.self.query = Base(layer.attention.self.query)
    return torch.nn.ModuleDict({"base_model": torch.nn.ModuleDict({"model": model})})


def in_compiled_layers(model: Any) -> Any:
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compile": partial(torch.compile, backend="eager"),
    "compiled-layers": in_compiled_layers,
    "data-parallel": torch.nn.DataParallel,
    "own-module": Task,
    "peft": in_peft,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_perturb_model_sees_through_wrappers(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    perturb_checkpoint(source, tmp_path / "out", seed=7)
    written = load_file(tmp_path / "out" / "model.safetensors")
    live = auto.BertModel.from_pretrained(source)
    parameters = dict(live.named_parameters())
    wrapped = wrap(live)
    recipe = perturb_model(wrapped, seed=7)
    assert all(torch.equal(parameter, written[name]) for name, parameter in parameters.items())
    new = {tensor.name for tensor in recipe.tensors if tensor.copied == "new: not in the checkpoint"}
    assert new == {name for name, _ in wrapped.named_parameters() if "head" in name or "lora_A" in name}
    assert recipe.notes == ()


def test_perturb_model_perturbs_both_parts_of_a_two_tower_model(tmp_path: Path) -> None:
    sources = [save(make(auto.BertModel, BERT), tmp_path / "a"), save(make(auto.T5EncoderModel, T5), tmp_path / "b")]
    kinds = [auto.BertModel, auto.T5EncoderModel]
    towers = torch.nn.ModuleList([kind.from_pretrained(source) for kind, source in zip(kinds, sources, strict=True)])
    recipe = perturb_model(towers, seed=7)
    assert recipe.source == f"{sources[0]}, {sources[1]}"
    for kind, source, tower in zip(kinds, sources, towers, strict=True):
        perturb_checkpoint(source, tmp_path / "out" / source.name, seed=7)
        assert differing(kind.from_pretrained(tmp_path / "out" / source.name), tower) == set()
    with pytest.raises(SourceError, match=r"source: expected a model with one pretrained part, got 2 \(0, 1\)"):
        perturb_model(towers, source=sources[0])


def test_perturb_model_without_a_checkpoint_uses_live_names() -> None:
    recipe = perturb_model(make(auto.BertModel, BERT))
    assert recipe.notes == ("no checkpoint found for BertModel: the names in the model were used",)
    assert recipe.source == "BertModel"
    recipe = perturb_model(torch.nn.DataParallel(torch.nn.Linear(4, 4)))
    assert recipe.notes == ("no checkpoint found for Linear: the names in the model were used",)
    assert [tensor.name for tensor in recipe.tensors] == ["weight", "bias"]


def test_perturb_model_takes_names_from_the_source_given(tmp_path: Path) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    perturb_checkpoint(source, tmp_path / "out", seed=7)
    live = make(auto.BertForMaskedLM, BERT)
    live.bert.load_state_dict(load_file(source / "model.safetensors"), strict=False)
    perturb_model(live, seed=7, source=source)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(live.bert.encoder.layer[0].output.dense.weight, written["encoder.layer.0.output.dense.weight"])


def test_perturb_model_takes_names_from_a_file_for_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    live = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    kept = {name: tensor for name, tensor in live.state_dict().items() if name.startswith("0.")}
    save_file(kept, tmp_path / "half.safetensors")
    perturb_checkpoint(tmp_path / "half.safetensors", tmp_path / "out", seed=7)
    recipe = perturb_model(live, seed=7, source=tmp_path / "half.safetensors")
    assert torch.equal(live[0].weight, load_file(tmp_path / "out" / "half.safetensors")["0.weight"])
    assert [tensor.copied for tensor in recipe.tensors] == [
        None,
        None,
        "new: not in the checkpoint",
        "new: not in the checkpoint",
    ]


def test_perturb_model_refuses_a_source_of_another_model(tmp_path: Path) -> None:
    source = save(make(auto.T5EncoderModel, T5), tmp_path / "in")
    with pytest.raises(
        SourceError, match=r"^source: expected names of BertModel, got none in .*in. Name the checkpoint"
    ):
        perturb_model(make(auto.BertModel, BERT), source=source)


def test_perturb_model_reads_the_hubs_cache_and_not_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(make(auto.BertModel, BERT), tmp_path / "in")
    sha = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--us--tiny"
    (repo / "snapshots").mkdir(parents=True)
    source.rename(repo / "snapshots" / sha)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was used"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    live = auto.BertModel.from_pretrained(repo / "snapshots" / sha)
    live.config._name_or_path = "us/tiny"
    recipe = perturb_model(live)
    assert (recipe.source, recipe.commit, recipe.notes) == ("us/tiny", sha, ())
    live.config._name_or_path = "us/absent"
    notes = perturb_model(live, again=True).notes
    assert notes == ("no checkpoint found for BertModel: the names in the model were used",)


def test_perturb_model_reads_sharded_names(tmp_path: Path) -> None:
    model = make(auto.BertModel, BERT)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    index = json.loads((tmp_path / "in" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    expected, live, recipe = perturb_both(tmp_path / "in", auto.BertModel, tmp_path / "out")
    assert differing(expected, live) == set()
    assert recipe.notes == ()
