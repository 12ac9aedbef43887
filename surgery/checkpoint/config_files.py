"""What the config.json beside weights says of them: whether they are quantized, and whether embeddings are tied."""

import json
from pathlib import PurePosixPath
from typing import Any

from surgery.checkpoint.resolve import Checkpoint
from surgery.errors import SourceError
from surgery.files import read_file

DEQUANTIZED = ("fp8", "mxfp4")
"""Methods of quantization whose weights can be read as bfloat16."""


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config says that its weights are quantized, unless they are to be dequantized.

    Raises:
        SourceError: it does, or it is no JSON.
    """
    for config, settings in quantized(checkpoint).items():
        method = settings["quant_method"]
        if method not in DEQUANTIZED or not checkpoint.dequantize:
            advice = "Perturb the original checkpoint and quantize the result"
            advice += ", or have bfloat16 written with `dequantize`." if method in DEQUANTIZED else "."
            raise SourceError(
                f"{checkpoint.label(config)}: expected unquantized weights, got quantization_config ({method}). "
                f"{advice}"
            )


def quantized(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the quantization_config by config file, of each folder with weights whose config has one.

    Each has a quant_method.
    """
    found = {}
    for folder in sorted({weight_set.folder for weight_set in checkpoint.layout.weights}):
        name = _config_of(folder)
        if checkpoint.path(name).is_file() and (settings := _quantization_of(_read_json(checkpoint, name))):
            found[name] = settings
    return found


def block_size(checkpoint: Checkpoint, folder: str) -> tuple[int, int] | None:
    """Return rows and columns of the blocks that share a scale, if the config of a folder with weights says so."""
    size: Any = quantized(checkpoint).get(_config_of(folder), {}).get("weight_block_size")
    is_pair = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    return (size[0], size[1]) if is_pair else None


def without_quantization(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the configs that say that weights are quantized, by name, as they are without that."""
    plain = {}
    for name in quantized(checkpoint):
        config = _read_json(checkpoint, name)
        for part in [config, *config.values()]:
            if isinstance(part, dict):
                part.pop("quantization_config", None)
        plain[name] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return plain


def is_untied(checkpoint: Checkpoint, folder: str) -> bool:
    """Tell whether the config of a folder with weights says that output embeddings are not tied to the input's."""
    config = checkpoint.path(_config_of(folder))
    loaded = json.loads(read_file(config)) if config.is_file() else None
    parts = [loaded, *loaded.values()] if isinstance(loaded, dict) else []
    return any(isinstance(part, dict) and part.get("tie_word_embeddings") is False for part in parts)


def _config_of(folder: str) -> str:
    return (PurePosixPath(folder) / "config.json").as_posix()


def _read_json(checkpoint: Checkpoint, config: str) -> Any:
    try:
        return json.loads(read_file(checkpoint.path(config)))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{checkpoint.label(config)}: expected JSON, got another or a damaged file. Repair it."
        ) from error


def _quantization_of(config: Any) -> dict[str, Any] | None:
    nested = [config, *config.values()] if isinstance(config, dict) else []
    for part in nested:
        if isinstance(part, dict) and (settings := part.get("quantization_config")):
            settings = settings if isinstance(settings, dict) else {}
            return settings | {"quant_method": str(settings.get("quant_method", "quantized"))}
    return None
