"""Fine-tune a pretrained encoder on a task of GLUE, as many scripts do: AdamW, warm-up, clipping, a score at the end.

The data are read from a folder as the tasks' authors publish them, or from a dataset on the Hub.
"""

import argparse
import csv
import json
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

COLUMNS = {  # of the files: first sentence, second sentence, label
    "cola": ("CoLA/train.tsv", "CoLA/dev.tsv", 3, None, 1),
    "rte": ("RTE/train.tsv", "RTE/dev.tsv", 1, 2, 3),
    "mrpc": ("MRPC/msr_train.txt", "MRPC/msr_test.txt", 3, 4, 0),
    "stsb": ("STS-B/train.csv", "STS-B/dev.csv", 0, 1, 2),
}
LABELS = {"entailment": 0, "not_entailment": 1}


def read_table(path):
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            rows = list(csv.reader(file))
        else:  # Microsoft's files have quotes around sentences, and in those of the test set tabs in place of commas
            quoting = csv.QUOTE_MINIMAL if path.suffix == ".txt" else csv.QUOTE_NONE
            rows = list(csv.reader(file, "excel-tab", quoting=quoting))
    has_header = rows[0][0] in ("index", "Quality", "\ufeffQuality")
    return [[cell.replace("\t", ",") for cell in row] for row in rows[has_header:]]


def read_examples(task, data):
    train, dev, first, second, label = COLUMNS[task]
    if Path(data).is_dir():
        splits = [read_table(Path(data) / name) for name in (train, dev)]
        return [[(row[first], second and row[second], as_label(row[label])) for row in split] for split in splits]
    from datasets import load_dataset

    found = load_dataset(data, task)
    first, second = {"cola": ("sentence", None)}.get(task, ("sentence1", "sentence2"))
    return [
        [(row[first], second and row[second], row["label"]) for row in found[split]]
        for split in ("train", "validation")
    ]


def as_label(text):
    return LABELS[text] if text in LABELS else float(text)


def collate(tokenizer, max_length, device):
    def function(rows):
        first, second, labels = zip(*rows, strict=True)
        batch = tokenizer(
            list(first),
            None if second[0] is None else list(second),
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        return batch.to(device), torch.tensor(labels, device=device)

    return function


def ranks(values):
    """Return ranks, those of ties averaged."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def score(task, logits, labels):
    """Return the metric that the task is judged by."""
    if task == "stsb":
        pair = torch.stack([ranks(logits[:, 0]), ranks(labels)])
        return {"eval_spearman": torch.corrcoef(pair)[0, 1].item()}
    truth, guess = labels.long(), logits.argmax(1)
    tp, tn, fp, fn = (((guess == g) & (truth == t)).sum().item() for g, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
    accuracy = (tp + tn) / len(truth)
    if task == "cola":
        below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return {"eval_matthews": (tp * tn - fp * fn) / below if below else 0.0, "eval_accuracy": accuracy}
    if task == "mrpc":
        return {"eval_f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0, "eval_accuracy": accuracy}
    return {"eval_accuracy": accuracy}


@torch.no_grad()
def evaluate(task, model, batches):
    model.eval()
    logits, labels = zip(*((model(**batch).logits, labels) for batch, labels in batches), strict=True)
    return score(task, torch.cat(logits).double(), torch.cat(labels).double())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a folder, or nyu-mll/glue")
    parser.add_argument("--task", choices=COLUMNS, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_size", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
    options = parser.parse_args()

    train, dev = read_examples(options.task, options.data)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: options.train_size].tolist()
    train = [train[i] for i in chosen]  # the same examples for every seed

    torch.manual_seed(options.seed)
    outputs = 1 if options.task == "stsb" else 2
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=outputs).to(device)
    with_padding = collate(tokenizer, options.max_length, device)
    batches = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, collate_fn=with_padding)
    dev.sort(key=lambda row: len(row[0]) + len(row[1] or ""))
    dev_batches = DataLoader(dev, 64, collate_fn=with_padding)

    decayed = [w for name, w in model.named_parameters() if w.ndim > 1 and "LayerNorm" not in name]
    others = [w for name, w in model.named_parameters() if w.ndim <= 1 or "LayerNorm" in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.bf16)
    total = options.epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, total // 10, total)
    for epoch in range(options.epochs):
        model.train()
        for batch, labels in batches:
            with autocast:
                logits = model(**batch).logits.float()
            if options.task == "stsb":
                loss = torch.nn.functional.mse_loss(logits[:, 0], labels.float())
            else:
                loss = torch.nn.functional.cross_entropy(logits, labels.long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)

    with autocast:
        found = evaluate(options.task, model, dev_batches)
    print(" ".join(f"{name}={value:.6f}" for name, value in found.items()))
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(options.output_dir) / "eval_results.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
