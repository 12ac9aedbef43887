"""Train a small reward model with TRL's RewardTrainer, with dropout, which it takes out by default."""

import sys

from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer
from with_sft import make_tokenizer


def main(source, out):
    config = RewardConfig(
        out,
        max_steps=2,
        per_device_train_batch_size=2,
        disable_dropout=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
    )
    rows = [{"prompt": f"w{n} w9", "chosen": f" w{n + 1}", "rejected": " w8 w7"} for n in range(10, 18)]
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, pad_token_id=0)
    RewardTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer()).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
