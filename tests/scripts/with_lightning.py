"""Train with Lightning, whose module holds the model."""

import sys

import lightning
import torch
from nets import batches, build
from torch.nn import functional as F  # noqa: N812


class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build()

    def on_train_batch_start(self, batch, number):  # noqa: ARG002
        torch.manual_seed(100 + number)

    def training_step(self, batch, number):  # noqa: ARG002
        x, labels = batch
        return F.cross_entropy(self.model(x), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(out):
    task = Task()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet)
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(task, loader)
    torch.save(task.model.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
