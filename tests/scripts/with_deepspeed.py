"""Fine-tune a classifier on two processes with DeepSpeed's ZeRO: with Trainer, with accelerate, or in a loop."""

import argparse

import torch
import torch.distributed as dist
import zero
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

EPS = 1e-3
"""Of Adam, which makes as large a step of rounding errors otherwise."""
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


def load(source, dtype=torch.float64):
    """Load the model; its new head is drawn here, for zero.Init draws in an order of its own."""
    import deepspeed

    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype)
    with deepspeed.zero.GatheredParameters(list(model.classifier.parameters()), modifier_rank=0):
        draw_head(model)
    return model


def draw_head(model):
    torch.manual_seed(0)
    with torch.no_grad():
        model.classifier.weight.copy_(0.02 * torch.randn(2, 32))
        model.classifier.bias.zero_()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=EPS)


def with_trainer(options):
    train(options, load(options.source))


def with_init(options):
    """Have zero.Init split the weights while they are loaded, as it does in float32 at most."""
    train(options, None)


def train(options, model):
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=5,
        per_device_train_batch_size=2,
        optim="adamw_torch",
        learning_rate=1e-3,
        adam_epsilon=EPS,
        logging_steps=1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=3,
        average_tokens_across_devices=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=zero.config(options.stage),
    )
    model = model or load(options.source, torch.float32)
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[SeedEachStep()])
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
    adam = {"lr": 1e-3, "eps": EPS, "weight_decay": 0.0, "torch_adam": True}
    settings["optimizer"] = {"type": "AdamW", "params": adam}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    engine.train()
    for step, batch in batches():
        seed(step)
        engine.backward(engine(**batch).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        model.save_pretrained(f"{options.out}/final", is_main_process=dist.get_rank() == 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["trainer", "init", "accelerate", "loop"])
    parser.add_argument("stage", type=int)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--resume")
    options = parser.parse_args()
    zero.start()
    ways = {"trainer": with_trainer, "init": with_init, "accelerate": with_accelerate, "loop": in_loop}
    ways[options.way](options)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
