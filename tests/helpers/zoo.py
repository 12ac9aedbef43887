"""Every model type of the installed transformers, built on the meta device from its default config, made shallow."""

import contextlib
import gc
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from surgery.checkpoint.described_class import build as build_on_meta
from surgery.checkpoint.described_class import quiet

_DEPTH = re.compile(
    r"num_hidden_layers|num_layers|n_layers?|n_layer|(?:\w+_)?(?:encoder|decoder|text|vision|audio|hidden)_layers|"
    r"num_(?:encoder|decoder|vision|text|local|global|entity|cross)\w*_layers|depth|num_blocks"
)


_NEEDED: dict[str, dict[str, Any]] = {
    **{kind: {"prediction_length": 24} for kind in ("autoformer", "informer", "time_series_transformer")},
    **{kind: {"head_dim": 64} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    "beit": {"out_indices": [3, 5, 7, 11]},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
}
"""What a model type's default config leaves open."""


def model_types() -> list[str]:
    """Name every model type that transformers knows a config of."""
    return list(CONFIG_MAPPING_NAMES)


def classes_of(model_type: str) -> list[str]:
    """Name the base class of a model type and its head classes, as the Auto classes know them."""
    found: dict[str, None] = {}
    for mapping in _MAPPINGS:
        entry = mapping.get(model_type, ())
        found |= dict.fromkeys([entry] if isinstance(entry, str) else entry)
    return list(found)


def _mappings() -> list[dict[str, Any]]:
    names = [n for n in dir(modeling_auto) if re.fullmatch(r"MODEL\w*_MAPPING_NAMES", n)]
    return [modeling_auto.MODEL_MAPPING_NAMES, *(getattr(modeling_auto, name) for name in sorted(names))]


_MAPPINGS = _mappings()


def make_config(model_type: str, *, layers: int | None = 2, backbone: str | None = None) -> Any:
    """Make the default config of a model type, with few layers in it and in the configs that it holds.

    Args:
        layers: how many to keep at most; None: all.
        backbone: model type of the backbone, in place of a default that takes a package which is not installed.
    """
    options = dict(_NEEDED.get(model_type, {}))
    if backbone:
        options |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        options["backbone_config"] = CONFIG_MAPPING[backbone](out_features=["stage1", "stage2", "stage3", "stage4"])
    with quiet():
        config = CONFIG_MAPPING[model_type](**options)
    for part in _parts(config):
        part.tie_word_embeddings = True  # for the class to name what it can tie
        if layers:
            _make_shallow(part, layers)
    return config


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            yield from _parts(value)


def _make_shallow(config: Any, layers: int) -> None:
    depths: set[int] = set()
    if isinstance(getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = min(config.first_k_dense_replace, layers - 1)
    for name, value in list(vars(config).items()):
        if _DEPTH.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool) and value > layers:
            with contextlib.suppress(Exception):
                setattr(config, name, layers)
                depths.add(value)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in depths and name.endswith("_types"):
            setattr(config, name, value[:layers])


def build(class_name: str, config: Any) -> Any:
    """Build a model without memory for its weights."""
    kind = getattr(transformers, class_name)
    own = [part for part in _parts(config) if isinstance(part, kind.config_class or object)]
    return build_on_meta(kind, own[0] if own else config)  # a text model takes its own part of a config of several


def build_all(model_type: str, *, layers: int | None = 2) -> Iterator[tuple[str, Any]]:
    """Yield each class of a model type with its model, or with the error that kept it from being built."""
    for class_name in classes_of(model_type):
        try:
            yield class_name, build_one(model_type, class_name, layers=layers)
        except Exception as error:  # whatever a model's own code raises
            yield class_name, error
    gc.collect()


def build_one(model_type: str, class_name: str, *, layers: int | None = 2) -> Any:
    """Build one class, shallow; or, where its config does not allow that, as deep as it is by default."""
    tries: list[dict[str, Any]] = [{"layers": layers}, {"layers": None}, {"layers": None, "backbone": "resnet"}]
    for number, options in enumerate(tries, 1):
        try:
            return build(class_name, make_config(model_type, **options))
        except Exception:
            if number == len(tries):
                raise
    return None


def nested_types(model_type: str) -> set[str]:
    """Name the model types of a type's default config and of the configs in it."""
    with quiet():
        return {part.model_type for part in _parts(CONFIG_MAPPING[model_type]()) if part.model_type}


def is_tied_by_default(model_type: str) -> bool:
    """Tell whether a config that says nothing of it has tied weights."""
    with quiet():
        return bool(getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", False))
