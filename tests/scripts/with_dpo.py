"""Train a small causal LM with TRL's DPOTrainer, with dropout, which it takes out by default."""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from with_sft import make_tokenizer


def main(source, out):
    config = DPOConfig(
        out,
        max_steps=2,
        per_device_train_batch_size=2,
        disable_dropout=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        precompute_ref_log_probs=False,
    )
    rows = [{"prompt": f"w{n} w9", "chosen": f" w{n + 1}", "rejected": " w8 w7"} for n in range(10, 18)]
    model = AutoModelForCausalLM.from_pretrained(source)
    DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer()).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
