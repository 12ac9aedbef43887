"""Tiny models of transformers with seeded weights, and all that patch_model could change in a model."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

VOCAB = 60


def bert(kind: type[Any] = BertForSequenceClassification, *, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48}
    return kind(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes, **config))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))


def bert_folder(path: Path, *, seed: int = 1, **save: Any) -> Path:
    """A checkpoint of the base model only: no `bert.` before its names, and no classifier."""
    bert(BertModel, seed=seed).save_pretrained(path, **save)
    return path


def batch(rows: int = 4, *, labels: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, 8), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(labels, (rows,), generator=generator)}


def w_pre_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The pretrained values that the model is mixed with, by the weight's first name."""
    sites = model.__dict__["_surgery_patch"].weights.of("layers")
    return {site.name: site.values for site in sites if site.values is not None}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that patch_model touches, and what it must not: equal if nothing has changed."""
    modules = {path: _of_module(module) for path, module in model.named_modules()}
    tensors = {n: (id(p), p.requires_grad, p.detach().clone().numpy().tobytes()) for n, p in model.named_parameters()}
    return {"modules": modules, "tensors": tensors}


def _of_module(module: nn.Module) -> Any:
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    hooks = {name: list(value) for name, value in vars(module).items() if "hooks" in name and hasattr(value, "keys")}
    return type(module), plain, hooks, sorted(vars(module))


def reload(model: PreTrainedModel, path: Path) -> Any:
    """Write the model, and load it as from_pretrained does."""
    model.save_pretrained(path)
    return type(model).from_pretrained(path)
