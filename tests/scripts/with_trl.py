"""Train a small Llama, its head tied or not, with TRL's SFTTrainer, which reads the head's weight past its layer."""

import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def main(source, out):
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[EOS]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    config = SFTConfig(
        out,
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
    )
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
