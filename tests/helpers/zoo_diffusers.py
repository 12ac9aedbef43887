"""Every model class of the installed diffusers, built on the meta device from its default config."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from surgery.checkpoint.described_class import quiet


def classes() -> Iterator[tuple[str, Any]]:
    """Yield the models that diffusers exports, by the `_class_name` of their config."""
    with quiet():
        from diffusers import ModelMixin, models

        for name in sorted(dir(models)):
            kind = getattr(models, name)
            if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind is not ModelMixin:
                yield name, kind


def build(kind: Any) -> Any:
    """Build a model without memory for its weights."""
    with quiet(), torch.device("meta"):
        return kind()
