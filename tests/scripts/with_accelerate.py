"""Fine-tune a classifier in a loop with accelerate, with its gradient accumulation, and go on where it was left."""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--resume")
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(options.source, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (20, 8), generator=generator)
    labels = torch.randint(2, (20,), generator=generator)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    first = 0
    if options.resume:
        accelerator.load_state(options.resume)
        first = 3
    model.train()
    for number, batch in enumerate(loader):
        if number // 2 < first:
            continue
        if number % 2 == 0:
            torch.manual_seed(100 + number // 2)
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if number == 5:
            accelerator.save_state(f"{options.out}/checkpoint")
    torch.save(accelerator.unwrap_model(model).state_dict(), f"{options.out}/final.pt")


if __name__ == "__main__":
    main()
