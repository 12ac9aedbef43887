"""Tied weights that a file stores twice, as merged FSDP and ZeRO checkpoints do, get one noise."""

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from checkpoints import write_json  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from surgery import (  # noqa: E402
    Recipe,
    inspect_checkpoint,
    materialize_checkpoint,
    perturb_checkpoint,
    perturb_model,
    perturb_state_dict,
    verify_checkpoint,
)
from surgery.checkpoint import pickles  # noqa: E402
from surgery.errors import SettingError  # noqa: E402
from surgery.perturb import ties  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_AUDIO = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64,
            d_model=16,
            num_mel_bins=8,
            decoder_start_token_id=1,
            pad_token_id=0,
            **_AUDIO,
        )
    ),
    "xlnet": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=32)
    ),
    "ctrl": lambda: transformers.CTRLLMHeadModel(
        transformers.CTRLConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, dff=32, n_positions=32)
    ),
}


def stored_twice(model: Any, folder: Path, *, config: bool = True) -> list[list[str]]:
    """Save a model with each of its names written; return the names of each tensor that has several."""
    if config:
        model.save_pretrained(folder)
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MODELS)
def test_model_stays_tied_and_gets_the_bits_of_perturb_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    groups = stored_twice(model, tmp_path / "source")
    assert groups
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    for group in groups:
        assert all(torch.equal(after[group[0]], after[other]) for other in group[1:])
    assert set(recipe.files[0].tied) >= {n for g in groups for n in g if n.endswith("weight")} - {g[0] for g in groups}
    loaded = type(model).from_pretrained(tmp_path / "out")
    live = type(model).from_pretrained(tmp_path / "source")
    perturb_model(live)
    assert are_equal(live.state_dict(), loaded.state_dict())
    assert are_equal(live.state_dict(), after)


@pytest.mark.parametrize(("name", "left_out"), [("distilbert", "vocab_projector.weight"), ("xlnet", "lm_loss.weight")])
def test_noise_is_that_of_the_name_which_transformers_keeps(name: str, left_out: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    stored_twice(model, tmp_path / "twice")
    model.save_pretrained(tmp_path / "once")
    for folder in ("twice", "once"):
        perturb_checkpoint(tmp_path / folder, tmp_path / f"{folder}-out")
    twice, once = (load_file(tmp_path / f"{folder}-out/model.safetensors") for folder in ("twice", "once"))
    assert twice.keys() - once.keys() == {left_out}
    assert are_equal({one: twice[one] for one in once}, once)


def test_equal_tensors_of_an_unknown_class_are_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    big, odd = torch.randn(32, 16), torch.randn(32, 16)
    apart = big.clone()
    apart[15, 9] += 1  # where no sample is taken
    tensors = {"b.table": big, "a.head": big.clone(), "c.apart": apart, "d.other": odd, "e.turned": big.T.contiguous()}
    tensors |= {"f.half": big.half(), "g.half": big.half()}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert recipe.files[0].tied == {"b.table": "a.head", "g.half": "f.half"}
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after["b.table"], after["a.head"])
    changes = [after[name] - tensors[name] for name in ("a.head", "c.apart")]
    assert not torch.equal(*changes)
    live = {name: tensor.clone() for name, tensor in tensors.items()}
    assert perturb_state_dict(live).files[0].tied == recipe.files[0].tied
    assert are_equal(live, after)


def test_what_is_equal_by_chance_is_not_tied(tmp_path: Path) -> None:
    """Constants, and what is small."""
    torch.manual_seed(0)
    small, large = torch.randn(255), torch.randn(256)
    tensors = {"ones.a": torch.ones(1024), "ones.b": torch.ones(1024), "small.a": small, "small.b": small.clone()}
    tensors |= {"large.a": large, "large.b": large.clone()}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors")
    assert perturb_checkpoint(tmp_path / "source", tmp_path / "out").files[0].tied == {"large.b": "large.a"}
    assert perturb_state_dict(tensors).files[0].tied == {"large.b": "large.a"}


def test_ties_reach_across_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, w = tmp_path / "source", torch.randn(64, 16)
    source.mkdir()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"x.table": w}, source / shards[0])
    save_file({"y.head": w}, source / shards[1])
    write_json(
        source / "model.safetensors.index.json", {"weight_map": dict(zip(("x.table", "y.head"), shards, strict=True))}
    )
    recipe = perturb_checkpoint(source, tmp_path / "out")
    assert [file.tied for file in recipe.files] == [{}, {"y.head": "x.table"}]
    after = [load_file(tmp_path / "out" / shard) for shard in shards]
    assert torch.equal(after[0]["x.table"], after[1]["y.head"])


def test_only_what_agrees_in_samples_is_read_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    read: list[tuple[str, str]] = []
    pairs = ties._pairs

    def counted(one: Any, other: Any, open_source: Any) -> Any:
        read.append((one.name, other.name))
        return pairs(one, other, open_source)

    monkeypatch.setattr(ties, "_pairs", counted)
    w = torch.randn(64, 16)
    tensors = {f"layer.{i}.w": torch.randn(64, 16) for i in range(9)} | {"a": w, "b": w.clone()}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert read == [("a", "b")]


@pytest.mark.parametrize(("is_tied", "warned"), [(True, True), (False, False)])
def test_weights_that_a_config_ties_and_that_differ_are_named(
    is_tied: bool, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    model.config.tie_word_embeddings = is_tied
    stored_twice(model, tmp_path / "source")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert recipe.files[0].tied == {}
    text = "lm_head.weight and model.embed_tokens.weight: expected equal weights, since the config ties them"
    assert (text in caplog.text) == warned


def test_ties_are_those_of_each_component(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two models of one class, as a pipeline has them: equal names of other sizes are no pair."""
    for seed, name in enumerate(("text_encoder", "text_encoder_2")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**SMALL | {"vocab_size": 64 + seed}, tie_word_embeddings=True)
        stored_twice(transformers.LlamaForCausalLM(config), tmp_path / "source" / name)
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [file.tied for file in recipe.files] == [{"lm_head.weight": "model.embed_tokens.weight"}] * 2
    assert caplog.text == ""


def test_copies_of_a_model_in_one_folder_are_not_called_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "source").mkdir()
    for name in ("one", "other"):
        save_file({"x.w": torch.ones(64, 16).cumsum(0)}, tmp_path / "source" / f"{name}.safetensors")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [file.tied for file in recipe.files] == [{}, {}]
    after = [load_file(tmp_path / "out" / f"{name}.safetensors")["x.w"] for name in ("one", "other")]
    assert torch.equal(*after)


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_half_of_a_tie_cannot_be_excluded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (names,) = stored_twice(MODELS[name](), tmp_path / "source")
    with pytest.raises(SettingError, match=rf"^{names[1]}: expected the same for it and for {names[0]}, to which"):
        perturb_checkpoint(tmp_path / "source", tmp_path / "out", exclude=[names[1]])
    assert not (tmp_path / "out").exists()


def test_buffer_that_repeats_a_parameter_is_no_half_of_a_tie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 16)
    (tmp_path / "source").mkdir()
    save_file({"model.w": w, "model_ema.w": w.clone()}, tmp_path / "source/model.safetensors")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [tensor.name for tensor in recipe.tensors if not tensor.copied] == ["model.w"]
    assert recipe.files[0].tied == {}


def test_recipe_repeats_the_ties_that_it_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older version knew no ties but embeddings by their names."""
    torch.manual_seed(0)
    stored_twice(MODELS["whisper"](), tmp_path / "source")
    with monkeypatch.context() as older:
        older.setattr(ties, "_may_be_tied", lambda *_: False)
        recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "old")
    assert recipe.files[0].tied == {}
    materialize_checkpoint(tmp_path / "old", tmp_path / "again")
    for name in ("model.safetensors", "surgery.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    assert verify_checkpoint(tmp_path / "old").is_equal


def test_recipe_with_a_tie_of_nothing_is_not_believed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored_twice(MODELS["llama"](), tmp_path / "source")
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    path = tmp_path / "out/surgery.json"
    path.write_text(path.read_text().replace('"tied": {', '"tied": {"nothing": "model.norm.weight",'))
    assert "nothing" in Recipe.read(path).files[0].tied
    (fault,) = verify_checkpoint(tmp_path / "out").faults
    assert fault.startswith("surgery.json: model.safetensors: tied: expected {'lm_head.weight': 'model.embed_tokens")


def test_index_may_list_a_name_that_the_class_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["distilbert"]()
    model.save_pretrained(tmp_path / "source", max_shard_size="4KB")
    index = tmp_path / "source/model.safetensors.index.json"
    text = index.read_text()
    assert "vocab_projector.weight" not in text
    shard = next(path.name for path in sorted((tmp_path / "source").glob("model-*.safetensors")))
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{"vocab_projector.weight": "{shard}",'))
    perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out/surgery.json").exists()


def test_inspect_shows_ties_with_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored_twice(MODELS["whisper"](), tmp_path / "source")
    assert inspect_checkpoint(tmp_path / "source").tied == {}
    tied = {"": {"proj_out.weight": "model.decoder.embed_tokens.weight"}}
    assert inspect_checkpoint(tmp_path / "source", stats=True).tied == tied


def test_pickle_keeps_the_name_of_the_input_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["distilbert"]()
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "source/pytorch_model.bin")
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    assert recipe.files[0].tied == {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
    assert are_equal(type(model).from_pretrained(tmp_path / "out").state_dict(), loaded_and_perturbed(model, tmp_path))


def test_recipe_of_a_pickle_keeps_the_names_that_it_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older version kept a name that it did not know before one of an embedding."""
    w = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"embed_tokens.weight": w, "proj_out.weight": w}, tmp_path / "x.bin")
    with monkeypatch.context() as older:
        older.setattr(pickles, "order", lambda name, _: (name == "embed_tokens.weight", 0))
        recipe = perturb_checkpoint(tmp_path / "x.bin", tmp_path / "old")
    assert recipe.files[0].tied == {"embed_tokens.weight": "proj_out.weight"}
    materialize_checkpoint(tmp_path / "old", tmp_path / "again")
    for name in (recipe.files[0].name, "surgery.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    assert verify_checkpoint(tmp_path / "old").is_equal
    assert perturb_checkpoint(tmp_path / "x.bin", tmp_path / "new").files[0].tied == {
        "proj_out.weight": "embed_tokens.weight"
    }


def loaded_and_perturbed(model: Any, tmp_path: Path) -> dict[str, Any]:
    live = type(model).from_pretrained(tmp_path / "source")
    perturb_model(live)
    return dict(live.state_dict())


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
