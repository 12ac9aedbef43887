"""Train sentence embeddings with sentence-transformers' fit."""

import sys

import torch
from sentence_transformers import InputExample, SentenceTransformer, losses
from torch.utils.data import DataLoader

WORDS = "one two three four five six seven eight nine ten".split()


class SeededLoader(DataLoader):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            torch.manual_seed(100 + number)
            yield batch


def pairs():
    texts = [" ".join(WORDS[(start + step) % 10] for step in range(4)) for start in range(40)]
    return [InputExample(texts=[first, second]) for first, second in zip(texts[::2], texts[1::2], strict=True)]


def main(source, out):
    model = SentenceTransformer(source, device="cpu").double()
    loader = SeededLoader(pairs(), batch_size=4, shuffle=False)
    model.old_fit(
        [(loader, losses.MultipleNegativesRankingLoss(model))],
        epochs=1,
        scheduler="constantlr",
        optimizer_params={"lr": 1e-3},
        weight_decay=0.0,
        max_grad_norm=1e9,
        show_progress_bar=False,
    )
    torch.save(model.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
