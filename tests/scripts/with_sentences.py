"""Train sentence embeddings with sentence-transformers' fit, as its example for natural language inference."""

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
    couples = zip(texts[::2], texts[1::2], strict=True)
    return [InputExample(texts=list(couple), label=number % 3) for number, couple in enumerate(couples)]


def build(source):
    torch.manual_seed(0)
    model = SentenceTransformer(source, device="cpu")
    return model.double(), losses.SoftmaxLoss(model, 32, 3).double()


def main(source, out):
    model, loss = build(source)
    model.old_fit(
        [(SeededLoader(pairs(), batch_size=4, shuffle=False), loss)],
        epochs=1,
        scheduler="constantlr",
        optimizer_params={"lr": 1e-3},
        weight_decay=0.0,
        max_grad_norm=1e9,
        show_progress_bar=False,
    )
    torch.save(loss.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
