"""Fine-tune a classifier on two processes with DeepSpeed's ZeRO: with Trainer, with accelerate, or in a loop."""

import argparse

import torch
import torch.distributed as dist
import zero
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

generator = torch.Generator().manual_seed(0)
IDS, LABELS = torch.randint(1, 60, (20, 8), generator=generator), torch.randint(2, (20,), generator=generator)


class Rows(IterableDataset):
    def __iter__(self):
        for row, label in zip(IDS, LABELS, strict=True):
            yield {"input_ids": row, "labels": label}


class SeedEachStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        seed(state.global_step)


def seed(step):
    torch.manual_seed(100 + step + 1000 * dist.get_rank())


def batches():
    for step in range(5):
        here = slice(4 * step + 2 * dist.get_rank(), 4 * step + 2 * dist.get_rank() + 2)
        yield step, {"input_ids": IDS[here], "labels": LABELS[here]}


def load(source):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float64)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)


def with_trainer(options):
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=5,
        per_device_train_batch_size=2,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=3,
        average_tokens_across_devices=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=zero.config(options.stage),
    )
    trainer = Trainer(load(options.source), arguments, train_dataset=Rows(), callbacks=[SeedEachStep()])
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(f"{options.out}/final")


def with_accelerate(options):
    from accelerate import Accelerator, DeepSpeedPlugin

    settings = zero.config(options.stage, train_micro_batch_size_per_gpu=2)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model = load(options.source)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    model.train()
    for step, batch in batches():
        seed(step)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        f"{options.out}/final", is_main_process=accelerator.is_main_process, state_dict=state
    )


def in_loop(options):
    import deepspeed

    model = load(options.source)
    settings = zero.config(options.stage, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1)
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    engine.train()
    for step, batch in batches():
        seed(step)
        engine.backward(engine(**batch).loss)
        engine.step()
    if options.stage == 3:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            model.save_pretrained(f"{options.out}/final", is_main_process=dist.get_rank() == 0)
    else:
        model.save_pretrained(f"{options.out}/final", is_main_process=dist.get_rank() == 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["trainer", "accelerate", "loop"])
    parser.add_argument("stage", type=int)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--resume")
    options = parser.parse_args()
    zero.start()
    {"trainer": with_trainer, "accelerate": with_accelerate, "loop": in_loop}[options.way](options)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
