"""What the config.json beside weights says of them: whether they are quantized, and whether embeddings are tied."""

import json
from pathlib import PurePosixPath

from surgery.checkpoint.resolve import Checkpoint
from surgery.errors import SourceError
from surgery.files import read_file


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config says that its weights are quantized.

    Raises:
        SourceError: it does, or it is no JSON.
    """
    for config, method in quantized(checkpoint).items():
        raise SourceError(
            f"{checkpoint.label(config)}: expected unquantized weights, got quantization_config ({method}). "
            "Perturb the original checkpoint and quantize the result."
        )


def quantized(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the method of quantization by config file, of each folder with weights whose config names one."""
    methods = {}
    for folder in sorted({weight_set.folder for weight_set in checkpoint.layout.weights}):
        name = (PurePosixPath(folder) / "config.json").as_posix()
        if checkpoint.path(name).is_file() and (method := _quantization_of(checkpoint, name)):
            methods[name] = method
    return methods


def is_untied(checkpoint: Checkpoint, folder: str) -> bool:
    """Tell whether the config of a folder with weights says that output embeddings are not tied to the input's."""
    config = checkpoint.path((PurePosixPath(folder) / "config.json").as_posix())
    loaded = json.loads(read_file(config)) if config.is_file() else None
    parts = [loaded, *loaded.values()] if isinstance(loaded, dict) else []
    return any(isinstance(part, dict) and part.get("tie_word_embeddings") is False for part in parts)


def _quantization_of(checkpoint: Checkpoint, config: str) -> str | None:
    try:
        loaded = json.loads(read_file(checkpoint.path(config)))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{checkpoint.label(config)}: expected JSON, got another or a damaged file. Repair it."
        ) from error
    nested = [loaded, *loaded.values()] if isinstance(loaded, dict) else []
    for part in nested:
        if isinstance(part, dict) and (settings := part.get("quantization_config")):
            return str(settings.get("quant_method", "quantized")) if isinstance(settings, dict) else "quantized"
    return None
