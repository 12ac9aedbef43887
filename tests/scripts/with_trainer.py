"""Fine-tune a classifier with transformers' Trainer."""

import argparse

import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments


class Rows(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 60, (20, 8), generator=generator)
        labels = torch.randint(2, (20,), generator=generator)
        for row, label in zip(ids, labels, strict=True):
            yield {"input_ids": row, "labels": label}


class SeedEachStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(100 + state.global_step)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--resume")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(options.source, dtype=torch.float64)
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=5,
        per_device_train_batch_size=4,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[SeedEachStep()])
    trainer.train(resume_from_checkpoint=options.resume)
    torch.save(model.state_dict(), f"{options.out}/final.pt")


if __name__ == "__main__":
    main()
