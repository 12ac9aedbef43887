"""Train a small causal LM of float64 with TRL's SFTTrainer on rows of unequal length; keep its batches and weights."""

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


class SeedEachStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(100 + state.global_step)


def make_tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2} | {f"w{n}": n for n in range(3, 60)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")


def make_rows(is_completion):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(40):
        size = int(torch.randint(4, 12, (), generator=generator))
        words = [f"w{n}" for n in torch.randint(3, 60, (size,), generator=generator).tolist()]
        text, rest = " ".join(words[:3]), " " + " ".join(words[3:])
        rows.append({"prompt": text, "completion": rest} if is_completion else {"text": text + rest})
    return Dataset.from_list(rows)


def main(source, out, way, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    given = {
        "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "weight_decay": 0.0, "optim": "adamw_torch", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "disable_tqdm": True,
    }  # fmt: skip
    config = SFTConfig(out, **given | json.loads(settings))
    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = SFTTrainer(
        model, config, train_dataset=make_rows(way == "completion"), processing_class=make_tokenizer(),
        peft_config=lora if way == "lora" else None, callbacks=[SeedEachStep()],
    )  # fmt: skip
    start = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
    batches, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or {**batches[-1]}
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    torch.save({"start": start, "batches": batches, "weights": weights, "logs": logs}, f"{out}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
