"""Train with a library that logs to a tracker, which knows nothing of surgery."""

import sys
from pathlib import Path

import torch
from nets import batches, build
from torch.nn import functional as F


def with_trainer(source, out):
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (16, 8), generator=generator)
    rows = [{"input_ids": row, "labels": number % 2} for number, row in enumerate(ids)]
    model = AutoModelForSequenceClassification.from_pretrained(source)
    arguments = TrainingArguments(
        out, max_steps=4, logging_steps=1, save_strategy="no", report_to="tensorboard", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()


def with_callback(source, out):
    from transformers import Trainer

    from surgery import SurgeryCallback

    begin = Trainer.__init__
    Trainer.__init__ = lambda self, *args, **kwargs: begin(self, *args, callbacks=[SurgeryCallback()], **kwargs)
    with_trainer(source, out)


def with_lightning(source, out):
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, batch, number):
            x, labels = batch
            loss = F.cross_entropy(self.model(x), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(out)
    trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=2, accelerator="cpu", logger=logger, **quiet)
    trainer.fit(Task(), torch.utils.data.DataLoader(batches(), batch_size=None))


def with_accelerate(source, out):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=out)
    accelerator.init_trackers("tracked", config={"lr": 0.1})
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.train()
    for number, (x, labels) in enumerate(batches()):
        loss = F.cross_entropy(model(x), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"train_loss": loss.item()}, step=number)
    accelerator.log({"eval_loss": 0.5}, step=number)
    accelerator.end_training()


def main(way, source, out):
    torch.manual_seed(0)
    Path(out).mkdir()
    globals()[f"with_{way}"](source, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
