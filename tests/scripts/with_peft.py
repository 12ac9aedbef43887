"""Train LoRA adapters, alone or with the base unfrozen."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification


def main(way, source, out):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64)
    dropout = 0.2 if way == "lora" else 0.0
    config = LoraConfig(
        r=2,
        target_modules=["query", "value"],
        lora_dropout=dropout,
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(base, config)
    if way == "full":
        model.requires_grad_(True)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (20, 8), generator=generator)
    labels = torch.randint(2, (20,), generator=generator)
    model.train()
    for number, (x, y) in enumerate(zip(ids.split(4), labels.split(4), strict=True)):
        torch.manual_seed(100 + number)
        model(input_ids=x, labels=y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
