"""What each tensor of a checkpoint is: from the class that config.json names, by rules on names, from its last name."""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath

from surgery.checkpoint.buffer_rules import role_by_rules
from surgery.checkpoint.model_types import ModelType, find_model_type
from surgery.checkpoint.resolve import Checkpoint
from surgery.files import read_file
from surgery.roles import CLASS, NAME, Role


def find_roles(shapes: Mapping[str, Sequence[int]], model_type: ModelType | None = None) -> dict[str, Role]:
    """Say of each tensor of one model what it is, by name.

    Args:
        shapes: of all tensors of the model.
        model_type: what is known of the model's class, if it is known.
    """
    return {name: _role(name, shape, shapes.keys(), model_type) for name, shape in shapes.items()}


def _role(name: str, shape: Sequence[int], names: Collection[str], model_type: ModelType | None) -> Role:
    if model_type and (is_buffer := model_type.is_buffer(name)) is not None:
        return Role(is_buffer, CLASS)
    role = role_by_rules(name, shape, names)
    # a parameter that no name speaks against: the class, whose buffers are all known, confirms it
    return Role(False, CLASS) if model_type and role == Role(False, NAME) else role


def read_model_type(checkpoint: Checkpoint, folder: str) -> ModelType | None:
    """Return what is known of the class that a folder's config.json names; None if nothing, or there is none.

    It is looked up in the table of model types; one that the table lacks is built, where transformers knows it.
    """
    path = checkpoint.path((PurePosixPath(folder) / "config.json").as_posix())
    try:
        text = read_file(path)
        config = json.loads(text)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return find_model_type(config) or (_build(text) if isinstance(config.get("model_type"), str) else None)


@cache
def _build(config: bytes) -> ModelType | None:
    from surgery.checkpoint.described_class import build_model_type  # takes transformers

    return build_model_type(json.loads(config))
