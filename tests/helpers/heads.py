"""A tiny seeded model of transformers for each kind of head, with its batch and R-Drop's divergence written out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(5, 40, (4, 8), generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 3, (4, 8), generator=torch.Generator().manual_seed(1))
TOKENS[0, :3] = -100
ROWS = TOKENS[:, -1]
MASK = torch.ones_like(IDS)
MASK[1, -2:] = 0


@dataclass(frozen=True)
class Head:
    """A model in float64 and training mode, a batch, and S of the outputs of two passes, reduced as the head's loss."""

    make: Callable[[], Any]
    batch: dict[str, Any]
    divergence: Callable[[Any, Any], torch.Tensor]

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().double().train()


def symmetric_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1/2 [KL(p||q) + KL(q||p)] over the last dimension, as the paper's eq. 2 has it."""
    p, q = a.softmax(-1), b.softmax(-1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2


def bernoulli_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return symmetric_kl(torch.stack([a, 0 * a], -1), torch.stack([b, 0 * b], -1))


def _rows(a: Any, b: Any) -> torch.Tensor:
    return symmetric_kl(a.logits, b.logits).mean()


def _tokens(a: Any, b: Any) -> torch.Tensor:
    return symmetric_kl(a.logits, b.logits)[TOKENS != -100].mean()


def _shifted(a: Any, b: Any) -> torch.Tensor:
    # transformers makes the loss of a causal LM in float32
    return symmetric_kl(a.logits[:, :-1].float(), b.logits[:, :-1].float())[TOKENS[:, 1:] != -100]


def _span(a: Any, b: Any) -> torch.Tensor:
    starts, ends = symmetric_kl(a.start_logits, b.start_logits), symmetric_kl(a.end_logits, b.end_logits)
    return (starts[:3].mean() + ends.mean()) / 2  # the last start is out of the context: ignored


def _bert(kind: Any, **config: Any) -> Callable[[], Any]:
    return lambda: kind(BertConfig(**SIZES, vocab_size=40, max_position_embeddings=16, **config))


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=40, attention_dropout=0.2))


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, loss_type="ForCausalLM", eos_token_id=0
        )
    )


def _t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=40, decoder_start_token_id=0)
    )


def _bart(**config: Any) -> Any:
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
    return BartForConditionalGeneration(BartConfig(**sizes, **widths, max_position_embeddings=16, **config))


def _vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3, hidden_dropout_prob=0.1)
    )


_TEXT = {"input_ids": IDS, "attention_mask": MASK}
HEADS = {
    "single-label": Head(_bert(BertForSequenceClassification, num_labels=3), {**_TEXT, "labels": ROWS}, _rows),
    "multi-label": Head(
        _bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        {**_TEXT, "labels": F.one_hot(ROWS, 3).double()},
        lambda a, b: bernoulli_kl(a.logits, b.logits).mean(),
    ),
    "regression": Head(
        _bert(BertForSequenceClassification, num_labels=1),
        {**_TEXT, "labels": ROWS.double()},
        lambda a, b: ((a.logits - b.logits) ** 2).mean(),
    ),
    "token": Head(_bert(BertForTokenClassification, num_labels=3), {**_TEXT, "labels": TOKENS}, _tokens),
    "choice": Head(
        _bert(BertForMultipleChoice), {"input_ids": IDS.view(2, 2, 8), "labels": torch.tensor([0, 1])}, _rows
    ),
    "question": Head(
        _bert(BertForQuestionAnswering),
        {**_TEXT, "start_positions": torch.tensor([0, 1, 2, 50]), "end_positions": torch.tensor([1, 2, 3, 3])},
        _span,
    ),
    "masked-lm": Head(_bert(BertForMaskedLM), {**_TEXT, "labels": TOKENS}, _tokens),
    "gpt2": Head(_gpt2, {**_TEXT, "labels": TOKENS}, lambda a, b: _shifted(a, b).mean()),
    "llama": Head(_llama, {**_TEXT, "labels": TOKENS}, lambda a, b: _shifted(a, b).mean()),
    "llama-items": Head(
        _llama,
        {**_TEXT, "labels": TOKENS, "num_items_in_batch": torch.tensor(77)},
        lambda a, b: _shifted(a, b).sum() / 77,
    ),
    "t5": Head(_t5, {**_TEXT, "labels": TOKENS}, _tokens),
    "bart": Head(_bart, {**_TEXT, "labels": TOKENS}, _tokens),
    "vit": Head(
        _vit,
        {
            "pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double(),
            "labels": ROWS,
        },
        _rows,
    ),
}
CAUSAL = {"gpt2", "llama", "llama-items"}


def grads_of(model: Any) -> dict[str, torch.Tensor]:
    """Take the gradients off a model."""
    grads = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return grads
