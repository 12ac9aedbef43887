"""Weights that weight_norm or parametrize computes at each call, such as the positional convolution of wav2vec2."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel

from surgery import describe, patch_model, perturb_checkpoint, perturb_model, unpatch_model
from surgery.errors import SettingError

_REASON = "part of a weight that parametrize or weight_norm computes anew at each call"
_CONV = "encoder.pos_conv_embed.conv"
_PARTS = [f"{_CONV}.parametrizations.weight.original{i}" for i in (0, 1)]
_PROJECTION = "encoder.layers.0.attention.v_proj.weight"
_TINY: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0,
}  # fmt: skip
_MODELS = {
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config),
    "hubert": (HubertModel, HubertConfig),
    "wavlm": (WavLMModel, WavLMConfig),
}

speech = pytest.mark.parametrize(("kind", "config"), _MODELS.values(), ids=_MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def _make(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(**_TINY))


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(2, 400)).last_hidden_state[..., 0].sum().backward()
    optimizer.step()


@speech
def test_speech_model_is_mixed_but_for_its_positional_convolution(kind: Any, config: Any) -> None:
    model = _make(kind, config)
    before = {name: (id(w), w.detach().clone()) for name, w in model.named_parameters()}
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    patch_model(model, mixout=0.7)
    described = describe(model)
    assert {name for name, why in (described.left or {}).items() if why == _REASON} == set(_PARTS)
    assert _PROJECTION in described.mixed
    assert f"not mixed    2 ({_REASON}): {_PARTS[0]}, ..." in str(described)
    unpatch_model(model)
    assert all(torch.equal(w, before[name][1]) for name, w in model.named_parameters())
    patch_model(model, mixout=0.7)
    _step(model)
    unpatch_model(model)
    after = dict(model.named_parameters())
    assert {name: id(w) for name, w in after.items()} == {name: then for name, (then, _) in before.items()}
    assert all(not torch.equal(after[name], before[name][1]) for name in (*_PARTS, _PROJECTION))
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == rates


@speech
@pytest.mark.parametrize("parts", [_PARTS, [f"{_CONV}.weight_g", f"{_CONV}.weight_v"]], ids=["new", "old"])
def test_noise_is_that_of_the_file(parts: list[str], kind: Any, config: Any, tmp_path: Path) -> None:
    """Checkpoints on the Hub have weight_norm's old names, which transformers renames."""
    _make(kind, config).save_pretrained(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    names = dict(zip(_PARTS, parts, strict=True))
    save_file({names.get(name, name): w for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    recipe = perturb_checkpoint(tmp_path / "source", tmp_path / "out")
    live = kind.from_pretrained(tmp_path / "source")
    assert perturb_model(live).notes == ()
    weights, state = load_file(tmp_path / "out/model.safetensors"), live.state_dict()
    assert all(torch.equal(weights[names.get(name, name)], w) for name, w in state.items())
    assert {tensor.name: tensor.copied for tensor in recipe.tensors}.items() >= dict.fromkeys(parts).items()


def _identity(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Identity())


_KINDS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "parametrize": (_identity, ["1.parametrizations.weight.original"]),
    "weight-norm": (parametrizations.weight_norm, [f"1.parametrizations.weight.original{i}" for i in (0, 1)]),
    "old-weight-norm": (nn.utils.weight_norm, ["1.weight_g", "1.weight_v"]),
}


@pytest.mark.parametrize(
    "settings", [{"mixout": 0.5}, {"anchor": 0.1}, {"recadam": 0.1}], ids=lambda one: next(iter(one))
)
@pytest.mark.parametrize(("change", "parts"), _KINDS.values(), ids=_KINDS)
def test_parametrized_layer_is_left_to_methods_on_parameters(
    change: Callable[[Any], Any], parts: list[str], settings: dict[str, float]
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 4, 1))
    change(model[1])
    patch_model(model, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 3, 3)).sum().backward()
    optimizer.step()
    told = str(describe(model))
    assert (_REASON in told) == ("recadam" not in settings)
    assert (parts[0] in told) == ("recadam" not in settings)
    unpatch_model(model)


@pytest.mark.parametrize("settings", [{"mixout": 0.5}, {"anchor": 0.1}], ids=lambda one: next(iter(one)))
@pytest.mark.parametrize(("change", "parts"), _KINDS.values(), ids=_KINDS)
def test_parametrized_layers_alone_are_refused(
    change: Callable[[Any], Any], parts: list[str], settings: dict[str, float]
) -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv1d(3, 4, 1, bias=False))
    change(model[1])
    message = (
        f"model: expected a trainable weight to mix, got none ({len(parts)} {_REASON}). "
        "Take recadam, which acts on all kinds of weights."
    )
    with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
        patch_model(model, **settings)
